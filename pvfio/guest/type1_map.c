/*
 * The mappings of a container, behind type1_map.h. Checks, their order and their errno: Linux 7.3, vfio_iommu_type1.c
 * (vfio_dma_do_map, vfio_dma_do_unmap).
 */
#include "type1_map.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define PERMISSIONS ((uint32_t)(VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE))
#define DEAD 0x80u /* in an entry's flags: cleared, and waiting for the second half of its unmap */
#define CHUNK 64u
#define FIRST_ROOM 64u
#define MANY 8192u /* mappings; where there are fewer, caches hold what a call touches */
#define VERY_MANY 32768u /* ... beyond what is left of a core's own caches */
#define AHEAD 4u /* elements of a batch between two steps of asking for memory, and the work */

_Static_assert(VFIO_DMA_MAP_FLAG_READ == PT_READ && VFIO_DMA_MAP_FLAG_WRITE == PT_WRITE, "one set of permissions");

static int refuse(struct pv_type1 *t, int error, uint32_t reason, uint64_t where)
{
    t->reason = reason;
    t->where = where;
    return -error;
}

void pv_type1_drop_scratch(struct pv_type1 *t)
{
    free(t->runs);
    t->runs = NULL;
    t->run_room = 0;
}

static bool runs_reserve(struct pv_type1 *t, uint64_t count)
{
    if (count <= t->run_room)
        return true;
    uint64_t room = count < FIRST_ROOM ? FIRST_ROOM : count;
    struct pv_run *more = room > SIZE_MAX / sizeof(*more) ? NULL : realloc(t->runs, room * sizeof(*more));
    if (!more)
        return false;
    t->runs = more;
    t->run_room = room;
    return true;
}

static inline void prefetch_tables(const struct pv_type1 *t, uint64_t iova, uint32_t step)
{
    for (uint32_t i = 0; i < t->table_count; i++)
        pt_prefetch(t->tables[i], iova, step);
}

/* The same for one call: what index and page tables would wait for one after the other, they wait for together. */
static inline void prefetch_all(const struct pv_type1 *t, uint64_t iova)
{
    if (pv_mappings_count(t->mappings) < VERY_MANY)
        return;
    pv_mappings_prefetch(t->mappings, iova, 0);
    prefetch_tables(t, iova, 0);
    pv_mappings_prefetch(t->mappings, iova, 1);
    prefetch_tables(t, iova, 1);
    prefetch_tables(t, iova, 2);
}

/* The elements of a batch may be anywhere: one after the other would wait for memory each time. */
static inline void prefetch_ahead(const struct pv_type1 *t, uint64_t i, uint64_t n, const uint64_t *iova)
{
    if (pv_mappings_count(t->mappings) < MANY)
        return;
    for (uint32_t step = 0; step < 3; step++) {
        uint64_t at = i + (3 - step) * AHEAD;
        if (at >= n)
            continue;
        prefetch_tables(t, iova[at], step);
        pv_mappings_prefetch(t->mappings, iova[at], step);
    }
}

/* Map. */

static bool usable(const struct pv_type1 *t, uint64_t iova, uint64_t last)
{
    for (uint32_t i = 0; i < t->range_count; i++)
        if (t->ranges[i].start <= iova && last <= t->ranges[i].end)
            return true;
    return false;
}

/* The checks before pinning. */
static int check_map(struct pv_type1 *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags)
{
    struct pv_mapping there;
    uint64_t last = iova + (size - 1);
    if (flags & ~PERMISSIONS)
        return refuse(t, EINVAL, PV_TYPE1_BAD_REQUEST, iova);
    if (!size)
        return refuse(t, EINVAL, PV_TYPE1_BAD_SIZE, iova);
    if (last < iova || vaddr + (size - 1) < vaddr)
        return refuse(t, EOVERFLOW, PV_TYPE1_WRAPS, iova);
    if (!flags)
        return refuse(t, EINVAL, PV_TYPE1_NO_PERMISSION, iova);
    if ((iova | vaddr | size) & t->page_mask)
        return refuse(t, EINVAL, PV_TYPE1_UNALIGNED, iova);
    if (pv_mappings_range(t->mappings, iova, last, &there, 1))
        return refuse(t, EEXIST, PV_TYPE1_OVERLAPS, there.iova);
    if (!t->dma_avail)
        return refuse(t, ENOSPC, PV_TYPE1_NO_ENTRY, iova);
    return usable(t, iova, last) ? 0 : refuse(t, EINVAL, PV_TYPE1_OUTSIDE, iova);
}

