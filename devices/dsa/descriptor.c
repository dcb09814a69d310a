/*
 * The life of one descriptor: checks, operation, completion record, interrupt (Intel DSA 1.2 chapter 5 and 8.1).
 *
 * An error that no completion record can report goes to the event log, or to SWERR. A page fault ends the descriptor
 * with the bytes done and the address, unless it blocks on faults: then it stays in hand and goes on where it was when
 * the page is there.
 *
 * Not modelled: faults that page requests would resolve or refuse (status 0x04), privileged mode.
 */
#include <errno.h>
#include <string.h>

#include "dsa_private.h"

#define COMMON_FLAGS \
    (IDXD_OP_FLAG_CRAV | IDXD_OP_FLAG_RCR | IDXD_OP_FLAG_RCI | IDXD_OP_FLAG_CRSTS | IDXD_OP_FLAG_CR_TCS)

/* The flags that are wrong: not allowed here, or set without what they need, or missing. */
static uint32_t invalid_flags(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_op *op,
                              uint32_t flags, bool in_batch)
{
    uint32_t allowed = (op->flags | COMMON_FLAGS) & (wq->flags | op->optional);
    if (!(dsa->config.gencap & op->needs))
        allowed &= ~op->optional;
    if (!in_batch)
        allowed &= ~(uint32_t)IDXD_OP_FLAG_FENCE;
    uint32_t invalid = flags & ~allowed;
    if ((flags & IDXD_OP_FLAG_RCR) && !(flags & IDXD_OP_FLAG_CRAV))
        invalid |= IDXD_OP_FLAG_RCR;
    if (op->result)
        invalid |= ~flags & (IDXD_OP_FLAG_CRAV | IDXD_OP_FLAG_RCR);
    return invalid;
}

static bool reserved_fields(const struct dsa_op *op, const struct dsa_hw_desc *desc)
{
    uint64_t word[8], set = 0;
    memcpy(word, desc, sizeof(word));
    for (int i = 0; i < 6; i++)
        set |= word[i + 2] & op->reserved[i];
    return set || desc->rsvd1 || desc->pasid_priv & DSA_DESC_RSVD_MASK;
}

static bool has_opcode(const uint64_t set[4], uint32_t opcode)
{
    return set[opcode / 64] >> opcode % 64 & 1;
}

/* The vector of the descriptor's interrupt handle, < 0: invalid. */
static int vector_of(struct pv_dsa *dsa, const struct dsa_slot *slot, const struct dsa_hw_desc *desc)
{
    bool ims = slot->portal == IDXD_PORTAL_IMS_UNLIMITED || slot->portal == IDXD_PORTAL_IMS_LIMITED;
    if (ims || desc->int_handle >= dsa->config.handles)
        return -1;
    return atomic_load_explicit(&dsa->vector_of[desc->int_handle], memory_order_acquire);
}

static uint8_t check(struct pv_dsa *dsa, const struct dsa_slot *slot, struct dsa_work *work)
{
    const struct dsa_wq *wq = &dsa->wq[slot->wq];
    const struct dsa_hw_desc *desc = &work->desc;
    uint32_t opcode = dsa_opcode(desc), flags = dsa_flags(desc);
    const struct dsa_op *op = has_opcode(wq->op_config, opcode) ? dsa_op(opcode) : NULL;
    if (!op || (op->alone && work->in_batch))
        return DSA_COMP_BAD_OPCODE;
    uint32_t invalid = invalid_flags(dsa, wq, op, flags, work->in_batch);
    if (invalid) {
        work->record.invalid_flags = invalid;
        return DSA_COMP_INVALID_FLAGS;
    }
    if (reserved_fields(op, desc))
        return DSA_COMP_NOZERO_RESERVE;
    if (flags & IDXD_OP_FLAG_CRAV && desc->completion_addr % DSA_COMPLETION_SIZE)
        return DSA_COMP_CRA_ALIGN;
    if (!wq->dedicated && desc->pasid_priv & DSA_DESC_PRIV)
        return DSA_COMP_PRIV_BAD;
    uint8_t status = op->check ? op->check(dsa, wq, desc) : 0;
    if (!status && flags & IDXD_OP_FLAG_RCI && work->vector < 0)
        status = DSA_COMP_INT_HANDLE_INVAL;
    work->op = op;
    return status;
}

