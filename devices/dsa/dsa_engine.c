/*
 * Making, configuring and emptying the DSA's data path (see dsa_engine.h), and the errors and causes it reports.
 */
#include "dsa_engine.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "dsa_private.h"

void dsa_lock(struct dsa_lock *lock)
{
    unsigned spins = 0;
    while (atomic_flag_test_and_set_explicit(&lock->flag, memory_order_acquire))
        if (++spins % 64 == 0)
            sched_yield();
}

/* Descriptor flags that need a capability this device does not have. */
static uint32_t flags_without(uint64_t gencap)
{
    uint32_t flags = 0;
    if (!(gencap & IDXD_GENCAP_BLOCK_ON_FAULT))
        flags |= IDXD_OP_FLAG_BOF;
    if (!(gencap & IDXD_GENCAP_CACHE_CONTROL_MEM))
        flags |= IDXD_OP_FLAG_CC;
    if (!(gencap & IDXD_GENCAP_DEST_READBACK))
        flags |= IDXD_OP_FLAG_DRDBK;
    return flags;
}

static bool allocate(struct pv_dsa *dsa)
{
    const struct pv_dsa_config *c = &dsa->config;
    dsa->wq = calloc(c->wqs, sizeof(*dsa->wq));
    dsa->group = calloc(c->groups, sizeof(*dsa->group));
    dsa->slot = calloc(c->engines, sizeof(*dsa->slot));
    dsa->vector_of = calloc(c->handles, sizeof(*dsa->vector_of));
    if (!dsa->wq || !dsa->group || !dsa->slot || !dsa->vector_of)
        return false;
    for (uint32_t i = 0; i < c->wqs; i++)
        atomic_flag_clear(&dsa->wq[i].lock.flag);
    for (uint32_t i = 0; i < c->engines; i++) {
        dsa->slot[i].group = -1;
        atomic_init(&dsa->slot[i].sequence, DSA_NO_SEQUENCE);
    }
    for (uint32_t i = 0; i < c->handles; i++)
        atomic_init(&dsa->vector_of[i], -1);
    return true;
}

struct pv_dsa *pv_dsa_create(const struct pv_dsa_config *config, struct pv_bus *bus, struct pv_msix *msix, int kind)
{
    if (!config->wqs || config->wqs > 255 || !config->groups || !config->engines || !config->handles)
        return NULL;
    struct pv_dsa *dsa = calloc(1, sizeof(*dsa));
    if (!dsa)
        return NULL;
    dsa->config = *config;
    dsa->bus = pv_bus_get(bus);
    dsa->msix = msix ? pv_msix_get(msix) : NULL;
    dsa->threaded = kind == PV_ENGINE_THREAD;
    dsa->flags = DSA_DESC_FLAGS_MASK & ~flags_without(config->gencap);
    dsa->portals = (struct pv_mmio){&dsa_portal_ops, dsa, (uint64_t)config->wqs * IDXD_WQ_PORTAL_STRIDE};
    atomic_flag_clear(&dsa->swerr_lock.flag);
    atomic_flag_clear(&dsa->log.lock.flag);
    atomic_flag_clear(&dsa->injection_lock.flag);
    dsa->watch_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (dsa->watch_fd >= 0 && allocate(dsa))
        dsa->engine = pv_engine_create(dsa_step, dsa, kind, 0);
    if (!dsa->engine) {
        pv_dsa_destroy(dsa);
        return NULL;
    }
    atomic_store_explicit(&dsa->ready, true, memory_order_release);
    return dsa;
}

void pv_dsa_destroy(struct pv_dsa *dsa)
{
    if (!dsa)
        return;
    pv_engine_destroy(dsa->engine);
    for (uint32_t i = 0; dsa->wq && i < dsa->config.wqs; i++) {
        free(dsa->wq[i].ring);
        free(dsa->wq[i].portal);
    }
    if (dsa->watch_fd >= 0)
        close(dsa->watch_fd);
    pv_msix_destroy(dsa->msix);
    pv_bus_destroy(dsa->bus);
    free(dsa->wq);
    free(dsa->group);
    free(dsa->slot);
    free(dsa->vector_of);
    free(dsa);
}

struct pv_engine *pv_dsa_engine(struct pv_dsa *dsa)
{
    return dsa->engine;
}

struct pv_mmio *pv_dsa_portals(struct pv_dsa *dsa)
{
    return &dsa->portals;
}

void pv_dsa_decode(struct pv_dsa *dsa, int on)
{
    atomic_store(&dsa->decode, on ? 1u : 0u);
}

