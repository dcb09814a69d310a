/*
 * CRC Generation, and Copy with CRC Generation (Intel DSA 1.2 8.3.11, 8.3.12).
 *
 * The value is a CRC-32C: seed and result inverted, so that the result of one part is the seed of the next. With bit 17
 * of the flags seed and result are neither inverted nor bit-reversed; with bit 18 each data byte is taken from its high
 * bit to its low. With bit 16 the seed is read from memory, where it is 4-byte aligned.
 */
#include <errno.h>

#include "crc32c.h"
#include "dsa_private.h"

#define CRC_FLAGS (DSA_CRC_FLAG_READ_SEED | DSA_CRC_FLAG_BYPASS_INV_REF | DSA_CRC_FLAG_BYPASS_DATA_REF)

/* Between the value in descriptors and records and the one in the CRC register; its own inverse. */
static uint32_t convert(uint32_t value, uint32_t flags)
{
    return flags & DSA_CRC_FLAG_BYPASS_INV_REF ? dsa_reverse32(value) : ~value;
}

static int seed(struct pv_dsa *dsa, struct dsa_work *work)
{
    uint32_t value = work->desc.crc_seed;
    if (dsa_flags(&work->desc) & DSA_CRC_FLAG_READ_SEED) {
        int result = pv_bus_read(dsa->bus, work->desc.seed_addr, &value, sizeof(value), &work->dma);
        if (result)
            return result;
    }
    work->crc = convert(value, dsa_flags(&work->desc));
    work->seeded = true;
    return 0;
}

static int add(void *arg, uint8_t *ptr, uint64_t len)
{
    struct dsa_work *work = arg;
    bool mirrored = dsa_flags(&work->desc) & DSA_CRC_FLAG_BYPASS_DATA_REF;
    work->crc = mirrored ? dsa_crc32c_mirrored(work->crc, ptr, len) : dsa_crc32c(work->crc, ptr, len);
    return 0;
}

static int account(struct dsa_work *work, int result)
{
    result = dsa_account(work, result);
    if (result == DSA_DONE)
        work->record.crc_val = convert(work->crc, dsa_flags(&work->desc));
    return result;
}

static int run_crcgen(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    int result = work->seeded ? 0 : seed(dsa, work);
    if (result)
        return result;
    uint64_t src = work->desc.src_addr + work->done;
    return account(work, pv_bus_walk(dsa->bus, src, dsa_chunk(work), PV_DMA_READ, add, work, &work->dma));
}

static uint8_t check_crcgen(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    bool misaligned = dsa_flags(desc) & DSA_CRC_FLAG_READ_SEED && desc->seed_addr % sizeof(uint32_t);
    return !status && misaligned ? DSA_COMP_ADDR_ALIGN : status;
}

const struct dsa_op dsa_op_crcgen = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR3_TCS | CRC_FLAGS,
    .result = true,
    .reserved = {0, UINT64_MAX, 0, 0xffffffff00000000, 0, UINT64_MAX},
    .check = check_crcgen,
    .run = run_crcgen,
};

static uint8_t check_copy(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = check_crcgen(dsa, wq, desc);
    return !status && dsa_overlaps(desc) ? DSA_COMP_OVERLAP_BUFFERS : status;
}

static int run_copy(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    int result = work->seeded ? 0 : seed(dsa, work);
    if (result)
        return result;
    return account(work, pv_bus_copy_walk(dsa->bus, work->desc.dst_addr + work->done, work->desc.src_addr + work->done,
                                          dsa_chunk(work), add, work, &work->dma));
}

const struct dsa_op dsa_op_copy_crc = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS |
             IDXD_OP_FLAG_ADDR3_TCS | IDXD_OP_FLAG_STORD | IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS | CRC_FLAGS,
    .result = true,
    .reserved = {0, 0, 0, 0xffffffff00000000, 0, UINT64_MAX},
    .check = check_copy,
    .run = run_copy,
};
