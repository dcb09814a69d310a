/*
 * Which descriptor runs next: every engine in turn takes work from the WQs of its group, weighted by their priority
 * (Intel DSA 1.2 chapter 3).
 *
 * An engine keeps its descriptor until it is done; one that waits is tried again on each round. When everything waits,
 * a native thread sleeps a little between rounds, at most a millisecond.
 */
#include <time.h>
#include <unistd.h>
#include <sys/eventfd.h>

#include "dsa_private.h"

#define WAIT_NS_MIN 20000
#define WAIT_NS_MAX 1000000

static bool has_work(struct dsa_wq *wq)
{
    uint64_t head = atomic_load_explicit(&wq->head, memory_order_relaxed);
    return atomic_load_explicit(&wq->tail, memory_order_acquire) != head;
}

/* The place in the group's list of the WQ whose turn it is, -1: nothing queued. */
static int choose(struct pv_dsa *dsa, struct dsa_group *group)
{
    bool any = false;
    for (int round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < group->wqs; i++) {
            uint32_t at = (group->next + i) % group->wqs;
            struct dsa_wq *wq = &dsa->wq[group->wq[at]];
            if (!has_work(wq))
                continue;
            if (wq->credit)
                return (int)at;
            any = true;
        }
        if (!any)
            return -1;
        for (uint32_t i = 0; i < group->wqs; i++)
            dsa->wq[group->wq[i]].credit = dsa->wq[group->wq[i]].priority;
    }
    return -1;
}

/* Takes the next descriptor of a WQ in hand. */
static void dispatch(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_group *group, uint32_t at)
{
    slot->wq = group->wq[at];
    struct dsa_wq *wq = &dsa->wq[slot->wq];
    uint64_t head = atomic_load_explicit(&wq->head, memory_order_relaxed);
    wq->credit--;
    group->next = (at + 1) % group->wqs;
    slot->portal = wq->portal[head % wq->size];
    dsa_work_begin(dsa, slot, &slot->work, &wq->ring[head % wq->size]);
    /* Whoever sees the head beyond this descriptor must see it in hand. */
    atomic_store_explicit(&slot->busy_wq, slot->wq, memory_order_relaxed);
    atomic_store_explicit(&slot->sequence, head, memory_order_release);
    atomic_store_explicit(&wq->head, head + 1, memory_order_release);
    if (atomic_load_explicit(&wq->occupancy_limit, memory_order_relaxed))
        dsa_occupancy(dsa, wq);
}

static int run_slot(struct pv_dsa *dsa, struct dsa_slot *slot)
{
    bool begun = false;
    if (atomic_load_explicit(&slot->sequence, memory_order_relaxed) == DSA_NO_SEQUENCE) {
        struct dsa_group *group = slot->group < 0 ? NULL : &dsa->group[slot->group];
        int at = group ? choose(dsa, group) : -1;
        if (at < 0)
            return PV_STEP_IDLE;
        if (!pv_engine_gate(dsa->engine))
            return PV_STEP_STOPPED;
        dispatch(dsa, slot, group, (uint32_t)at);
        begun = true;
    }
    /* Of the WQ in hand (Intel DSA 1.2, WQCFG); engines take turns in one thread. */
    atomic_store_explicit(&dsa->bus->untranslated, dsa->wq[slot->wq].ats_disable, memory_order_relaxed);
    switch (dsa_work_advance(dsa, slot, &slot->work)) {
    case DSA_DONE:
        atomic_store(&slot->sequence, DSA_NO_SEQUENCE);
        if (atomic_load(&dsa->watch))
            eventfd_write(dsa->watch_fd, 1);
        return PV_STEP_PROGRESS;
    case DSA_STOPPED:
        return PV_STEP_STOPPED;
    case DSA_WAIT:
        return begun ? PV_STEP_PROGRESS : PV_STEP_IDLE;
    default:
        return PV_STEP_PROGRESS;
    }
}

static bool waiting(struct pv_dsa *dsa)
{
    for (uint32_t i = 0; i < dsa->config.engines; i++)
        if (atomic_load_explicit(&dsa->slot[i].sequence, memory_order_relaxed) != DSA_NO_SEQUENCE)
            return true;
    return false;
}

int dsa_step(void *device)
{
    struct pv_dsa *dsa = device;
    bool progress = false;
    if (!atomic_load_explicit(&dsa->ready, memory_order_acquire))
        return PV_STEP_IDLE;
    for (uint32_t i = 0; i < dsa->config.engines; i++) {
        struct dsa_slot *slot = &dsa->slot[dsa->next_slot];
        int answer = run_slot(dsa, slot);
        if (answer == PV_STEP_STOPPED)
            return answer;
        dsa->next_slot = (dsa->next_slot + 1) % dsa->config.engines;
        progress |= answer == PV_STEP_PROGRESS;
        if (pv_engine_pausing(dsa->engine))
            return PV_STEP_PROGRESS;
    }
    if (progress) {
        dsa->wait_ns = WAIT_NS_MIN;
        return PV_STEP_PROGRESS;
    }
    if (!dsa->threaded || !waiting(dsa))
        return PV_STEP_IDLE;
    nanosleep(&(struct timespec){.tv_nsec = (long)dsa->wait_ns}, NULL);
    dsa->wait_ns = dsa->wait_ns * 2 < WAIT_NS_MAX ? dsa->wait_ns * 2 : WAIT_NS_MAX;
    return PV_STEP_PROGRESS;
}
