/*
 * Where the time of a mapping goes: a lap timer that the C paths of the guest kernel carry, for whoever wants to know.
 * Without one (NULL) a lap is a branch that is never taken.
 *
 * Not modelled: nesting; a lap is the time since the one before it, whatever was done in it.
 */
#ifndef PVFIO_LAPS_H
#define PVFIO_LAPS_H

#include <stdint.h>
#include <time.h>

/* cffi: begin */
#define PV_LAP_CHECK 0 /* checks of a request, with the look-ups they need */
#define PV_LAP_IOVA 1  /* taking an IOVA, giving it back */
#define PV_LAP_PIN 2   /* pinning and unpinning memory */
#define PV_LAP_INDEX 3 /* the index of mappings */
#define PV_LAP_TABLE 4 /* page tables */
#define PV_LAPS 5

/* The owner zeroes it. Each lap read the clock once, which its nanoseconds include. */
struct pv_laps {
    uint64_t last; /* when the last lap ended */
    uint64_t ns[5];
    uint64_t laps[5];
};
/* cffi: end */

static inline uint64_t pv_laps_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void pv_laps_begin(struct pv_laps *laps)
{
    if (__builtin_expect(laps != NULL, 0))
        laps->last = pv_laps_now();
}

static inline void pv_lap(struct pv_laps *laps, unsigned what)
{
    if (__builtin_expect(laps != NULL, 0)) {
        uint64_t now = pv_laps_now();
        laps->ns[what] += now - laps->last;
        laps->laps[what]++;
        laps->last = now;
    }
}

#endif