/* Pins, and finds the runs of guest memory behind the range: the extent, or the refusal. */
static int64_t pin(struct pv_type1 *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint64_t *count)
{
    if (!runs_reserve(t, 1))
        return refuse(t, ENOMEM, PV_TYPE1_NO_MEMORY, iova);
    int64_t extent = pv_memory_pin_runs(t->memory, vaddr, size, t->runs, t->run_room, count);
    if (extent < 0)
        return refuse(t, EFAULT, PV_TYPE1_NOT_PINNABLE, iova);
    if (size > t->account->limit || t->account->locked > t->account->limit - size) {
        pv_memory_unpin(t->memory, extent);
        return refuse(t, ENOMEM, PV_TYPE1_MEMLOCK, iova);
    }
    if (*count > t->run_room) {
        if (!runs_reserve(t, *count)) {
            pv_memory_unpin(t->memory, extent);
            return refuse(t, ENOMEM, PV_TYPE1_NO_MEMORY, iova);
        }
        pv_memory_runs(t->memory, vaddr, size, t->runs, t->run_room);
    }
    return extent;
}

/* All runs into one table; *shown: what of them a walker has seen when it fails. */
static int map_runs(struct pt_table *table, uint64_t iova, const struct pv_run *runs, uint64_t count, uint32_t perm,
                    int *shown)
{
    for (uint64_t i = 0; i < count; i++) {
        int error = pt_map_range(table, iova, runs[i].gpa, runs[i].size, perm);
        if (error)
            return error;
        *shown = 1;
        iova += runs[i].size;
    }
    return 0;
}

static void forget(struct pv_type1 *t, const struct pv_mapping *mapping)
{
    pv_mappings_remove(t->mappings, mapping->iova, NULL);
    pv_lap(t->laps, PV_LAP_INDEX);
    pv_memory_unpin(t->memory, (int64_t)mapping->cookie);
    pv_lap(t->laps, PV_LAP_PIN);
    t->account->locked -= mapping->size;
    t->dma_avail++;
}

/* alone: not of a batch, which asks for memory ahead. */
static inline int map_one(struct pv_type1 *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags, int *shown,
                          bool alone)
{
    uint64_t count;
    *shown = 0;
    pv_laps_begin(t->laps);
    if (alone)
        prefetch_all(t, iova);
    int error = check_map(t, iova, vaddr, size, flags);
    if (error)
        return error;
    pv_lap(t->laps, PV_LAP_CHECK);
    int64_t extent = pin(t, iova, vaddr, size, &count);
    if (extent < 0)
        return (int)extent;
    pv_lap(t->laps, PV_LAP_PIN);
    if (pv_mappings_insert(t->mappings, iova, size, vaddr, flags, (uint64_t)extent)) {
        pv_memory_unpin(t->memory, extent);
        return refuse(t, ENOMEM, PV_TYPE1_NO_MEMORY, iova);
    }
    t->dma_avail--;
    t->account->locked += size;
    pv_lap(t->laps, PV_LAP_INDEX);
    for (uint32_t i = 0; i < t->table_count && !error; i++)
        error = map_runs(t->tables[i], iova, t->runs, count, flags, shown);
    pv_lap(t->laps, PV_LAP_TABLE);
    if (!error)
        return 0;
    if (!*shown)
        forget(t, &(struct pv_mapping){.iova = iova, .size = size, .cookie = (uint64_t)extent});
    return refuse(t, -error, PV_TYPE1_PAGE_TABLE, iova);
}

int pv_type1_map(struct pv_type1 *t, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags, int *shown)
{
    return map_one(t, iova, vaddr, size, flags, shown, true);
}

int pv_type1_map_request(struct pv_type1 *t, const struct vfio_iommu_type1_dma_map *request, int *shown)
{
    *shown = 0;
    if (!request)
        return refuse(t, EFAULT, PV_TYPE1_BAD_REQUEST, 0);
    if (request->argsz < sizeof(*request) || request->flags & ~PERMISSIONS)
        return refuse(t, EINVAL, PV_TYPE1_BAD_REQUEST, request->iova);
    return pv_type1_map(t, request->iova, request->vaddr, request->size, request->flags, shown);
}

