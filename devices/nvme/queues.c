/*
 * The life of queues: with the controller from enable to disable, and one by one (Base 3.3.1, 5.4 to 5.7).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nvme_private.h"

static void make_queue(struct pv_nvme *nvme, uint32_t index)
{
    atomic_store(&nvme->doorbell[((uint64_t)index << (2 + nvme->config.dstrd)) / 4], 0);
    nvme->heard[index] = 0;
}

static void make_sq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, uint32_t cq, uint32_t priority)
{
    make_queue(nvme, 2 * id);
    nvme->sq[id] = (struct nvme_sq){.live = true, .size = size, .cq = cq, .priority = priority, .base = base};
    nvme->cq[cq].users++;
    nvme_begin_shadow(nvme, 2 * id);
}

static void make_cq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, bool interrupts, uint32_t vector)
{
    make_queue(nvme, 2 * id + 1);
    nvme->cq[id] = (struct nvme_cq){
        .live = true, .phase = true, .interrupts = interrupts, .size = size, .vector = vector, .base = base};
    nvme_begin_shadow(nvme, 2 * id + 1);
}

int pv_nvme_enable(struct pv_nvme *nvme, uint64_t asq, uint32_t asq_size, uint64_t acq, uint32_t acq_size,
                   uint32_t page_shift, uint32_t ams)
{
    uint64_t page = 1ull << page_shift;
    if (page_shift < 12 || page_shift > 16 || asq_size < 2 || acq_size < 2 || asq_size > NVME_AQA_MAX ||
        acq_size > NVME_AQA_MAX || (asq | acq) & (page - 1) || atomic_load(&nvme->enabled))
        return -EINVAL;
    pv_engine_pause(nvme->engine);
    nvme->page_shift = page_shift;
    nvme->ams = ams;
    make_cq(nvme, 0, acq, acq_size, true, 0);
    make_sq(nvme, 0, asq, asq_size, 0, NVME_SQ_QPRIO_URGENT);
    atomic_store(&nvme->enabled, 1);
    pv_engine_unpause(nvme->engine);
    return 0;
}

uint64_t pv_nvme_resets(struct pv_nvme *nvme)
{
    pthread_mutex_lock(&nvme->lock);
    uint64_t resets = nvme->resets;
    pthread_mutex_unlock(&nvme->lock);
    return resets;
}

/* None begins any more, and those under way are over. */
static void end_transfers(struct pv_nvme *nvme)
{
    pthread_mutex_lock(&nvme->lock);
    nvme->resets++;
    while (nvme->transfers)
        pthread_cond_wait(&nvme->transferred, &nvme->lock);
    pthread_mutex_unlock(&nvme->lock);
}

void pv_nvme_disable(struct pv_nvme *nvme)
{
    end_transfers(nvme);
    pv_engine_pause(nvme->engine);
    atomic_store(&nvme->enabled, 0);
    nvme_end_waiting(nvme, -1, 0);
    nvme_drop_admin(nvme);
    for (uint32_t i = 0; i < PV_NVME_QUEUES; i++) {
        free(nvme->cq[i].backlog);
        nvme->sq[i] = (struct nvme_sq){0};
        nvme->cq[i] = (struct nvme_cq){0};
    }
    for (uint32_t i = 0; i < 4; i++)
        atomic_store(&nvme->rung[i], 0);
    memset(nvme->heard, 0, sizeof(nvme->heard));
    memset(nvme->ready_sq, 0, sizeof(nvme->ready_sq));
    memset(nvme->uncoalesced, 0, sizeof(nvme->uncoalesced));
    nvme->next_sq = 0;
    nvme->held = false;
    nvme->shadow = nvme->event_index = 0;
    nvme->switches = false;
    memset(nvme->fresh, 0, sizeof(nvme->fresh));
    nvme->coalesce_threshold = 0;
    nvme->coalesce_ns = 0;
    nvme->write_through = false;
    pv_nvme_set_arbitration(nvme, 7, 0, 0, 0);
    atomic_store(&nvme->pin_mask, 0);
    atomic_store(&nvme->fatal, 0);
    atomic_fetch_and(&nvme->events, ~(uint32_t)(PV_NVME_EVENT_ADMIN | PV_NVME_EVENT_FATAL));
    nvme_set_due(nvme);
    pv_engine_unpause(nvme->engine);
}

int pv_nvme_create_cq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, int interrupts, uint32_t vector)
{
    if (!id || id >= PV_NVME_QUEUES || nvme->cq[id].live)
        return NVME_SC_QID_INVALID;
    if (size < 2 || size > 65536)
        return NVME_SC_QUEUE_SIZE;
    if (base & ((1ull << nvme->page_shift) - 1))
        return NVME_SC_PRP_INVALID_OFFSET;
    pv_engine_pause(nvme->engine);
    make_cq(nvme, id, base, size, interrupts, vector);
    pv_engine_unpause(nvme->engine);
    pv_engine_kick(nvme->engine);
    return 0;
}

int pv_nvme_create_sq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, uint32_t cq, uint32_t priority)
{
    if (!id || id >= PV_NVME_QUEUES || nvme->sq[id].live)
        return NVME_SC_QID_INVALID;
    if (!cq || cq >= PV_NVME_QUEUES)
        return NVME_SC_QID_INVALID;
    if (!nvme->cq[cq].live)
        return NVME_SC_CQ_INVALID;
    if (size < 2 || size > 65536)
        return NVME_SC_QUEUE_SIZE;
    if (base & ((1ull << nvme->page_shift) - 1))
        return NVME_SC_PRP_INVALID_OFFSET;
    pv_engine_pause(nvme->engine);
    make_sq(nvme, id, base, size, cq, priority & 3);
    pv_engine_unpause(nvme->engine);
    pv_engine_kick(nvme->engine);
    return 0;
}

int pv_nvme_delete_sq(struct pv_nvme *nvme, uint32_t id)
{
    if (!id || id >= PV_NVME_QUEUES || !nvme->sq[id].live)
        return NVME_SC_QID_INVALID;
    pv_engine_pause(nvme->engine);
    nvme_end_waiting(nvme, (int)id, NVME_SC_ABORT_QUEUE);
    nvme->cq[nvme->sq[id].cq].users--;
    nvme->sq[id] = (struct nvme_sq){0};
    nvme->ready_sq[id / 64] &= ~(1ull << id % 64);
    pv_engine_unpause(nvme->engine);
    return 0;
}

int pv_nvme_delete_cq(struct pv_nvme *nvme, uint32_t id)
{
    if (!id || id >= PV_NVME_QUEUES || !nvme->cq[id].live)
        return NVME_SC_QID_INVALID;
    if (nvme->cq[id].users)
        return NVME_SC_INVALID_QUEUE;
    pv_engine_pause(nvme->engine);
    free(nvme->cq[id].backlog);
    nvme->cq[id] = (struct nvme_cq){0};
    pv_engine_unpause(nvme->engine);
    return 0;
}
