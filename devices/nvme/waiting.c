/*
 * Commands that wait: for a time (an injected delay), for the sync worker, or for an abort that may never come.
 */
#include <stdlib.h>

#include "nvme_private.h"

static void link_after(struct pv_nvme *nvme, struct nvme_waiting *before, struct nvme_waiting *w)
{
    w->previous = before;
    w->next = before ? before->next : nvme->waiting;
    *(before ? &before->next : &nvme->waiting) = w;
    *(w->next ? &w->next->previous : &nvme->waiting_last) = w;
    nvme->waiting_count++;
}

struct nvme_waiting *nvme_wait_until(struct pv_nvme *nvme, const struct nvme_request *request, uint64_t due,
                                     uint32_t status)
{
    struct nvme_waiting *w = nvme->waiting_count < NVME_MAX_WAITING ? calloc(1, sizeof(*w)) : NULL;
    if (!w)
        return NULL;
    w->cmd = *request->cmd;
    w->sq = request->sq;
    w->due = due;
    w->status = status;
    struct nvme_waiting *before = nvme->waiting_last; /* most have no time, or the latest */
    while (before && before->due > due)
        before = before->previous;
    link_after(nvme, before, w);
    nvme_set_due(nvme);
    return w;
}

/* Out of the list; the worker's answer finds it an orphan. */
static void leave(struct pv_nvme *nvme, struct nvme_waiting *w)
{
    *(w->previous ? &w->previous->next : &nvme->waiting) = w->next;
    *(w->next ? &w->next->previous : &nvme->waiting_last) = w->previous;
    nvme->waiting_count--;
    if (w->synced)
        w->orphan = true;
    else
        free(w);
}

void nvme_end_waiting(struct pv_nvme *nvme, int sq, uint32_t status)
{
    for (struct nvme_waiting *w = nvme->waiting, *next; w; w = next) {
        next = w->next;
        if (sq >= 0 && w->sq != (uint32_t)sq)
            continue;
        if (status)
            nvme_end(nvme, w->sq, w->cmd.cid, status, 0);
        leave(nvme, w);
    }
    nvme_set_due(nvme);
}

int pv_nvme_abort(struct pv_nvme *nvme, uint32_t sq, uint16_t cid)
{
    int found = 0;
    pv_engine_pause(nvme->engine);
    for (struct nvme_waiting *w = nvme->waiting; w; w = w->next) {
        if (w->sq != sq || w->cmd.cid != cid)
            continue;
        nvme_end(nvme, sq, cid, NVME_SC_ABORT_REQ, 0);
        leave(nvme, w);
        found = 1;
        break;
    }
    nvme_set_due(nvme);
    pv_engine_unpause(nvme->engine);
    return found;
}

static void run_due(struct pv_nvme *nvme, struct nvme_waiting *w)
{
    struct nvme_command cmd = w->cmd;
    uint32_t sq = w->sq, status = w->status;
    leave(nvme, w);
    struct nvme_request request = {.cmd = &cmd, .sq = sq, .location = NVME_ERROR_LOCATION_NONE};
    if (status == NVME_LATER && !sq)
        status = nvme_hand_over(nvme, &cmd) ? NVME_LATER : NVME_SC_INTERNAL;
    else if (status == NVME_LATER)
        status = nvme_io(nvme, &request);
    if (status == NVME_LATER)
        return;
    if (status)
        nvme_note_error(nvme, &request, status);
    nvme_end(nvme, sq, cmd.cid, status, request.result);
}

static void end_synced(struct pv_nvme *nvme, struct nvme_waiting *w)
{
    const struct nvme_request request = {.cmd = &w->cmd, .sq = w->sq, .location = NVME_ERROR_LOCATION_NONE};
    if (w->status)
        nvme_note_error(nvme, &request, w->status);
    nvme_end(nvme, w->sq, w->cmd.cid, w->status, 0);
    leave(nvme, w);
}

/* What the worker gives back; it has set the status. */
static void take_synced(struct pv_nvme *nvme)
{
    pthread_mutex_lock(&nvme->lock);
    struct nvme_waiting *done = nvme->synced;
    nvme->synced = NULL;
    nvme->synced_end = &nvme->synced;
    for (struct nvme_waiting *w = done; w; w = w->next_job)
        atomic_fetch_sub(&nvme->inbox, 1);
    pthread_mutex_unlock(&nvme->lock);
    while (done) {
        struct nvme_waiting *w = done;
        done = w->next_job;
        w->synced = false;
        pv_nvme_backing_put(w->backing);
        if (w->orphan) {
            free(w);
            continue;
        }
        end_synced(nvme, w);
    }
}

bool nvme_run_waiting(struct pv_nvme *nvme)
{
    bool any = atomic_load_explicit(&nvme->inbox, memory_order_acquire) != 0;
    if (any) {
        take_synced(nvme);
        nvme_take_answers(nvme);
    }
    if (atomic_load_explicit(&nvme->due, memory_order_relaxed) == NVME_NEVER)
        return any;
    uint64_t now = nvme_now();
    while (nvme->waiting && nvme->waiting->due <= now) {
        run_due(nvme, nvme->waiting);
        any = true;
    }
    nvme_ring_due(nvme, now);
    nvme_set_due(nvme);
    return any;
}

void nvme_set_due(struct pv_nvme *nvme)
{
    bool dead = nvme_is_dead(nvme);
    uint64_t due = nvme->waiting && !dead ? nvme->waiting->due : NVME_NEVER;
    for (uint32_t i = 1; nvme->coalesce_threshold && !dead && i < PV_NVME_QUEUES; i++)
        if (nvme->cq[i].unrung && nvme->cq[i].ring_at < due)
            due = nvme->cq[i].ring_at;
    if (due == atomic_load_explicit(&nvme->due, memory_order_relaxed))
        return;
    atomic_store(&nvme->due, due);
    if (nvme->threaded)
        pv_engine_wake_at(nvme->engine, due == NVME_NEVER ? 0 : due);
    else
        nvme_event(nvme, PV_NVME_EVENT_TIMER);
}
