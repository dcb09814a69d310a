/*
 * Completions and interrupts (Base 3.3.1.2, 3.3.3.2 and 3.1.3.3; coalescing: 5.27.1.6).
 *
 * An entry's phase tag is stored last. Completions for which the driver has left no room wait here, in order.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nvme_private.h"

static uint32_t free_entries(const struct nvme_cq *cq)
{
    return cq->size - 1 - nvme_ahead(cq->head, cq->tail, cq->size);
}

uint32_t nvme_cq_room(const struct nvme_cq *cq)
{
    uint32_t room = free_entries(cq);
    return room > cq->backlog_count ? room - cq->backlog_count : 0;
}

/* Entries begin at multiples of 16, so a piece holds whole ones; the last eight bytes have the phase. */
static int store_entries(void *arg, uint8_t *ptr, uint64_t len)
{
    const struct nvme_completion **from = arg;
    for (uint64_t at = 0; at < len; at += NVME_CQE_SIZE) {
        uint64_t half[2];
        memcpy(half, (*from)++, sizeof(half));
        uint64_t *to = (uint64_t *)(void *)(ptr + at);
        __atomic_store_n(&to[0], half[0], __ATOMIC_RELAXED);
        __atomic_store_n(&to[1], half[1], __ATOMIC_RELEASE);
    }
    return 0;
}

/* As many as there is room for, in one or two runs; how many. */
static uint32_t write_entries(struct pv_nvme *nvme, struct nvme_cq *cq, const struct nvme_completion *entry,
                              uint32_t count)
{
    struct nvme_completion ready[NVME_BURST];
    uint32_t done = 0, room = free_entries(cq);
    if (count > room)
        count = room;
    while (done < count) {
        uint32_t run = count - done < NVME_BURST ? count - done : NVME_BURST;
        if (run > cq->size - cq->tail)
            run = cq->size - cq->tail;
        for (uint32_t i = 0; i < run; i++) {
            ready[i] = entry[done + i];
            ready[i].status = (uint16_t)(ready[i].status << NVME_CQE_STATUS_SHIFT | (cq->phase ? NVME_CQE_PHASE : 0));
        }
        const struct nvme_completion *from = ready;
        struct pv_dma dma;
        int error = pv_bus_walk(nvme->bus, cq->base + (uint64_t)cq->tail * NVME_CQE_SIZE,
                                (uint64_t)run * NVME_CQE_SIZE, PV_DMA_WRITE, store_entries, &from, &dma);
        if (error == -ECANCELED) { /* no bus mastering, or a reset is coming */
            nvme->held = true;
            return done;
        }
        if (error) {
            nvme_fatal(nvme);
            return count;
        }
        done += run;
        cq->tail += run;
        if (cq->tail == cq->size) {
            cq->tail = 0;
            cq->phase = !cq->phase;
        }
    }
    return done;
}

static bool coalesces(const struct pv_nvme *nvme, const struct nvme_cq *cq)
{
    return nvme->coalesce_threshold && nvme->coalesce_ns && cq != &nvme->cq[0] &&
           !(nvme->uncoalesced[cq->vector / 64 % 32] >> cq->vector % 64 & 1);
}

static void ring(struct pv_nvme *nvme, struct nvme_cq *cq)
{
    cq->unrung = 0;
    if (cq->silent) {
        cq->silent = false;
        return;
    }
    if (atomic_load_explicit(&nvme->pin, memory_order_relaxed))
        nvme_event(nvme, PV_NVME_EVENT_PIN);
    else
        pv_msix_fire(nvme->msix, cq->vector);
}

static void announce(struct pv_nvme *nvme, struct nvme_cq *cq, uint32_t count)
{
    if (!cq->interrupts || !count)
        return;
    if (!coalesces(nvme, cq)) {
        ring(nvme, cq);
        return;
    }
    if (!cq->unrung)
        cq->ring_at = nvme_now() + nvme->coalesce_ns;
    cq->unrung += count;
    if (cq->unrung > nvme->coalesce_threshold)
        ring(nvme, cq);
    else
        nvme_set_due(nvme);
}

