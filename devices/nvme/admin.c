/*
 * Admin commands on their way to Python, and its answers on their way back to the admin queue.
 *
 * Both wait in the controller: a command until it is taken, an answer until the engine's next step.
 */
#include <stdlib.h>

#include "nvme_private.h"

bool nvme_hand_over(struct pv_nvme *nvme, const struct nvme_command *cmd)
{
    pthread_mutex_lock(&nvme->lock);
    bool room = nvme->admin_count < NVME_AQA_MAX;
    if (room)
        nvme->admin[(nvme->admin_head + nvme->admin_count++) % NVME_AQA_MAX] = *cmd;
    pthread_mutex_unlock(&nvme->lock);
    if (room)
        nvme_event(nvme, PV_NVME_EVENT_ADMIN);
    return room;
}

uint32_t pv_nvme_take_admin(struct pv_nvme *nvme, struct nvme_command *out, uint32_t max)
{
    pthread_mutex_lock(&nvme->lock);
    bool was_full = nvme->admin_count == NVME_AQA_MAX;
    uint32_t count = 0;
    for (; count < max && nvme->admin_count; count++, nvme->admin_count--) {
        out[count] = nvme->admin[nvme->admin_head];
        nvme->admin_head = (nvme->admin_head + 1) % NVME_AQA_MAX;
    }
    pthread_mutex_unlock(&nvme->lock);
    if (was_full && count)
        pv_engine_kick(nvme->engine);
    return count;
}

void pv_nvme_complete(struct pv_nvme *nvme, uint16_t cid, uint32_t status, uint64_t result)
{
    struct nvme_answer *answer = malloc(sizeof(*answer));
    if (!answer) {
        nvme_fatal(nvme);
        return;
    }
    *answer = (struct nvme_answer){NULL, status, cid, result};
    pthread_mutex_lock(&nvme->lock);
    *nvme->answers_end = answer;
    nvme->answers_end = &answer->next;
    atomic_fetch_add(&nvme->inbox, 1);
    pthread_mutex_unlock(&nvme->lock);
    pv_engine_kick(nvme->engine);
}

/* With the lock held: all answers. */
static struct nvme_answer *detach(struct pv_nvme *nvme)
{
    struct nvme_answer *first = nvme->answers;
    nvme->answers = NULL;
    nvme->answers_end = &nvme->answers;
    for (struct nvme_answer *answer = first; answer; answer = answer->next)
        atomic_fetch_sub(&nvme->inbox, 1);
    return first;
}

void nvme_take_answers(struct pv_nvme *nvme)
{
    pthread_mutex_lock(&nvme->lock);
    struct nvme_answer *answer = detach(nvme);
    pthread_mutex_unlock(&nvme->lock);
    while (answer) {
        struct nvme_answer *next = answer->next;
        nvme_end(nvme, 0, answer->cid, answer->status, answer->result);
        free(answer);
        answer = next;
    }
}

void nvme_drop_admin(struct pv_nvme *nvme)
{
    pthread_mutex_lock(&nvme->lock);
    struct nvme_answer *answer = detach(nvme);
    nvme->admin_count = 0;
    pthread_mutex_unlock(&nvme->lock);
    while (answer) {
        struct nvme_answer *next = answer->next;
        free(answer);
        answer = next;
    }
}
