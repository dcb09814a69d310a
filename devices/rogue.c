/*
 * The engine of a device that never stops (see rogue.h).
 */
#include "rogue.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#define WRITES_PER_STEP 64

struct pv_rogue {
    struct pv_bus *bus;
    struct pv_engine *engine;
    uint64_t iova, words;
    _Atomic uint64_t next, landed, aborted, cancelled;
    uint64_t log_mask;
    uint8_t *log;
};

/* Only the engine's thread counts. */
static void count(_Atomic uint64_t *counter)
{
    uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, now + 1, memory_order_release);
}

static void write_one(struct pv_rogue *r)
{
    struct pv_dma dma;
    uint64_t n = atomic_load_explicit(&r->next, memory_order_relaxed);
    uint64_t word = htole64(n + 1);
    int error = pv_bus_write(r->bus, r->iova + 8 * (n % r->words), &word, sizeof(word), &dma);
    r->log[n & r->log_mask] = error == 0 ? PV_ROGUE_LANDED : error == -EFAULT ? PV_ROGUE_ABORTED : PV_ROGUE_CANCELLED;
    count(error == 0 ? &r->landed : error == -EFAULT ? &r->aborted : &r->cancelled);
    count(&r->next);
}

static int step(void *device)
{
    struct pv_rogue *r = device;
    if (!r->words)
        return PV_STEP_IDLE;
    for (int i = 0; i < WRITES_PER_STEP; i++)
        write_one(r);
    return PV_STEP_PROGRESS;
}

struct pv_rogue *pv_rogue_create(struct pv_bus *bus, int kind, uint32_t log_shift)
{
    if (log_shift > 30)
        return NULL;
    struct pv_rogue *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    r->log_mask = (1ull << log_shift) - 1;
    r->log = calloc(r->log_mask + 1, 1);
    r->bus = pv_bus_get(bus);
    r->engine = r->log ? pv_engine_create(step, r, kind, 0) : NULL;
    if (!r->engine) {
        pv_bus_destroy(r->bus);
        free(r->log);
        free(r);
        return NULL;
    }
    return r;
}

void pv_rogue_destroy(struct pv_rogue *r)
{
    if (!r)
        return;
    pv_engine_destroy(r->engine);
    pv_bus_destroy(r->bus);
    free(r->log);
    free(r);
}

struct pv_engine *pv_rogue_engine(struct pv_rogue *r)
{
    return r->engine;
}

void pv_rogue_aim(struct pv_rogue *r, uint64_t iova, uint64_t words)
{
    pv_engine_pause(r->engine);
    r->iova = iova;
    r->words = words;
    pv_engine_unpause(r->engine);
}

void pv_rogue_stats(struct pv_rogue *r, struct pv_rogue_stats *out)
{
    *out = (struct pv_rogue_stats){.next = atomic_load(&r->next),
                                   .landed = atomic_load(&r->landed),
                                   .aborted = atomic_load(&r->aborted),
                                   .cancelled = atomic_load(&r->cancelled)};
}

const uint8_t *pv_rogue_log(struct pv_rogue *r)
{
    return r->log;
}