int pv_type1_map_batch(struct pv_type1 *t, uint64_t n, const uint64_t *iova, const uint64_t *vaddr, const uint64_t *size,
                       uint32_t flags, uint64_t *done, uint64_t *index)
{
    int error = 0, shown = 0;
    uint64_t i = 0;
    for (; i < n && !error; i++) {
        prefetch_ahead(t, i, n, iova);
        error = map_one(t, iova[i], vaddr[i], size[i], flags, &shown, false);
    }
    *index = error ? i - 1 : n;
    *done = *index + (uint64_t)(error && shown);
    return error;
}

/* Unmap, first half. */

/* Consecutive mappings become one range of the page tables. */
struct clearing {
    uint64_t first, last; /* empty where first > last */
    uint64_t bytes;
};

static void clear_tables(struct pv_type1 *t, const struct clearing *c)
{
    uint64_t unmapped;
    if (c->first > c->last)
        return;
    pv_lap(t->laps, PV_LAP_INDEX);
    for (uint32_t i = 0; i < t->table_count; i++)
        pt_unmap_range(t->tables[i], c->first, c->last - c->first + 1, &unmapped);
    pv_lap(t->laps, PV_LAP_TABLE);
    if (c->first < t->flush_first)
        t->flush_first = c->first;
    if (c->last > t->flush_last)
        t->flush_last = c->last;
}

static void clear_mapping(struct pv_type1 *t, struct clearing *c, const struct pv_mapping *mapping)
{
    uint64_t last = mapping->iova + (mapping->size - 1);
    if (c->first > c->last || mapping->iova != c->last + 1) {
        clear_tables(t, c);
        c->first = mapping->iova;
    }
    c->last = last;
    c->bytes += mapping->size;
    pv_mappings_set_flags(t->mappings, mapping->iova, mapping->flags | DEAD);
}

/* Clears and marks what overlaps [first, last], and returns its bytes. */
static int64_t clear_range(struct pv_type1 *t, uint64_t first, uint64_t last)
{
    struct pv_mapping found[CHUNK];
    struct clearing c = {1, 0, 0};
    for (;;) {
        uint64_t n = pv_mappings_range(t->mappings, first, last, found, CHUNK);
        for (uint64_t i = 0; i < n; i++)
            if (!(found[i].flags & DEAD))
                clear_mapping(t, &c, &found[i]);
        uint64_t end = n ? found[n - 1].iova + (found[n - 1].size - 1) : last;
        if (n < CHUNK || end >= last)
            break;
        first = end + 1;
    }
    clear_tables(t, &c);
    return (int64_t)c.bytes;
}

/* The mapping around one byte, unless it is cleared already. */
static bool live_at(struct pv_type1 *t, uint64_t iova, struct pv_mapping *out)
{
    return pv_mappings_find(t->mappings, iova, out) && !(out->flags & DEAD);
}

static int64_t unmap_one(struct pv_type1 *t, uint64_t iova, uint64_t size)
{
    struct pv_mapping found;
    uint64_t last = iova + (size - 1);
    if (iova & t->page_mask)
        return refuse(t, EINVAL, PV_TYPE1_UNALIGNED, iova);
    if (!size || size & t->page_mask)
        return refuse(t, EINVAL, size ? PV_TYPE1_UNALIGNED : PV_TYPE1_BAD_SIZE, iova);
    if (last < iova)
        return refuse(t, EOVERFLOW, PV_TYPE1_WRAPS, iova);
    if (live_at(t, iova, &found)) {
        if (found.iova == iova && found.size == size) { /* the usual case: one mapping exactly */
            struct clearing c = {1, 0, 0};
            pv_lap(t->laps, PV_LAP_CHECK);
            clear_mapping(t, &c, &found);
            clear_tables(t, &c);
            return (int64_t)size;
        }
        if (found.iova != iova)
            return t->v2 ? refuse(t, EINVAL, PV_TYPE1_SPLITS, found.iova) : 0;
    }
    if (t->v2 && live_at(t, last, &found) && found.iova + (found.size - 1) != last)
        return refuse(t, EINVAL, PV_TYPE1_SPLITS, found.iova);
    pv_lap(t->laps, PV_LAP_CHECK);
    return clear_range(t, iova, last);
}

static void begin(struct pv_type1 *t)
{
    t->flush_first = UINT64_MAX;
    t->flush_last = 0;
    pv_laps_begin(t->laps);
}

int64_t pv_type1_unmap(struct pv_type1 *t, uint64_t iova, uint64_t size)
{
    begin(t);
    prefetch_all(t, iova);
    return unmap_one(t, iova, size);
}

