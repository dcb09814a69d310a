/* The loop of a mapping benchmark on a page table alone (see map_loop.h). */
#include <errno.h>
#include <time.h>

#include "map_loop.h"

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int map_pieces(const struct pv_map_loop *loop, uint64_t iova)
{
    for (uint64_t i = 0; i < loop->pieces; i++) {
        uint64_t offset = i * loop->piece;
        int error = pt_map_range(loop->table, iova + offset, loop->phys + offset, loop->piece, loop->perm);
        if (error != 0) {
            uint64_t undone;
            if (i != 0)
                (void)pt_unmap_range(loop->table, iova, offset, &undone);
            pt_release_detached(loop->table);
            return error;
        }
    }
    return 0;
}

static int unmap_all(const struct pv_map_loop *loop, uint64_t iova)
{
    uint64_t size = loop->piece * loop->pieces, unmapped = 0;
    int error = pt_unmap_range(loop->table, iova, size, &unmapped);
    pt_release_detached(loop->table);
    return error != 0 ? error : unmapped == size ? 0 : -EIO;
}

int pv_map_loop_run(struct pv_map_loop *loop, uint64_t ns, struct pv_latency *map, struct pv_latency *unmap)
{
    uint64_t end = now_ns() + ns, after;
    do {
        uint64_t iova = loop->iovas[loop->next];
        loop->next = (loop->next + 1) % loop->count;
        uint64_t start = now_ns();
        int error = map_pieces(loop, iova);
        uint64_t mapped = now_ns();
        if (error != 0)
            return error;
        uint64_t before = mapped;
        if (loop->delay_ns != 0)
            while ((before = now_ns()) < mapped + loop->delay_ns)
                ;
        error = unmap_all(loop, iova);
        after = now_ns();
        if (error != 0)
            return error;
        pv_latency_add_one(map, mapped - start);
        pv_latency_add_one(unmap, after - before);
    } while (after < end);
    return 0;
}

uint64_t pv_map_loop_fill(struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t count, uint32_t perm)
{
    for (uint64_t i = 0; i < count; i++)
        if (pt_map_range(table, iova + i * PV_PAGE_SIZE, phys, PV_PAGE_SIZE, perm) != 0)
            return i;
    return count;
}

double pv_clock_cost(void)
{
    enum { PAIRS = 20000 };
    uint64_t start = now_ns(), last = start;
    for (unsigned i = 0; i < PAIRS; i++)
        last = now_ns();
    return (double)(last - start) / PAIRS;
}