uint8_t dsa_check_xfer(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    (void)dsa;
    return desc->xfer_size && desc->xfer_size <= wq->max_xfer ? 0 : DSA_COMP_XFER_ERANGE;
}

void dsa_work_begin(struct pv_dsa *dsa, const struct dsa_slot *slot, struct dsa_work *work,
                    const struct dsa_hw_desc *desc)
{
    work->desc = *desc;
    work->record = (struct dsa_completion_record){0};
    work->op = NULL;
    work->done = 0;
    work->crc = 0;
    work->offset = 0;
    work->seeded = false;
    work->in_batch = work == &slot->batch.member;
    work->failed = false;
    work->batch_index = 0;
    work->vector = dsa_flags(desc) & IDXD_OP_FLAG_RCI ? vector_of(dsa, slot, desc) : -1;
    work->record.status = check(dsa, slot, work);
    if (atomic_load_explicit(&dsa->injections, memory_order_relaxed) && !work->record.status)
        dsa_inject(dsa, slot, work);
    work->phase = work->record.status ? DSA_PHASE_RECORD : DSA_PHASE_RUN;
}

int dsa_account(struct dsa_work *work, int result)
{
    if (result <= 0)
        work->done += work->dma.done;
    if (result)
        return result;
    if (work->done < work->desc.xfer_size)
        return DSA_MORE;
    work->record.bytes_completed = work->desc.xfer_size;
    return DSA_DONE;
}

/* Reports what no record can: DSA_DONE, or DSA_WAIT: try again later. */
static int report(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work, uint64_t code, bool write,
                  uint64_t address)
{
    bool invalid_flags = work->record.status == DSA_COMP_INVALID_FLAGS;
    struct dsa_swerr error = {
        .status = IDXD_SWERR_VALID | IDXD_SWERR_DESC_VALID | IDXD_SWERR_WQ_IDX_VALID |
                  (work->in_batch ? IDXD_SWERR_BATCH : 0) | (write ? IDXD_SWERR_FAULT_RW : 0) |
                  (work->desc.pasid_priv & DSA_DESC_PRIV ? IDXD_SWERR_PRIV : 0) | code << IDXD_SWERR_ERROR_SHIFT |
                  (uint64_t)slot->wq << IDXD_SWERR_WQ_IDX_SHIFT |
                  (uint64_t)dsa_opcode(&work->desc) << IDXD_SWERR_OPERATION_SHIFT |
                  (uint64_t)(work->desc.pasid_priv & DSA_DESC_PASID_MASK) << IDXD_SWERR_PASID_SHIFT,
        .batch_flags = work->batch_index |
                       (invalid_flags ? (uint64_t)work->record.invalid_flags << IDXD_SWERR_INVALID_FLAGS_SHIFT : 0),
        .fault_addr = address,
    };
    int result = dsa_log_event(dsa, slot, work, &error);
    if (result == -ECANCELED)
        return DSA_WAIT;
    if (result)
        dsa_report_swerr(dsa, &error);
    return DSA_DONE;
}

/* What must go to the event log because something before it did, so that software sees the two in order; 0: nothing. */
static uint64_t follows_an_event(const struct pv_dsa *dsa, const struct dsa_slot *slot, const struct dsa_work *work)
{
    uint32_t opcode = dsa_opcode(&work->desc);
    if (opcode == DSA_OPCODE_BATCH && slot->batch.logged && work->seeded) /* this batch, not the one before */
        return DSA_COMP_BATCH_EVL_ERR;
    return opcode == DSA_OPCODE_DRAIN && dsa->wq[slot->wq].logged ? DSA_COMP_DRAIN_EVL : 0;
}

