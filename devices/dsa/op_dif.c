/*
 * DIF Check, Insert, Strip, Update, and DIX Generate (Intel DSA 1.2 8.3.13 to 8.3.17).
 *
 * Blocks are done one after the other and count when they are done whole: bytes completed are those of whole blocks of
 * the source, and the tags in the record are the next block's, so that what is left can be submitted with them. A block
 * that fails its check ends the operation with status 0x09 and is not written.
 *
 * Not modelled: hardware takes the destination of a strip for as long as its source when it looks for overlaps.
 */
#include <errno.h>
#include <string.h>

#include "dif.h"
#include "dsa_private.h"

#define BUFFER_SIZE (4 * (DSA_DIF_BLOCK_MAX + DSA_DIF_SIZE))

static bool overlap(const struct dsa_hw_desc *desc, uint64_t src_size, uint64_t dst_size)
{
    return desc->dst_addr - desc->src_addr < src_size || desc->src_addr - desc->dst_addr < dst_size;
}

static uint8_t check(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    struct dsa_dif dif = dsa_dif_of(desc);
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    if (!status && desc->xfer_size % dif.from)
        status = DSA_COMP_XFER_ERANGE;
    if (!status && dif.to && overlap(desc, desc->xfer_size, (uint64_t)desc->xfer_size / dif.from * dif.to))
        status = DSA_COMP_OVERLAP_BUFFERS;
    return status;
}

/* How many of the `count` blocks in the buffer are good, and what is wrong with the next one. */
static uint64_t check_blocks(const struct dsa_dif *dif, const uint8_t *buffer, uint64_t first, uint64_t count,
                             uint8_t *status)
{
    *status = 0;
    for (uint64_t i = 0; dif->checks && i < count; i++) {
        const uint8_t *data = buffer + i * dif->from;
        *status = dsa_dif_check(dif, data, data + dif->block, first + i);
        if (*status)
            return i;
    }
    return count;
}

/* From blocks as the source has them to blocks as the destination wants them, in place. */
static void convert(const struct dsa_dif *dif, uint8_t *buffer, uint64_t first, uint64_t count)
{
    bool grows = dif->to > dif->from;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t block = grows ? count - 1 - i : i; /* so that none is overwritten before its turn */
        const uint8_t *from = buffer + block * dif->from;
        uint8_t *to = buffer + block * dif->to;
        if (dif->to < dif->block) {
            dsa_dif_write(dif, from, to, first + block);
            continue;
        }
        if (dif->to != dif->from)
            memmove(to, from, dif->block);
        if (dif->writes)
            dsa_dif_write(dif, to, to + dif->block, first + block);
    }
}

/* A bufferful. What cannot be read is reported once what comes before it is done. */
static int run_some(struct pv_dsa *dsa, struct dsa_work *work, const struct dsa_dif *dif, uint8_t *buffer)
{
    const struct dsa_hw_desc *desc = &work->desc;
    uint64_t first = work->done / dif->from, left = desc->xfer_size / dif->from - first;
    uint64_t most = BUFFER_SIZE / (dif->from > dif->to ? dif->from : dif->to);
    uint64_t count = left < most ? left : most;
    uint8_t status;
    int result = pv_bus_read(dsa->bus, desc->src_addr + work->done, buffer, count * dif->from, &work->dma);
    struct pv_dma read = work->dma;
    count = check_blocks(dif, buffer, first, read.done / dif->from, &status);
    convert(dif, buffer, first, dif->to ? count : 0);
    int written = pv_bus_write(dsa->bus, desc->dst_addr + first * dif->to, buffer, count * dif->to, &work->dma);
    if (written)
        count = work->dma.done / dif->to;
    else
        work->dma = read;
    work->done += count * dif->from;
    dsa_dif_report(dif, first + count, &work->record);
    if (written || (result && !status))
        return written ? written : result;
    if (!status && work->done < desc->xfer_size)
        return DSA_MORE;
    work->record.bytes_completed = (uint32_t)work->done;
    if (status) {
        work->record.status = DSA_COMP_DIF_ERR;
        work->record.dif_status = status;
    }
    return DSA_DONE;
}

static int run(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    struct dsa_dif dif = dsa_dif_of(&work->desc);
    uint64_t turn = work->done + DSA_CHUNK;
    uint8_t buffer[BUFFER_SIZE];
    int result;
    (void)slot;
    do
        result = run_some(dsa, work, &dif, buffer);
    while (result == DSA_MORE && work->done < turn);
    return result;
}

#define READ_FLAGS (IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_ADDR1_TCS)
#define WRITE_FLAGS \
    (IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR2_TCS | IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS)
/* Bits of word 5: source, destination and DIF flags in bytes 0 to 2. */
#define CHECK_RESERVED 0xfffffffffff0ff00
#define INSERT_RESERVED 0xfffffffffff06fff
#define UPDATE_RESERVED 0xfffffffffff00700

const struct dsa_op dsa_op_dif_check = {
    .flags = READ_FLAGS,
    .reserved = {0, UINT64_MAX, 0, CHECK_RESERVED, 0, UINT64_MAX},
    .check = check,
    .run = run,
};

const struct dsa_op dsa_op_dif_ins = {
    .flags = READ_FLAGS | WRITE_FLAGS,
    .reserved = {0, 0, 0, INSERT_RESERVED, UINT64_MAX, 0},
    .check = check,
    .run = run,
};

const struct dsa_op dsa_op_dif_strp = {
    .flags = READ_FLAGS | WRITE_FLAGS,
    .reserved = {0, 0, 0, CHECK_RESERVED, 0, UINT64_MAX},
    .check = check,
    .run = run,
};

const struct dsa_op dsa_op_dif_updt = {
    .flags = READ_FLAGS | WRITE_FLAGS,
    .reserved = {0, 0, 0, UPDATE_RESERVED, 0, 0},
    .check = check,
    .run = run,
};

const struct dsa_op dsa_op_dix_gen = {
    .flags = READ_FLAGS | WRITE_FLAGS,
    .reserved = {0, 0, 0, INSERT_RESERVED, UINT64_MAX, 0},
    .check = check,
    .run = run,
};
