/*
 * Apply Delta Record: writes the words of a delta record to where their offsets say (Intel DSA 1.2 8.3.9).
 *
 * Deltas are applied in their order, up to the first that is wrong. Bytes completed count those of the delta record.
 * No page is touched that holds none of the words.
 */
#include <errno.h>
#include <string.h>

#include "dsa_private.h"

#define WORD DSA_DELTA_WORD
#define PAGE 4096u
#define FETCHED 512 /* deltas read at once */

struct record {
    uint32_t count;
    uint8_t delta[FETCHED * DSA_DELTA_SIZE];
};

/* One walk over the destination. */
struct application {
    const struct record *record;
    uint32_t next;  /* delta to apply */
    uint64_t start; /* of the piece, from the destination's begin */
};

static uint32_t offset_at(const struct record *record, uint32_t index)
{
    uint16_t offset;
    memcpy(&offset, record->delta + (uint64_t)index * DSA_DELTA_SIZE, sizeof(offset));
    return offset;
}

/* Writes what lies in this piece. */
static int apply(void *arg, uint8_t *ptr, uint64_t len)
{
    struct application *a = arg;
    const struct record *record = a->record;
    uint64_t start = a->start, end = start + len;
    for (; a->next < record->count; a->next++) {
        const uint8_t *data = record->delta + (uint64_t)a->next * DSA_DELTA_SIZE + sizeof(uint16_t);
        uint64_t at = (uint64_t)offset_at(record, a->next) * WORD;
        if (at >= start && at + WORD <= end) {
            memcpy(ptr + (at - start), data, WORD);
            continue;
        }
        if (at >= end)
            break;
        /* A word whose bytes do not lie together. */
        uint64_t from = at < start ? start : at, to = at + WORD < end ? at + WORD : end;
        memcpy(ptr + (from - start), data + (from - at), to - from);
        if (at + WORD > end)
            break;
    }
    a->start = end;
    return 0;
}

static uint64_t address_at(const struct dsa_hw_desc *desc, const struct record *record, uint32_t index)
{
    return desc->dst_addr + (uint64_t)offset_at(record, index) * WORD;
}

/*
 * The last delta from `first` on whose word goes in the same walk: of those in the same page. Of a remote range a walk
 * writes every byte, so there only words one behind the other go together.
 */
static uint32_t last_of_walk(struct pv_bus *bus, const struct dsa_hw_desc *desc, const struct record *record,
                             uint32_t first)
{
    uint64_t page = address_at(desc, record, first) / PAGE;
    bool close = pv_bus_is_remote(bus);
    uint32_t last = first;
    while (last + 1 < record->count && address_at(desc, record, last + 1) / PAGE == page &&
           (!close || offset_at(record, last + 1) == offset_at(record, last) + 1))
        last++;
    return last;
}

/* Reads the next deltas; keeps those before the first that is wrong, and says how it is wrong. */
static int fetch(struct pv_dsa *dsa, struct record *record, struct dsa_work *work, uint8_t *status)
{
    const struct dsa_hw_desc *desc = &work->desc;
    uint64_t left = desc->delta_rec_size - work->done, size = sizeof(record->delta);
    int result = pv_bus_read(dsa->bus, desc->src_addr + work->done, record->delta, left < size ? left : size,
                             &work->dma);
    uint32_t count = (uint32_t)(work->dma.done / DSA_DELTA_SIZE), least = work->offset;
    *status = 0;
    for (record->count = 0; record->count < count; record->count++) {
        uint32_t offset = offset_at(record, record->count);
        if (offset < least)
            *status = DSA_COMP_DR_OFFSET_NOINC;
        else if ((uint64_t)offset * WORD >= desc->xfer_size)
            *status = DSA_COMP_DR_OFFSET_ERANGE;
        if (*status)
            return 0;
        least = offset + 1;
    }
    return result;
}

static int apply_all(struct pv_dsa *dsa, const struct record *record, struct dsa_work *work)
{
    const struct dsa_hw_desc *desc = &work->desc;
    struct application a = {.record = record};
    struct pv_dma dma;
    int result = 0;
    while (!result && a.next < record->count) {
        uint32_t first = a.next, last = last_of_walk(dsa->bus, desc, record, first);
        uint64_t begin = address_at(desc, record, first), bytes = address_at(desc, record, last) + WORD - begin;
        a.start = begin - desc->dst_addr;
        result = pv_bus_walk(dsa->bus, begin, bytes, PV_DMA_WRITE, apply, &a, &dma);
        work->done += (uint64_t)(a.next - first) * DSA_DELTA_SIZE;
        if (a.next > first)
            work->offset = offset_at(record, a.next - 1) + 1;
        /* A translation may end inside a page: what lies between the words need not be there. */
        if (result == -EFAULT && a.next > first && dma.fault_iova < address_at(desc, record, a.next))
            result = 0;
    }
    if (result)
        work->dma = dma;
    return result;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    struct record record;
    uint8_t status;
    int fetched = fetch(dsa, &record, work, &status);
    int result = apply_all(dsa, &record, work);
    if (!result)
        result = fetched;
    if (result)
        return result;
    work->record.bytes_completed = (uint32_t)work->done;
    work->record.status = status;
    return status || work->done == work->desc.delta_rec_size ? DSA_DONE : DSA_MORE;
}

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_delta(dsa, wq, desc, desc->dst_addr);
    if (status)
        return status;
    if (!desc->delta_rec_size || desc->delta_rec_size % DSA_DELTA_SIZE)
        return DSA_COMP_DR_ERANGE;
    bool overlap = dsa_ranges_overlap(desc->src_addr, desc->delta_rec_size, desc->dst_addr, desc->xfer_size);
    return overlap ? DSA_COMP_OVERLAP_BUFFERS : 0;
}

const struct dsa_op dsa_op_ap_delta = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS |
             IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS,
    .reserved = {0, 0, 0, 0xffffffff00000000, UINT64_MAX, UINT64_MAX},
    .check = check,
    .run = run,
};
