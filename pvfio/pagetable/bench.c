/*
 * Timing loops for the page-table layer alone: no Python between two calls, and the clock read once a series.
 *
 * Not modelled: a flush between unmap and map, contention with walkers.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "pagetable.h"

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int pt_bench(struct pt_table *table, const struct pt_bench *bench, uint64_t *map_ns, uint64_t *unmap_ns)
{
    int error = 0;
    uint32_t mapped = 0;
    uint64_t start = now_ns();
    while (mapped < bench->calls && error == 0) {
        error = pt_map_range(table, bench->iova + mapped * bench->stride, bench->phys, bench->size, bench->perm);
        mapped += error == 0;
    }
    uint64_t middle = now_ns();
    for (uint32_t i = 0; i < mapped; i++) {
        uint64_t unmapped;
        int refused = pt_unmap_range(table, bench->iova + i * bench->stride, bench->size, &unmapped);
        if (error == 0 && (refused != 0 || unmapped != bench->size))
            error = refused != 0 ? refused : -EIO;
    }
    uint64_t end = now_ns();
    *map_ns = middle - start;
    *unmap_ns = end - middle;
    return error;
}

uint64_t pt_bench_stores(uint32_t entries, uint32_t calls)
{
    _Atomic uint64_t *page = aligned_alloc(4096, 4096);
    if (page == NULL)
        return 0;
    for (unsigned i = 0; i < 512; i++)
        atomic_init(&page[i], 0);
    uint64_t start = now_ns();
    for (uint32_t n = 0; n < calls; n++)
        for (uint32_t i = 0; i < entries; i++)
            atomic_store_explicit(&page[i & 511], n, memory_order_release);
    uint64_t end = now_ns();
    free((void *)page);
    return end - start;
}
