/*
 * The occupancy interrupt of a WQ (Intel DSA 1.2 9.2, WQCFG): when a descriptor leaves a queue that then holds no more
 * than the limit, the WQ's bit is set, INTCAUSE says so and the WQ's vector fires; not again before the bit is cleared.
 */
#include "dsa_private.h"

void pv_dsa_occupancy_watch(struct pv_dsa *dsa, uint32_t index, int vector, uint32_t limit)
{
    struct dsa_wq *wq = &dsa->wq[index];
    atomic_store(&wq->occupancy_vector, vector);
    atomic_store(&wq->occupancy_limit, limit & IDXD_WQCFG_OCCUPANCY_INT_EN ? limit : 0);
}

int pv_dsa_occupancy_pending(struct pv_dsa *dsa, uint32_t index)
{
    return atomic_load(&dsa->wq[index].occupancy_pending);
}

void pv_dsa_occupancy_clear(struct pv_dsa *dsa, uint32_t index)
{
    atomic_store(&dsa->wq[index].occupancy_pending, false);
}

void dsa_occupancy(struct pv_dsa *dsa, struct dsa_wq *wq)
{
    uint32_t limit = atomic_load(&wq->occupancy_limit);
    uint64_t head = atomic_load(&wq->head), used = atomic_load(&wq->tail) - head;
    if (!limit || used > (limit & IDXD_WQCFG_OCCUPANCY_MASK) || atomic_exchange(&wq->occupancy_pending, true))
        return;
    int vector = atomic_load(&wq->occupancy_vector);
    atomic_fetch_or(&dsa->intcause, IDXD_INTC_OCCUPY);
    if (vector >= 0)
        pv_msix_fire(dsa->msix, (uint32_t)vector);
}
