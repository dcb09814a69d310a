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
#define BUFFER_BLOCKS (BUFFER_SIZE / 512)

/* Blocks on their way: as the source has them, and the fields the destination gets. */
struct blocks {
    struct dsa_dif dif;
    uint64_t first, count; /* number of the first one; how many */
    uint64_t block, at;    /* where the destination is written: the block, and the byte in it */
    uint8_t field[BUFFER_BLOCKS][DSA_DIF_SIZE];
    uint8_t source[BUFFER_SIZE];
};

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

/* Checks and makes fields, up to the first block that is not good: its DIF status. */
static uint8_t examine(struct blocks *b)
{
    const struct dsa_dif *dif = &b->dif;
    for (uint64_t i = 0; i < b->count; i++) {
        const uint8_t *data = b->source + i * dif->from;
        bool guarded = false;
        uint8_t status = dif->checks ? dsa_dif_check(dif, data, data + dif->block, b->first + i, &guarded) : 0;
        if (status) {
            b->count = i;
            return status;
        }
        if (dif->writes && dif->checks)
            memcpy(b->field[i], data + dif->block, DSA_DIF_SIZE);
        if (dif->writes)
            dsa_dif_write(dif, data, b->field[i], b->first + i, guarded);
    }
    return 0;
}

/* The next bytes of the destination: data and fields by turns. */
static int put(void *arg, uint8_t *ptr, uint64_t len)
{
    struct blocks *b = arg;
    uint64_t data = b->dif.to - (b->dif.writes ? DSA_DIF_SIZE : 0);
    while (len) {
        bool in_data = b->at < data;
        uint64_t left = (in_data ? data : b->dif.to) - b->at, now = left < len ? left : len;
        memcpy(ptr, in_data ? b->source + b->block * b->dif.from + b->at : b->field[b->block] + b->at - data, now);
        ptr += now;
        len -= now;
        b->at += now;
        if (b->at == b->dif.to) {
            b->at = 0;
            b->block++;
        }
    }
    return 0;
}

/* A bufferful. What cannot be read is reported once what comes before it is done. */
static int run_some(struct pv_dsa *dsa, struct dsa_work *work, struct blocks *b)
{
    const struct dsa_hw_desc *desc = &work->desc;
    uint64_t from = b->dif.from, to = b->dif.to;
    b->first = work->done / from;
    b->count = desc->xfer_size / from - b->first;
    if (b->count > BUFFER_SIZE / from)
        b->count = BUFFER_SIZE / from;
    int result = pv_bus_read(dsa->bus, desc->src_addr + work->done, b->source, b->count * from, &work->dma);
    struct pv_dma read = work->dma;
    b->count = read.done / from;
    uint8_t status = examine(b);
    b->block = b->at = 0;
    uint64_t dst = desc->dst_addr + b->first * to;
    int written = pv_bus_walk(dsa->bus, dst, b->count * to, PV_DMA_WRITE, put, b, &work->dma);
    if (written)
        b->count = work->dma.done / to;
    else
        work->dma = read;
    work->done += b->count * from;
    dsa_dif_report(&b->dif, b->first + b->count, &work->record);
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
    struct blocks blocks;
    uint64_t turn = work->done + DSA_CHUNK;
    int result;
    (void)slot;
    blocks.dif = dsa_dif_of(&work->desc);
    do
        result = run_some(dsa, work, &blocks);
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
