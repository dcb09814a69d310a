/*
 * Memory Move (Intel DSA 1.2 8.3.4).
 *
 * Buffers may overlap where GENCAP says so: the copy then runs from the end if it must, and a partial completion
 * counts from there, with Result 1.
 */
#include <errno.h>

#include "dsa_private.h"

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    if (!status && !(dsa->config.gencap & IDXD_GENCAP_OVERLAP_COPY) && dsa_overlaps(desc))
        status = DSA_COMP_OVERLAP_BUFFERS;
    return status;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    uint64_t n = dsa_chunk(work);
    if (desc->dst_addr > desc->src_addr && desc->dst_addr - desc->src_addr < desc->xfer_size) {
        uint64_t at = desc->xfer_size - work->done - n;
        int result = dsa_account(
            work, pv_bus_move_backward(dsa->bus, desc->dst_addr + at, desc->src_addr + at, n, &work->dma));
        work->record.result = result == -EFAULT;
        return result;
    }
    return dsa_account(
        work, pv_bus_move(dsa->bus, desc->dst_addr + work->done, desc->src_addr + work->done, n, &work->dma));
}

const struct dsa_op dsa_op_memmove = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS |
             IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS,
    .reserved = {0, 0, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX},
    .check = check,
    .run = run,
};
