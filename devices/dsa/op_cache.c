/*
 * Translation Fetch and Cache Flush: operations that move no data.
 *
 * Translation Fetch asks for the translation of every page of a region, or of an address every `region_stride` bytes
 * (<linux/idxd.h> of Linux 6.3: transl_fetch_addr, region_size, region_stride). The translations are then in the IOTLB.
 * Cache Flush writes a range's cache lines back (Intel DSA 1.2 8.3.17); with Cache Control it also invalidates
 * them. Memory here is coherent, so what is left of both is that each page must translate, for reading.
 */
#include <errno.h>

#include "dsa_private.h"

#define PAGE 4096u
#define FETCHES 4096u /* translations in one turn */

static int nothing(void *arg, uint8_t *ptr, uint64_t len)
{
    (void)arg;
    (void)ptr;
    (void)len;
    return 0;
}

static uint8_t check_fetch(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    uint8_t status = dsa_check_xfer(dsa, wq, desc);
    bool strided = dsa_flags(desc) & DSA_TRANSL_FETCH_FLAG_STRIDE;
    return !status && strided && !desc->region_stride ? DSA_COMP_XFER_ERANGE : status;
}

/* From the address at `done` to the next one to ask for. */
static uint64_t step(const struct dsa_hw_desc *desc, uint64_t done)
{
    if (dsa_flags(desc) & DSA_TRANSL_FETCH_FLAG_STRIDE)
        return desc->region_stride;
    return PAGE - (desc->src_addr + done) % PAGE;
}

static int run_fetch(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    const struct dsa_hw_desc *desc = &work->desc;
    for (uint32_t i = 0; i < FETCHES; i++) {
        int result = pv_bus_walk(dsa->bus, desc->src_addr + work->done, 1, PV_DMA_READ, nothing, NULL, &work->dma);
        if (result)
            return result;
        work->done += step(desc, work->done);
        if (work->done >= desc->region_size) {
            work->record.bytes_completed = desc->region_size;
            return DSA_DONE;
        }
    }
    return DSA_MORE;
}

const struct dsa_op dsa_op_transl_fetch = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR1_TCS |
             DSA_TRANSL_FETCH_FLAG_STRIDE,
    .reserved = {0, UINT64_MAX, 0, UINT64_MAX, 0xffffffff00000000, UINT64_MAX},
    .check = check_fetch,
    .run = run_fetch,
};

static int run_flush(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)slot;
    uint64_t dst = work->desc.dst_addr + work->done;
    return dsa_account(work, pv_bus_walk(dsa->bus, dst, dsa_chunk(work), PV_DMA_READ, nothing, NULL, &work->dma));
}

const struct dsa_op dsa_op_cflush = {
    .flags = IDXD_OP_FLAG_FENCE | IDXD_OP_FLAG_BOF | IDXD_OP_FLAG_CC | IDXD_OP_FLAG_ADDR2_TCS | IDXD_OP_FLAG_STORD |
             IDXD_OP_FLAG_DRDBK | IDXD_OP_FLAG_DSTS,
    .optional = IDXD_OP_FLAG_CC,
    .needs = IDXD_GENCAP_CACHE_CONTROL_CACHE,
    .reserved = {UINT64_MAX, 0, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX},
    .check = dsa_check_xfer,
    .run = run_flush,
};
