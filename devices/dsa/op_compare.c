/*
 * Compare (Intel DSA 1.2 8.3.6): Result 0 equal, 1 different, and then the offset of the first difference as the bytes
 * completed. With Check Result, another result than the expected one is success with a false predicate.
 */
#include "dsa_private.h"

#define EXPECTED_RESULT 0x1 /* the bit of Expected Result a comparison can have */

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    int result = pv_bus_compare(dsa->bus, desc->src_addr + work->done, desc->src2_addr + work->done, dsa_chunk(work),
                                &work->dma);
    if (result == 1) {
        work->record.result = 1;
        work->record.bytes_completed = (uint32_t)(work->done + work->dma.done);
        result = DSA_DONE;
    } else {
        result = dsa_account(work, result);
    }
    if (result == DSA_DONE && dsa_flags(desc) & IDXD_OP_FLAG_CR && work->record.result != desc->expected_res)
        work->record.status = DSA_COMP_SUCCESS_PRED;
    return result;
}

const struct dsa_op dsa_op_compare = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CR | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS,
    .result = true,
    .reserved = {0, 0, 0, ~(uint64_t)EXPECTED_RESULT, UINT64_MAX, UINT64_MAX},
    .check = dsa_check_xfer,
    .run = run,
};
