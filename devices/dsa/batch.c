/*
 * Batch: descriptors in memory, fetched in pieces and run in order (Intel DSA 1.2 8.3.2).
 *
 * A member that fails does not end the batch; a fence after it does: the rest is abandoned. The batch says 0x05 then,
 * 0x06 when its list could not be read, and counts the members that were done. Hardware may run members side by
 * side; here one ends before the next begins.
 */
#include <errno.h>

#include "dsa_private.h"

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    (void)dsa;
    if (desc->desc_count < 2 || desc->desc_count > wq->max_batch)
        return DSA_COMP_DESC_CNT_ERANGE;
    return desc->desc_list_addr % DSA_DESC_SIZE ? DSA_COMP_DESCLIST_ALIGN : 0;
}

/* Makes sure that the next member is among the fetched ones; 0, -EFAULT or -ECANCELED. */
static int fetch(struct pv_dsa *dsa, struct dsa_batch *batch, struct dsa_work *work)
{
    if (batch->next - batch->first < batch->count)
        return 0;
    uint32_t left = work->desc.desc_count - batch->next;
    uint32_t count = left < DSA_BATCH_FETCH ? left : DSA_BATCH_FETCH;
    uint64_t address = work->desc.desc_list_addr + (uint64_t)batch->next * DSA_DESC_SIZE;
    int result = pv_bus_read(dsa->bus, address, batch->fetched, (uint64_t)count * DSA_DESC_SIZE, &work->dma);
    if (result == -EFAULT && work->dma.done >= DSA_DESC_SIZE) {
        count = (uint32_t)(work->dma.done / DSA_DESC_SIZE);
        result = 0;
    }
    if (!result) {
        batch->first = batch->next;
        batch->count = count;
    }
    return result;
}

static int end(const struct dsa_batch *batch, struct dsa_work *work, uint8_t status)
{
    work->record.status = status;
    work->record.descs_completed = batch->next;
    return DSA_DONE;
}

static int list_fault(const struct dsa_batch *batch, struct dsa_work *work)
{
    if (dsa_flags(&work->desc) & IDXD_OP_FLAG_BOF)
        return DSA_WAIT;
    work->record.fault_addr = work->dma.fault_iova;
    return end(batch, work, DSA_COMP_BATCH_PAGE_FAULT);
}

/* The next member in hand: DSA_DONE, DSA_STOPPED before it, or the end of the batch as in `run` (`*ended`). */
static int begin_member(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work, bool *ended)
{
    struct dsa_batch *batch = &slot->batch;
    int result = fetch(dsa, batch, work);
    *ended = true;
    if (result == -EFAULT)
        return list_fault(batch, work);
    if (result)
        return result;
    const struct dsa_hw_desc *desc = &batch->fetched[batch->next - batch->first];
    if (batch->failed && dsa_flags(desc) & IDXD_OP_FLAG_FENCE)
        return end(batch, work, DSA_COMP_BATCH_FAIL);
    if (!pv_engine_gate(dsa->engine))
        return DSA_STOPPED;
    dsa_work_begin(dsa, slot, &batch->member, desc);
    batch->member.batch_index = (uint16_t)batch->next;
    batch->running = true;
    *ended = false;
    return DSA_DONE;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    struct dsa_batch *batch = &slot->batch;
    bool ended;
    if (!work->seeded) {
        batch->next = batch->first = batch->count = 0;
        batch->running = batch->failed = batch->logged = false;
        work->seeded = true;
    }
    for (uint32_t turn = 0; turn < DSA_BATCH_TURN && batch->next < work->desc.desc_count; turn++) {
        int result = DSA_DONE;
        if (!batch->running) {
            result = begin_member(dsa, slot, work, &ended);
            if (ended)
                return result;
        }
        result = dsa_work_advance(dsa, slot, &batch->member);
        if (result != DSA_DONE)
            return result;
        batch->failed |= batch->member.failed;
        batch->running = false;
        batch->next++;
        if (pv_engine_pausing(dsa->engine))
            break;
    }
    if (batch->next < work->desc.desc_count)
        return DSA_MORE;
    return end(batch, work, batch->failed ? DSA_COMP_BATCH_FAIL : 0);
}

const struct dsa_op dsa_op_batch = {
    .flags = IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_ADDR1_TCS,
    .alone = true,
    .reserved = {0, UINT64_MAX, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX},
    .check = check,
    .run = run,
};
