/*
 * Create Delta Record: where two ranges differ, word by word of 8 bytes (Intel DSA 1.2 8.3.8).
 *
 * The record holds the second source's words, ten bytes each, in increasing order. Result 0: the ranges are equal; 1:
 * the record holds every difference; 2: it has no room for the next, and the bytes completed are those before it. After
 * a page fault too, the record is that of the bytes completed: a driver goes on behind both.
 *
 * Differences are gathered while the sources are read, and written between: a section reads or it writes.
 */
#include <errno.h>
#include <string.h>

#include "dsa_private.h"

#define RESULTS 0x7 /* the bits of Expected Result Mask: one for each Result */
#define WORD DSA_DELTA_WORD
#define GATHERED 512 /* deltas between two writes */
#define BLOCK 16     /* words looked at together */

/* What reading the sources ends with before their end, above what the bus answers. */
enum { FULL = 1, SPLIT };

struct gathering {
    uint32_t count, limit;
    uint32_t base; /* offset of the first word of this reading */
    uint8_t delta[(GATHERED + BLOCK) * DSA_DELTA_SIZE]; /* more than `limit`: a block stores before it knows */
};

static void put(struct gathering *g, uint64_t offset, uint64_t data)
{
    uint8_t *at = g->delta + (uint64_t)g->count * DSA_DELTA_SIZE;
    uint16_t short_offset = (uint16_t)offset;
    memcpy(at, &short_offset, sizeof(short_offset));
    memcpy(at + sizeof(short_offset), &data, sizeof(data));
}

static uint32_t offset_at(const struct gathering *g, uint32_t index)
{
    uint16_t offset;
    memcpy(&offset, g->delta + (uint64_t)index * DSA_DELTA_SIZE, sizeof(offset));
    return offset;
}

static bool blocks_equal(const uint8_t *a, const uint8_t *b)
{
    uint64_t difference = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint64_t x, y;
        memcpy(&x, a + i * WORD, WORD);
        memcpy(&y, b + i * WORD, WORD);
        difference |= x ^ y;
    }
    return !difference;
}

/* Gathers from whole words; how many it took. */
static uint64_t gather(struct gathering *g, const uint8_t *first, const uint8_t *second, uint64_t words,
                       uint64_t offset)
{
    uint64_t at = 0, x, y;
    while (at < words) {
        uint64_t block = words - at < BLOCK ? words - at : BLOCK;
        if (block == BLOCK && blocks_equal(first + at * WORD, second + at * WORD)) {
            at += BLOCK;
            continue;
        }
        bool room = g->limit - g->count >= block;
        for (uint64_t end = at + block; at < end; at++) {
            memcpy(&x, first + at * WORD, WORD);
            memcpy(&y, second + at * WORD, WORD);
            if (!room && x != y && g->count == g->limit)
                return at;
            put(g, offset + at, y);
            g->count += x != y;
        }
    }
    return at;
}

static int compare(void *arg, uint8_t *second, const uint8_t *first, uint64_t len, struct pv_dma *dma)
{
    struct gathering *g = arg;
    uint64_t words = len / WORD, taken = gather(g, first, second, words, g->base + dma->done / WORD);
    if (taken == words && words * WORD == len)
        return 0;
    dma->done += taken * WORD;
    return taken < words ? FULL : SPLIT;
}

/* One word whose bytes do not lie together: read apart. */
static int compare_split(struct pv_dsa *dsa, struct gathering *g, struct dsa_work *work)
{
    const struct dsa_hw_desc *desc = &work->desc;
    uint64_t first, second;
    int result = pv_bus_read(dsa->bus, desc->src_addr + work->done, &first, WORD, &work->dma);
    if (!result)
        result = pv_bus_read(dsa->bus, desc->src2_addr + work->done, &second, WORD, &work->dma);
    if (result)
        return result;
    if (first != second && g->count == g->limit)
        return FULL;
    put(g, work->done / WORD, second);
    g->count += first != second;
    work->done += WORD;
    return 0;
}

/* Writes what was gathered. Where that fails, it goes back to the first difference that is not in the record. */
static int flush(struct pv_dsa *dsa, const struct gathering *g, struct dsa_work *work)
{
    struct pv_dma dma;
    uint32_t *size = &work->record.delta_rec_size;
    int result = pv_bus_write(dsa->bus, work->desc.delta_addr + *size, g->delta, (uint64_t)g->count * DSA_DELTA_SIZE,
                              &dma);
    uint32_t written = (uint32_t)(dma.done / DSA_DELTA_SIZE);
    *size += written * DSA_DELTA_SIZE;
    if (result) {
        work->done = (uint64_t)offset_at(g, written) * WORD;
        work->dma = dma;
    }
    return result;
}

static int end(struct dsa_work *work, bool overflow)
{
    const struct dsa_hw_desc *desc = &work->desc;
    work->record.result = overflow ? 2 : work->record.delta_rec_size != 0;
    work->record.bytes_completed = (uint32_t)work->done;
    if (dsa_flags(desc) & IDXD_OP_FLAG_CR && !(desc->expected_res_mask >> work->record.result & 1))
        work->record.status = DSA_COMP_SUCCESS_PRED;
    return DSA_DONE;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    struct gathering g;
    uint32_t room = (desc->max_delta_size - work->record.delta_rec_size) / DSA_DELTA_SIZE;
    g.count = 0;
    g.limit = room < GATHERED ? room : GATHERED;
    g.base = (uint32_t)(work->done / WORD);
    int result = pv_bus_pair_walk(dsa->bus, desc->src2_addr + work->done, desc->src_addr + work->done,
                                  desc->xfer_size - work->done, compare, &g, &work->dma);
    work->done += work->dma.done / WORD * WORD;
    if (result == SPLIT)
        result = compare_split(dsa, &g, work);
    int written = flush(dsa, &g, work);
    if (written)
        return written;
    if (result < 0)
        return result;
    if (result == FULL && g.limit == room)
        return end(work, true);
    return work->done < desc->xfer_size ? DSA_MORE : end(work, false);
}

uint8_t dsa_check_delta(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc,
                        uint64_t addresses)
{
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    if (!status && desc->xfer_size > DSA_DELTA_MAX_XFER)
        status = DSA_COMP_XFER_ERANGE;
    return !status && (desc->xfer_size | addresses) % WORD ? DSA_COMP_ADDR_ALIGN : status;
}

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_delta(dsa, wq, desc, desc->src_addr | desc->src2_addr);
    if (status)
        return status;
    uint32_t size = desc->max_delta_size;
    if (size < DSA_DELTA_MIN_RECORD || size % DSA_DELTA_SIZE)
        return DSA_COMP_DR_ERANGE;
    if (dsa_ranges_overlap(desc->src_addr, desc->xfer_size, desc->delta_addr, size) ||
        dsa_ranges_overlap(desc->src2_addr, desc->xfer_size, desc->delta_addr, size))
        return DSA_COMP_OVERLAP_BUFFERS;
    return 0;
}

const struct dsa_op dsa_op_cr_delta = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CR | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS |
             IDXD_OP_FLAG_ADDR2_TCS | IDXD_OP_FLAG_ADDR3_TCS | IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK |
             IDXD_OP_FLAG_DSTS,
    .result = true,
    .reserved = {0, 0, 0, 0, 0xffffffff00000000, ~(uint64_t)RESULTS},
    .check = check,
    .run = run,
};
