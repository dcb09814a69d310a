/*
 * The loop of a mapping benchmark on a page table alone: map, pretend to transmit, unmap, hand the emptied tables back,
 * with the clock read around each of the two halves.
 *
 * Not modelled: pinning, an index of mappings, the flush and its hypercall: nothing caches these entries.
 */
#ifndef PVFIO_WORKLOADS_MAP_LOOP_H
#define PVFIO_WORKLOADS_MAP_LOOP_H

#include <stdint.h>

#include "../pagetable/pagetable.h"
#include "latency.h"

/* cffi: begin */
struct pv_map_loop {
    struct pt_table *table;
    const uint64_t *iovas; /* mapped one after the other, over and over; count of them, not 0 */
    uint64_t count;
    uint64_t next;         /* which comes next */
    uint64_t phys;
    uint64_t piece;        /* bytes of one map call */
    uint64_t pieces;       /* map calls of one mapping, next to each other; one unmap covers them all */
    uint64_t delay_ns;     /* between map and unmap */
    uint32_t perm;
};

/* Goes on for ns nanoseconds, at least once. 0, or what a call was refused with (-EIO: bytes missing). */
int pv_map_loop_run(struct pv_map_loop *loop, uint64_t ns, struct pv_latency *map, struct pv_latency *unmap);
/* Maps the page at phys `count` times, a page apart from iova on. How many it could. */
uint64_t pv_map_loop_fill(struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t count, uint32_t perm);
/* What reading the clock costs, in ns: the mean over many pairs of readings. */
double pv_clock_cost(void);
/* cffi: end */

#endif
