/*
 * Memory Fill: an 8-byte pattern, repeated (Intel DSA 1.2 8.3.5). The last repetition may be cut short.
 */
#include "dsa_private.h"

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    unsigned phase = work->done % 8 * 8;
    uint64_t pattern = work->desc.pattern;
    if (phase) /* goes on in the middle of a repetition */
        pattern = pattern >> phase | pattern << (64 - phase);
    uint64_t dst = work->desc.dst_addr + work->done;
    return dsa_account(work, pv_bus_fill(dsa->bus, dst, &pattern, dsa_chunk(work), &work->dma));
}

const struct dsa_op dsa_op_memfill = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR2_TCS | IDXD_OP_FLAG_STORD |
             IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS,
    .reserved = {0, 0, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX},
    .check = dsa_check_xfer,
    .run = run,
};