uint64_t nvme_ring_due(struct pv_nvme *nvme, uint64_t now)
{
    uint64_t next = NVME_NEVER;
    for (uint32_t i = 1; i < PV_NVME_QUEUES; i++) {
        struct nvme_cq *cq = &nvme->cq[i];
        if (!cq->live || !cq->unrung)
            continue;
        if (cq->ring_at <= now)
            ring(nvme, cq);
        else if (cq->ring_at < next)
            next = cq->ring_at;
    }
    return next;
}

static void keep(struct pv_nvme *nvme, struct nvme_cq *cq, const struct nvme_completion *entry, uint32_t count)
{
    if (cq->backlog_count + count > cq->backlog_size) {
        uint32_t size = 2 * cq->backlog_size + count;
        struct nvme_completion *more = realloc(cq->backlog, size * sizeof(*more));
        if (!more) {
            nvme_fatal(nvme);
            return;
        }
        cq->backlog = more;
        cq->backlog_size = size;
    }
    memcpy(cq->backlog + cq->backlog_count, entry, count * sizeof(*entry));
    cq->backlog_count += count;
}

void nvme_post(struct pv_nvme *nvme, struct nvme_cq *cq, const struct nvme_completion *entry, uint32_t count)
{
    uint32_t done = cq->backlog_count ? 0 : write_entries(nvme, cq, entry, count);
    if (done < count)
        keep(nvme, cq, entry + done, count - done);
    announce(nvme, cq, done);
}

/* Its submission queues may have waited for room too. */
static void wake_users(struct pv_nvme *nvme, uint32_t cq)
{
    for (uint32_t i = 0; i < PV_NVME_QUEUES; i++)
        if (nvme->sq[i].live && nvme->sq[i].cq == cq && nvme->sq[i].head != nvme->sq[i].tail)
            nvme->ready_sq[i / 64] |= 1ull << i % 64;
}

void nvme_cq_moved(struct pv_nvme *nvme, struct nvme_cq *cq)
{
    if (cq->backlog_count) {
        uint32_t done = write_entries(nvme, cq, cq->backlog, cq->backlog_count);
        cq->backlog_count -= done;
        memmove(cq->backlog, cq->backlog + done, cq->backlog_count * sizeof(*cq->backlog));
        announce(nvme, cq, done);
    }
    if (cq->starved) {
        cq->starved = false;
        wake_users(nvme, (uint32_t)(cq - nvme->cq));
    }
    if (atomic_load_explicit(&nvme->pin, memory_order_relaxed))
        nvme_event(nvme, PV_NVME_EVENT_PIN);
}

void nvme_release_held(struct pv_nvme *nvme)
{
    nvme->held = false;
    for (uint32_t i = 0; i < PV_NVME_QUEUES; i++)
        if (nvme->cq[i].backlog_count)
            nvme_cq_moved(nvme, &nvme->cq[i]);
}

/* Error information, Base 5.16.1.2. */
void nvme_note_error(struct pv_nvme *nvme, const struct nvme_request *request, uint32_t status)
{
    const struct nvme_command *cmd = request->cmd;
    struct nvme_error_log_entry entry = {
        .sqid = (uint16_t)request->sq,
        .cmdid = cmd->cid,
        .status_field = (uint16_t)(status << NVME_CQE_STATUS_SHIFT),
        .parm_error_location = (uint16_t)request->location,
        .lba = nvme_slba(cmd),
        .nsid = cmd->nsid,
    };
    pv_nvme_log_error(nvme, &entry);
}

void pv_nvme_log_error(struct pv_nvme *nvme, const struct nvme_error_log_entry *entry)
{
    pthread_mutex_lock(&nvme->lock);
    struct nvme_error_log_entry *to = &nvme->error[nvme->errors++ % PV_NVME_ERRORS];
    *to = *entry;
    to->error_count = nvme->errors;
    pthread_mutex_unlock(&nvme->lock);
}

uint32_t pv_nvme_errors(struct pv_nvme *nvme, struct nvme_error_log_entry *out, uint32_t max, uint64_t *total)
{
    pthread_mutex_lock(&nvme->lock);
    uint64_t have = nvme->errors < PV_NVME_ERRORS ? nvme->errors : PV_NVME_ERRORS;
    uint32_t count = have < max ? (uint32_t)have : max;
    for (uint32_t i = 0; i < count; i++)
        out[i] = nvme->error[(nvme->errors - 1 - i) % PV_NVME_ERRORS];
    *total = nvme->errors;
    pthread_mutex_unlock(&nvme->lock);
    return count;
}
