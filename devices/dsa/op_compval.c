/*
 * Compare Immediate: memory against an 8-byte pattern, repeated (Intel DSA 1.2 8.3.7).
 *
 * Result 0 equal, 1 different, and then the offset of the first different byte as the bytes completed. The last
 * repetition may be cut short. Check Result is Compare's.
 */
#include <string.h>

#include "dsa_private.h"

#define EXPECTED_RESULT 0x1
#define DIFFERENT 1 /* what the walk ends with */

struct comparison {
    uint64_t pattern; /* turned to where the next piece begins */
    uint64_t same;    /* bytes of the last piece, where it differs */
};

static uint64_t turned(uint64_t pattern, uint64_t bytes)
{
    unsigned bits = bytes % 8 * 8;
    return bits ? pattern >> bits | pattern << (64 - bits) : pattern;
}

/* The first byte that is not the pattern's, `len`: none. */
static uint64_t first_difference(const uint8_t *ptr, uint64_t len, uint64_t pattern)
{
    uint64_t at = 0, word;
    for (; at + 8 <= len; at += 8) {
        memcpy(&word, ptr + at, 8);
        if (word != pattern)
            return at + (uint64_t)__builtin_ctzll(word ^ pattern) / 8;
    }
    for (; at < len; at++)
        if (ptr[at] != (uint8_t)(pattern >> at % 8 * 8))
            break;
    return at;
}

static int compare(void *arg, uint8_t *ptr, uint64_t len)
{
    struct comparison *c = arg;
    /* A repetition of its first eight bytes is equal to itself eight bytes on: the library's compare is the fastest. */
    if (len >= 64 && !memcmp(ptr, &c->pattern, 8) && !memcmp(ptr, ptr + 8, len - 8)) {
        c->pattern = turned(c->pattern, len);
        return 0;
    }
    c->same = first_difference(ptr, len, c->pattern);
    c->pattern = turned(c->pattern, len);
    return c->same < len ? DIFFERENT : 0;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    struct comparison c = {turned(desc->comp_pattern, work->done), 0};
    int result = pv_bus_walk(dsa->bus, desc->src_addr + work->done, dsa_chunk(work), PV_DMA_READ, compare, &c,
                             &work->dma);
    if (result == DIFFERENT) {
        work->record.result = 1;
        work->record.bytes_completed = (uint32_t)(work->done + work->dma.done + c.same);
        result = DSA_DONE;
    } else {
        result = dsa_account(work, result);
    }
    if (result == DSA_DONE && dsa_flags(desc) & IDXD_OP_FLAG_CR && work->record.result != desc->expected_res)
        work->record.status = DSA_COMP_SUCCESS_PRED;
    return result;
}

const struct dsa_op dsa_op_compval = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CR | IDXD_OP_FLAG_ADDR1_TCS,
    .result = true,
    .reserved = {0, 0, 0, ~(uint64_t)EXPECTED_RESULT, UINT64_MAX, UINT64_MAX},
    .check = dsa_check_xfer,
    .run = run,
};
