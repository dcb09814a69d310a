/*
 * Memory Copy with Dualcast: one source, two destinations (Intel DSA 1.2 8.3.10).
 *
 * The destinations share bits 11:0, so that all three ranges come to the same offsets of their pages together; none
 * overlaps another. Bytes count as completed when both destinations have them.
 */
#include "dsa_private.h"

#define IN_PAGE 0xfff

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    uint64_t size = desc->xfer_size;
    if (status)
        return status;
    if ((desc->dst_addr ^ desc->dest2) & IN_PAGE)
        return DSA_COMP_DCAST_ERR;
    bool overlap = dsa_overlaps(desc) || dsa_ranges_overlap(desc->src_addr, size, desc->dest2, size) ||
                   dsa_ranges_overlap(desc->dst_addr, size, desc->dest2, size);
    return overlap ? DSA_COMP_OVERLAP_BUFFERS : 0;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    return dsa_account(work, pv_bus_dualcast(dsa->bus, desc->dst_addr + work->done, desc->dest2 + work->done,
                                             desc->src_addr + work->done, dsa_chunk(work), &work->dma));
}

const struct dsa_op dsa_op_dualcast = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS |
             IDXD_OP_FLAG_ADDR3_TCS | IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS,
    .reserved = {0, 0, 0, 0, UINT64_MAX, UINT64_MAX},
    .check = check,
    .run = run,
};