void pv_dsa_assign(struct pv_dsa *dsa, const int16_t *wq_groups, const int16_t *engine_groups)
{
    pv_engine_pause(dsa->engine);
    for (uint32_t i = 0; i < dsa->config.groups; i++)
        dsa->group[i].wqs = dsa->group[i].next = 0;
    for (uint32_t i = 0; i < dsa->config.wqs; i++) {
        if (wq_groups[i] < 0 || (uint32_t)wq_groups[i] >= dsa->config.groups)
            continue;
        struct dsa_group *group = &dsa->group[wq_groups[i]];
        group->wq[group->wqs++] = (uint8_t)i;
    }
    for (uint32_t i = 0; i < dsa->config.engines; i++)
        dsa->slot[i].group = (uint32_t)engine_groups[i] < dsa->config.groups ? engine_groups[i] : -1;
    dsa->next_slot = 0;
    pv_engine_unpause(dsa->engine);
}

int pv_dsa_wq_enable(struct pv_dsa *dsa, uint32_t index, const struct pv_dsa_wq_config *config)
{
    if (index >= dsa->config.wqs || !config->size || config->priority > 15 || config->max_xfer_shift > 31 ||
        config->max_batch_shift > 15 || dsa->wq[index].state != IDXD_WQ_STATE_DISABLED)
        return -EINVAL;
    struct dsa_wq *wq = &dsa->wq[index];
    struct dsa_hw_desc *ring = calloc(config->size, sizeof(*ring));
    uint8_t *portal = calloc(config->size, 1);
    if (!ring || !portal) {
        free(ring);
        free(portal);
        return -ENOMEM;
    }
    pv_engine_pause(dsa->engine);
    dsa_lock(&wq->lock);
    wq->ring = ring;
    wq->portal = portal;
    wq->size = config->size;
    wq->threshold = config->threshold;
    wq->dedicated = config->dedicated;
    wq->bof = config->bof;
    wq->ats_disable = config->ats_disable;
    wq->flags = dsa->flags & ~(config->bof ? 0u : (uint32_t)IDXD_OP_FLAG_BOF);
    wq->max_xfer = 1ull << config->max_xfer_shift;
    wq->max_batch = 1u << config->max_batch_shift;
    wq->priority = config->priority;
    wq->credit = 0;
    for (int i = 0; i < 4; i++)
        wq->op_config[i] = config->op_config[i] & dsa->config.opcap[i];
    wq->logged = false;
    memset(wq->slot, 0, sizeof(wq->slot));
    wq->state = IDXD_WQ_STATE_ENABLED;
    dsa_unlock(&wq->lock);
    pv_engine_unpause(dsa->engine);
    return 0;
}

void pv_dsa_wq_close(struct pv_dsa *dsa, uint32_t index)
{
    struct dsa_wq *wq = &dsa->wq[index];
    dsa_lock(&wq->lock);
    if (wq->state == IDXD_WQ_STATE_ENABLED)
        wq->state = IDXD_WQ_STATE_BUSY;
    dsa_unlock(&wq->lock);
}

/* With the engine paused: what is queued and in hand is no more. */
static void forget(struct pv_dsa *dsa, uint32_t index)
{
    struct dsa_wq *wq = &dsa->wq[index];
    dsa_lock(&wq->lock);
    atomic_store(&wq->head, atomic_load(&wq->tail));
    dsa_unlock(&wq->lock);
    for (uint32_t i = 0; i < dsa->config.engines; i++)
        if (dsa->slot[i].wq == index)
            atomic_store(&dsa->slot[i].sequence, DSA_NO_SEQUENCE);
}

void pv_dsa_wq_disable(struct pv_dsa *dsa, uint32_t index)
{
    struct dsa_wq *wq = &dsa->wq[index];
    pv_engine_pause(dsa->engine);
    pv_dsa_wq_close(dsa, index);
    forget(dsa, index);
    dsa_lock(&wq->lock);
    free(wq->ring);
    free(wq->portal);
    wq->ring = NULL;
    wq->portal = NULL;
    wq->state = IDXD_WQ_STATE_DISABLED;
    dsa_unlock(&wq->lock);
    pv_engine_unpause(dsa->engine);
}

uint32_t pv_dsa_wq_occupancy(struct pv_dsa *dsa, uint32_t index)
{
    struct dsa_wq *wq = &dsa->wq[index];
    uint64_t head = atomic_load(&wq->head);
    return (uint32_t)(atomic_load(&wq->tail) - head);
}

uint64_t pv_dsa_wq_mark(struct pv_dsa *dsa, uint32_t index)
{
    return atomic_load(&dsa->wq[index].tail);
}

