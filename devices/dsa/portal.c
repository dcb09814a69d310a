/*
 * Portals: how 64-byte submissions reach the work queues (Intel DSA 1.2 chapter 3).
 *
 * Four pages a WQ: unlimited, limited, and their twins for interrupt message storage. A posted write (MOVDIR64B) is for
 * dedicated WQs and is dropped with a software error when it cannot be taken; a non-posted one (ENQCMD) is for shared
 * WQs and says retry. A limited portal takes work only below the WQ's threshold. Eight ascending 8-byte stores to one
 * 64-byte slot are a posted write too. Portals read as ones.
 *
 * Not modelled: portals of more than one slot width, the PASID that ENQCMD inserts.
 */
#include <errno.h>
#include <string.h>

#include "dsa_private.h"

static void refuse(struct pv_dsa *dsa, uint32_t index, const struct dsa_hw_desc *desc, uint64_t code)
{
    struct dsa_swerr error = {
        .status = IDXD_SWERR_VALID | IDXD_SWERR_WQ_IDX_VALID | IDXD_SWERR_DESC_VALID | code << IDXD_SWERR_ERROR_SHIFT |
                  (uint64_t)index << IDXD_SWERR_WQ_IDX_SHIFT | (uint64_t)dsa_opcode(desc) << IDXD_SWERR_OPERATION_SHIFT,
    };
    dsa_report_swerr(dsa, &error);
}

#define HALTED UINT64_MAX

/* Under the lock: 0, HALTED, or the software error a posted write gives. */
static uint64_t push(struct pv_dsa *dsa, struct dsa_wq *wq, const struct dsa_hw_desc *desc, uint32_t page,
                     bool nonposted)
{
    if (atomic_load_explicit(&dsa->halted, memory_order_relaxed))
        return HALTED;
    if (wq->state != IDXD_WQ_STATE_ENABLED)
        return DSA_SWERR_WQ_NOT_ENABLED;
    if (wq->dedicated == nonposted)
        return DSA_SWERR_WQ_MODE;
    bool limited = !wq->dedicated && (page == IDXD_PORTAL_LIMITED || page == IDXD_PORTAL_IMS_LIMITED);
    uint64_t tail = atomic_load_explicit(&wq->tail, memory_order_relaxed);
    uint64_t used = tail - atomic_load_explicit(&wq->head, memory_order_acquire);
    if (used >= (limited ? wq->threshold : wq->size))
        return DSA_SWERR_WQ_FULL;
    wq->ring[tail % wq->size] = *desc;
    wq->portal[tail % wq->size] = (uint8_t)page;
    atomic_store_explicit(&wq->tail, tail + 1, memory_order_release);
    return 0;
}

static int submit(void *device, uint64_t offset, const void *src64, int nonposted)
{
    struct pv_dsa *dsa = device;
    struct dsa_hw_desc desc;
    uint64_t index = offset / IDXD_WQ_PORTAL_STRIDE;
    if (index >= dsa->config.wqs || !atomic_load_explicit(&dsa->decode, memory_order_relaxed))
        return nonposted ? -EAGAIN : 0;
    struct dsa_wq *wq = &dsa->wq[index];
    memcpy(&desc, src64, sizeof(desc));
    dsa_lock(&wq->lock);
    uint64_t code = push(dsa, wq, &desc, offset / IDXD_PORTAL_SIZE % IDXD_PORTALS_PER_WQ, nonposted);
    dsa_unlock(&wq->lock);
    if (!code)
        return 0;
    if (nonposted)
        return -EAGAIN;
    if (code != HALTED)
        refuse(dsa, (uint32_t)index, &desc, code);
    return 0;
}

static int store(void *device, uint64_t offset, uint32_t size, uint64_t value)
{
    struct pv_dsa *dsa = device;
    if (size != 8)
        return -EINVAL;
    uint64_t index = offset / IDXD_WQ_PORTAL_STRIDE;
    if (index >= dsa->config.wqs || !atomic_load_explicit(&dsa->decode, memory_order_relaxed))
        return 0;
    struct dsa_wq *wq = &dsa->wq[index];
    struct dsa_portal_slot *slot = &wq->slot[offset / DSA_DESC_SIZE % DSA_PORTAL_SLOTS];
    uint16_t page = offset / IDXD_PORTAL_SIZE % IDXD_PORTALS_PER_WQ, word = offset / 8 % 8;
    uint64_t whole[8];
    dsa_lock(&wq->lock);
    if (word == 0)
        slot->page = page;
    bool in_order = word == 0 || (word == slot->next && page == slot->page);
    slot->next = in_order ? (word + 1) % 8 : 0;
    if (in_order)
        slot->word[word] = value;
    bool complete = in_order && word == 7;
    if (complete)
        memcpy(whole, slot->word, sizeof(whole));
    dsa_unlock(&wq->lock);
    return complete ? submit(dsa, offset - 56, whole, 0) : 0;
}

static int load(void *device, uint64_t offset, uint32_t size, uint64_t *value)
{
    (void)device;
    (void)offset;
    *value = UINT64_MAX >> (64 - 8 * size);
    return 0;
}

static void kick(void *device)
{
    pv_engine_kick(((struct pv_dsa *)device)->engine);
}

const struct pv_mmio_ops dsa_portal_ops = {.load = load, .store = store, .submit = submit, .kick = kick};