/* A whole record at once, its status byte last: a driver polls it. Memory given in odd pieces gets it piecemeal. */
static int store_record(void *arg, uint8_t *ptr, uint64_t len)
{
    const uint8_t **from = arg;
    uint64_t word[DSA_COMPLETION_SIZE / 8], *to = (uint64_t *)(void *)ptr;
    if (len < sizeof(word) || (uintptr_t)ptr % sizeof(word[0])) {
        memcpy(ptr, *from, len);
        *from += len;
        return 0;
    }
    memcpy(word, *from, sizeof(word));
    for (int i = 3; i > 0; i--)
        __atomic_store_n(&to[i], word[i], __ATOMIC_RELAXED);
    __atomic_store_n(&to[0], word[0], __ATOMIC_RELEASE);
    return 0;
}

/* DSA_DONE, or DSA_WAIT: try again later. */
static int write_record(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    uint32_t flags = dsa_flags(&work->desc);
    uint8_t status = work->record.status;
    bool error = status != DSA_COMP_SUCCESS;
    bool aligned = work->desc.completion_addr % DSA_COMPLETION_SIZE == 0;
    work->failed |= error;
    if (!(flags & IDXD_OP_FLAG_CRAV) || !aligned)
        return error ? report(dsa, slot, work, status & DSA_COMP_STATUS_MASK, status & DSA_COMP_STATUS_WRITE,
                              work->record.fault_addr)
                     : DSA_DONE;
    if (!error && !(flags & IDXD_OP_FLAG_RCR))
        return DSA_DONE;
    uint64_t code = follows_an_event(dsa, slot, work);
    if (code)
        return report(dsa, slot, work, code, true, work->desc.completion_addr);
    const uint8_t *record = (const uint8_t *)&work->record;
    int result = pv_bus_walk(dsa->bus, work->desc.completion_addr, DSA_COMPLETION_SIZE, PV_DMA_WRITE, store_record,
                             &record, &work->dma);
    if (result == -ECANCELED || (result && flags & IDXD_OP_FLAG_BOF && dsa->wq[slot->wq].bof))
        return DSA_WAIT;
    if (result) {
        work->failed = true;
        return report(dsa, slot, work, DSA_COMP_CRA_XLAT, true, work->dma.fault_iova);
    }
    return DSA_DONE;
}

static int send_interrupt(struct pv_dsa *dsa, const struct dsa_work *work)
{
    int result = work->vector < 0 ? 0 : pv_msix_fire(dsa->msix, (uint32_t)work->vector);
    /* A message that could not leave because DMA is cancelled leaves later. */
    bool cancelled = result == -EFAULT && atomic_load_explicit(&dsa->bus->cancel, memory_order_acquire);
    return cancelled ? DSA_WAIT : DSA_DONE;
}

static void page_fault(struct dsa_work *work)
{
    bool write = work->dma.perm == PV_DMA_WRITE;
    work->record.status = DSA_COMP_PAGE_FAULT_NOBOF | (write ? DSA_COMP_STATUS_WRITE : 0);
    work->record.bytes_completed = (uint32_t)work->done;
    work->record.fault_addr = work->dma.fault_iova;
}

int dsa_work_advance(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    if (work->phase == DSA_PHASE_RUN) {
        int result = work->op->run(dsa, slot, work);
        if (result == -ECANCELED || (result == -EFAULT && dsa_flags(&work->desc) & IDXD_OP_FLAG_BOF))
            return DSA_WAIT;
        if (result == -EFAULT)
            page_fault(work);
        else if (result != DSA_DONE)
            return result;
        else if (!work->record.status)
            work->record.status = DSA_COMP_SUCCESS;
        work->phase = DSA_PHASE_RECORD;
    }
    if (work->phase == DSA_PHASE_RECORD) {
        if (write_record(dsa, slot, work) == DSA_WAIT)
            return DSA_WAIT;
        work->phase = DSA_PHASE_INTERRUPT;
    }
    return send_interrupt(dsa, work);
}