int64_t pv_type1_unmap_all(struct pv_type1 *t)
{
    begin(t);
    return clear_range(t, 0, UINT64_MAX);
}

int64_t pv_type1_unmap_request(struct pv_type1 *t, const struct vfio_iommu_type1_dma_unmap *request)
{
    if (!request || request->argsz < offsetof(struct vfio_iommu_type1_dma_unmap, data) || request->flags)
        return refuse(t, EINVAL, PV_TYPE1_BAD_REQUEST, 0);
    return pv_type1_unmap(t, request->iova, request->size);
}

int pv_type1_unmap_batch(struct pv_type1 *t, uint64_t n, const uint64_t *iova, const uint64_t *size, uint64_t *bytes,
                         uint64_t *done)
{
    begin(t);
    for (uint64_t i = 0; i < n; i++) {
        prefetch_ahead(t, i, n, iova);
        int64_t unmapped = unmap_one(t, iova[i], size[i]);
        if (unmapped < 0) {
            *done = i;
            return (int)unmapped;
        }
        bytes[i] = (uint64_t)unmapped;
    }
    *done = n;
    return 0;
}

/* Unmap, second half. */

void pv_type1_unmap_finish(struct pv_type1 *t, uint64_t first, uint64_t last)
{
    struct pv_mapping found[CHUNK];
    pv_laps_begin(t->laps);
    for (;;) {
        uint64_t n = pv_mappings_range(t->mappings, first, last, found, CHUNK);
        for (uint64_t i = 0; i < n; i++)
            if (found[i].flags & DEAD)
                forget(t, &found[i]);
        uint64_t end = n ? found[n - 1].iova + (found[n - 1].size - 1) : last;
        if (n < CHUNK || end >= last)
            return;
        first = end + 1;
    }
}

void pv_type1_finish_request(struct pv_type1 *t, struct vfio_iommu_type1_dma_unmap *request, uint64_t bytes)
{
    pv_type1_unmap_finish_batch(t, 1, &(uint64_t){request->iova}, &(uint64_t){request->size});
    request->size = bytes;
}

void pv_type1_unmap_finish_batch(struct pv_type1 *t, uint64_t n, const uint64_t *iova, const uint64_t *size)
{
    struct pv_mapping found;
    pv_laps_begin(t->laps);
    for (uint64_t i = 0; i < n; i++) {
        for (uint32_t step = 0; step < 2; step++)
            if (i + (2 - step) * AHEAD < n)
                pv_mappings_prefetch(t->mappings, iova[i + (2 - step) * AHEAD], 2 * step);
        uint64_t last = iova[i] + (size[i] - 1);
        if (pv_mappings_find(t->mappings, iova[i], &found) && found.flags & DEAD && found.iova == iova[i] &&
            found.size == size[i])
            forget(t, &found);
        else
            pv_type1_unmap_finish(t, iova[i], last);
    }
}

void pv_type1_unmap_undo(struct pv_type1 *t)
{
    struct pv_mapping found[CHUNK];
    uint64_t first = 0, n;
    do {
        n = pv_mappings_range(t->mappings, first, UINT64_MAX, found, CHUNK);
        for (uint64_t i = 0; i < n; i++)
            if (found[i].flags & DEAD)
                pv_mappings_set_flags(t->mappings, found[i].iova, found[i].flags & ~DEAD);
        first = n ? found[n - 1].iova + found[n - 1].size : 0;
    } while (n == CHUNK && first);
}

/* Domains. */

int pv_type1_replay(struct pv_type1 *t, struct pt_table *table)
{
    struct pv_mapping found[CHUNK];
    uint64_t first = 0, n;
    int shown;
    do {
        n = pv_mappings_range(t->mappings, first, UINT64_MAX, found, CHUNK);
        for (uint64_t i = 0; i < n; i++) {
            int64_t count = pv_memory_runs(t->memory, found[i].vaddr, found[i].size, t->runs, t->run_room);
            if (count > 0 && (uint64_t)count > t->run_room) {
                if (!runs_reserve(t, (uint64_t)count))
                    return -ENOMEM;
                pv_memory_runs(t->memory, found[i].vaddr, found[i].size, t->runs, t->run_room);
            }
            if (count < 0)
                return (int)count;
            int error = map_runs(table, found[i].iova, t->runs, (uint64_t)count, found[i].flags, &shown);
            if (error)
                return error;
        }
        first = n ? found[n - 1].iova + found[n - 1].size : 0;
    } while (n == CHUNK && first);
    return 0;
}
