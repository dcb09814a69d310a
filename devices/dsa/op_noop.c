/*
 * NOOP and DRAIN (Intel DSA 1.2 8.3.1, 8.3.3).
 *
 * A drain is done when every descriptor submitted to its WQ before it is. Its readbacks are reads whose data nobody
 * sees; writes need none here, they are in memory when an operation ends.
 */
#include <errno.h>

#include "dsa_private.h"

#define ALL UINT64_MAX
#define XFER_AND_ABOVE 0x00000000ffffffff /* word 4: the transfer size */

static int run_noop(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    (void)dsa;
    (void)slot;
    (void)work;
    return DSA_DONE;
}

const struct dsa_op dsa_op_noop = {
    .flags = IDXD_OP_FLAG_FENCE,
    .reserved = {ALL, ALL, XFER_AND_ABOVE, ALL, ALL, ALL},
    .run = run_noop,
};

static bool earlier_in_hand(struct pv_dsa *dsa, const struct dsa_slot *slot)
{
    uint64_t own = atomic_load_explicit(&slot->sequence, memory_order_relaxed);
    for (uint32_t i = 0; i < dsa->config.engines; i++) {
        uint64_t other = atomic_load_explicit(&dsa->slot[i].sequence, memory_order_relaxed);
        if (other < own && dsa->slot[i].wq == slot->wq)
            return true;
    }
    return false;
}

static int read_back(struct pv_dsa *dsa, struct dsa_work *work, uint64_t address)
{
    uint8_t byte;
    int result = pv_bus_read(dsa->bus, address, &byte, 1, &work->dma);
    if (result != -EFAULT)
        return result;
    work->record.status = DSA_COMP_PFAULT_RDBA;
    work->record.fault_addr = address;
    return 0;
}

static int run_drain(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work)
{
    uint32_t flags = dsa_flags(&work->desc);
    int result = 0;
    if (earlier_in_hand(dsa, slot))
        return DSA_WAIT;
    if (flags & DSA_DRAIN_FLAG_READBACK1_VALID)
        result = read_back(dsa, work, work->desc.rdback_addr);
    if (!result && !work->record.status && flags & DSA_DRAIN_FLAG_READBACK2_VALID)
        result = read_back(dsa, work, work->desc.rdback_addr2);
    return result ? result : DSA_DONE;
}

static uint8_t check_drain(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc)
{
    (void)wq;
    bool readback = dsa->config.gencap & IDXD_GENCAP_DRAIN_READBACK;
    return !readback && (desc->rdback_addr || desc->rdback_addr2) ? DSA_COMP_NOZERO_RESERVE : 0;
}

#define READBACK_FLAGS                                                                                  \
    (DSA_DRAIN_FLAG_READBACK1_VALID | DSA_DRAIN_FLAG_READBACK2_VALID | DSA_DRAIN_FLAG_SUPPRESS_TC_A | \
     DSA_DRAIN_FLAG_SUPPRESS_TC_B)

const struct dsa_op dsa_op_drain = {
    .flags = IDXD_OP_FLAG_ADDR1_TCS | IDXD_OP_FLAG_ADDR2_TCS | READBACK_FLAGS,
    .optional = READBACK_FLAGS,
    .needs = IDXD_GENCAP_DRAIN_READBACK,
    .alone = true,
    .reserved = {0, 0, XFER_AND_ABOVE, ALL, ALL, ALL},
    .check = check_drain,
    .run = run_drain,
};