int pv_dsa_wq_drained(struct pv_dsa *dsa, uint32_t index, uint64_t mark)
{
    if (atomic_load(&dsa->wq[index].head) < mark)
        return 0;
    for (uint32_t i = 0; i < dsa->config.engines; i++) {
        uint64_t sequence = atomic_load(&dsa->slot[i].sequence);
        if (sequence < mark && atomic_load(&dsa->slot[i].busy_wq) == index)
            return 0;
    }
    return 1;
}

void pv_dsa_watch(struct pv_dsa *dsa, int on)
{
    atomic_store(&dsa->watch, on ? 1u : 0u);
}

int pv_dsa_watch_fd(struct pv_dsa *dsa)
{
    return dsa->watch_fd;
}

void pv_dsa_abort(struct pv_dsa *dsa, const uint8_t *wqs)
{
    pv_engine_pause(dsa->engine);
    for (uint32_t i = 0; i < dsa->config.wqs; i++)
        if (wqs[i])
            forget(dsa, i);
    pv_engine_unpause(dsa->engine);
    if (atomic_load(&dsa->watch))
        eventfd_write(dsa->watch_fd, 1);
}

/* With the engine paused: what stays moves up to the tail, so that submitters and marks see no difference. */
static void forget_pasid(struct dsa_wq *wq, uint32_t pasid)
{
    dsa_lock(&wq->lock);
    uint64_t head = atomic_load(&wq->head), to = atomic_load(&wq->tail);
    for (uint64_t from = to; from > head; from--) {
        uint64_t at = (from - 1) % wq->size;
        if ((wq->ring[at].pasid_priv & DSA_DESC_PASID_MASK) == pasid)
            continue;
        to--;
        wq->ring[to % wq->size] = wq->ring[at];
        wq->portal[to % wq->size] = wq->portal[at];
    }
    atomic_store(&wq->head, to);
    dsa_unlock(&wq->lock);
}

void pv_dsa_abort_pasid(struct pv_dsa *dsa, uint32_t pasid)
{
    pv_engine_pause(dsa->engine);
    for (uint32_t i = 0; i < dsa->config.wqs; i++)
        if (!dsa->wq[i].dedicated && dsa->wq[i].ring)
            forget_pasid(&dsa->wq[i], pasid);
    for (uint32_t i = 0; i < dsa->config.engines; i++) {
        struct dsa_slot *slot = &dsa->slot[i];
        if (!dsa->wq[slot->wq].dedicated && (slot->work.desc.pasid_priv & DSA_DESC_PASID_MASK) == pasid)
            atomic_store(&slot->sequence, DSA_NO_SEQUENCE);
    }
    pv_engine_unpause(dsa->engine);
}

int pv_dsa_set_handle(struct pv_dsa *dsa, uint32_t handle, int vector)
{
    if (handle >= dsa->config.handles)
        return -EINVAL;
    atomic_store_explicit(&dsa->vector_of[handle], vector, memory_order_release);
    return 0;
}

void pv_dsa_set_genctrl(struct pv_dsa *dsa, uint32_t value)
{
    atomic_store(&dsa->genctrl, value);
}

void pv_dsa_cause(struct pv_dsa *dsa, uint32_t bits)
{
    atomic_fetch_or(&dsa->intcause, bits);
    pv_msix_fire(dsa->msix, 0);
}

uint32_t pv_dsa_intcause(struct pv_dsa *dsa)
{
    return atomic_load(&dsa->intcause);
}

void pv_dsa_intcause_clear(struct pv_dsa *dsa, uint32_t bits)
{
    atomic_fetch_and(&dsa->intcause, ~bits);
}

void dsa_report_swerr(struct pv_dsa *dsa, const struct dsa_swerr *error)
{
    dsa_lock(&dsa->swerr_lock);
    bool first = !(dsa->swerr.status & IDXD_SWERR_VALID);
    if (first)
        dsa->swerr = *error;
    else
        dsa->swerr.status |= IDXD_SWERR_OVERFLOW;
    dsa_unlock(&dsa->swerr_lock);
    if (first && atomic_load(&dsa->genctrl) & IDXD_GENCTRL_SOFTERR_INT_EN)
        pv_dsa_cause(dsa, IDXD_INTC_ERR);
}

void pv_dsa_swerr(struct pv_dsa *dsa, struct dsa_swerr *out)
{
    dsa_lock(&dsa->swerr_lock);
    *out = dsa->swerr;
    dsa_unlock(&dsa->swerr_lock);
}

void pv_dsa_swerr_clear(struct pv_dsa *dsa, uint64_t bits)
{
    dsa_lock(&dsa->swerr_lock);
    dsa->swerr.status &= ~(bits & IDXD_SWERR_ACK);
    if (!(dsa->swerr.status & IDXD_SWERR_VALID))
        dsa->swerr = (struct dsa_swerr){0};
    dsa_unlock(&dsa->swerr_lock);
}
