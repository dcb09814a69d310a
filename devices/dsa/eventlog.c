/*
 * The event log: a ring of 64-byte entries in memory, for what no completion record can say (Intel DSA 2.0 5.9).
 *
 * The device writes the entry at the tail and moves the tail; software moves the head. An entry carries the completion
 * record that could not be written, so that software can write it. Where an entry has that record, the device sends no
 * completion interrupt. A log that is full or cannot be written takes nothing: SWERR does.
 *
 * Not modelled: the PASID and privilege an entry would be written with, events of the portals (SWERR has them).
 */
#include <errno.h>

#include "dsa_private.h"

void pv_dsa_log_enable(struct pv_dsa *dsa, uint64_t base, uint32_t size)
{
    pv_engine_pause(dsa->engine);
    dsa_lock(&dsa->log.lock);
    dsa->log.base = base;
    dsa->log.size = size;
    dsa->log.head = dsa->log.tail = 0;
    dsa->log.pending = false;
    dsa->log.enabled = size > 0;
    dsa_unlock(&dsa->log.lock);
    pv_engine_unpause(dsa->engine);
}

uint64_t pv_dsa_log_status(struct pv_dsa *dsa)
{
    dsa_lock(&dsa->log.lock);
    uint64_t status = dsa->log.head | (uint64_t)dsa->log.tail << IDXD_EVLSTATUS_TAIL_SHIFT |
                      (dsa->log.pending ? IDXD_EVLSTATUS_INT_PENDING : 0);
    dsa_unlock(&dsa->log.lock);
    return status;
}

void pv_dsa_log_head(struct pv_dsa *dsa, uint32_t head)
{
    dsa_lock(&dsa->log.lock);
    if (head < dsa->log.size)
        dsa->log.head = head;
    dsa_unlock(&dsa->log.lock);
}

void pv_dsa_log_clear_pending(struct pv_dsa *dsa)
{
    dsa_lock(&dsa->log.lock);
    dsa->log.pending = false;
    dsa_unlock(&dsa->log.lock);
}

static bool has_record(uint32_t error)
{
    return error == DSA_COMP_CRA_XLAT || error == DSA_COMP_DRAIN_EVL || error == DSA_COMP_BATCH_EVL_ERR;
}

static uint32_t error_info(const struct dsa_slot *slot, const struct dsa_work *work, uint32_t error, bool first)
{
    uint32_t flags = dsa_flags(&work->desc);
    if (error == DSA_COMP_INVALID_FLAGS)
        return work->record.invalid_flags & DSA_EVL_INVALID_FLAGS_MASK;
    if (!has_record(error) && error != DSA_COMP_INT_HANDLE_INVAL)
        return 0;
    bool ims = slot->portal == IDXD_PORTAL_IMS_UNLIMITED || slot->portal == IDXD_PORTAL_IMS_LIMITED;
    return work->desc.int_handle | (flags & IDXD_OP_FLAG_RCI ? DSA_EVL_RCI : 0) | (ims ? DSA_EVL_IMS : 0) |
           (flags & IDXD_OP_FLAG_RCR ? DSA_EVL_RCR : 0) | (first ? DSA_EVL_FIRST_ERR_IN_BATCH : 0);
}

/* The entry is in memory: software may see it. Whether an interrupt is due. */
static bool publish(struct dsa_event_log *log)
{
    dsa_lock(&log->lock);
    log->tail = (log->tail + 1) % log->size;
    bool due = !log->pending;
    log->pending = true;
    dsa_unlock(&log->lock);
    return due;
}

/* The tail, or -ENOSPC. */
static int64_t room(struct dsa_event_log *log)
{
    dsa_lock(&log->lock);
    bool full = !log->enabled || (log->tail + 1) % log->size == log->head;
    int64_t tail = full ? -ENOSPC : (int64_t)log->tail;
    dsa_unlock(&log->lock);
    return tail;
}

int dsa_log_event(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work, const struct dsa_swerr *error)
{
    uint32_t code = error->status >> IDXD_SWERR_ERROR_SHIFT & DSA_COMP_STATUS_MASK;
    bool record = has_record(code), first = work->in_batch && !slot->batch.logged;
    uint32_t info = error_info(slot, work, code, first);
    int64_t tail = room(&dsa->log);
    struct pv_dma dma;
    if (tail < 0)
        return -ENOSPC;
    struct dsa_evl_entry entry = {
        .status = (error->status & ~(uint64_t)IDXD_SWERR_ACK) | (info ? DSA_EVL_ERR_INFO_VALID : 0) |
                  (work->in_batch ? (uint64_t)(slot - dsa->slot) << DSA_EVL_BATCH_ID_SHIFT : 0),
        .batch_idx = work->batch_index,
        .error_info = info,
        .fault_addr = error->fault_addr,
        .cr = work->record,
    };
    uint64_t address = dsa->log.base + (uint64_t)tail * sizeof(entry);
    int result = pv_bus_write(dsa->bus, address, &entry, sizeof(entry), &dma);
    if (result)
        return result == -ECANCELED ? result : -ENOSPC;
    if (record) {
        work->vector = -1;
        slot->batch.logged |= work->in_batch;
        dsa->wq[slot->wq].logged = code != DSA_COMP_DRAIN_EVL;
    }
    if (publish(&dsa->log) && atomic_load(&dsa->genctrl) & IDXD_GENCTRL_EVL_INT_EN)
        pv_dsa_cause(dsa, IDXD_INTC_EVL);
    return 0;
}
