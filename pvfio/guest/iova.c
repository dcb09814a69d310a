/*
 * Magazines and the table of ranges in use, over the gaps of iova_gaps.h.
 *
 * There is always room for as many gaps as there are ranges in use, reserved ranges and one more: so freeing cannot fail.
 */
#include "iova.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "iova_gaps.h"

#define FIRST_SLOTS 64u

struct magazine {
    uint32_t size;
    uint64_t pfns[PV_IOVA_MAGAZINE];
};

struct vp_cache {
    struct magazine *loaded, *previous;
};

struct pv_iova {
    uint64_t first, last;
    uint32_t vps;
    struct gaps gaps;
    uint64_t outstanding; /* ranges that are no gap: in use, cached, reserved */
    uint64_t total_pages; /* all but the reserved ones */
    struct vp_cache *caches; /* [vp * PV_IOVA_ORDERS + order] */
    struct magazine *depot[PV_IOVA_ORDERS][PV_IOVA_DEPOT];
    uint32_t depot_size[PV_IOVA_ORDERS];
    uint64_t cached, cached_pages, magazines;
    struct pv_iova_range *slots; /* open addressing; pfn 0 is an empty slot */
    uint64_t slot_count, live, live_pages;
};

static uint32_t order_for(uint64_t pages)
{
    return pages <= 1 ? 0 : 64 - (uint32_t)__builtin_clzll(pages - 1);
}

/* What a range of that many pages occupies. */
static uint64_t rounded(uint64_t pages)
{
    uint32_t order = order_for(pages);
    return order < PV_IOVA_ORDERS ? 1ull << order : pages;
}

struct pv_iova *pv_iova_create(uint64_t first, uint64_t last, uint32_t vps)
{
    if (!first || last < first || last >> 52 || !vps || vps > 4096)
        return NULL;
    struct pv_iova *space = calloc(1, sizeof(*space));
    if (!space)
        return NULL;
    space->first = first;
    space->last = last;
    space->vps = vps;
    space->slot_count = FIRST_SLOTS;
    space->total_pages = last - first + 1;
    space->caches = calloc((size_t)vps * PV_IOVA_ORDERS, sizeof(*space->caches));
    space->slots = calloc(FIRST_SLOTS, sizeof(*space->slots));
    if (!space->caches || !space->slots || !gaps_reserve(&space->gaps, 2)) {
        pv_iova_destroy(space);
        return NULL;
    }
    gaps_give(&space->gaps, first, space->total_pages);
    return space;
}

void pv_iova_destroy(struct pv_iova *space)
{
    if (!space)
        return;
    for (size_t i = 0; space->caches && i < (size_t)space->vps * PV_IOVA_ORDERS; i++) {
        free(space->caches[i].loaded);
        free(space->caches[i].previous);
    }
    for (uint32_t order = 0; order < PV_IOVA_ORDERS; order++)
        for (uint32_t i = 0; i < space->depot_size[order]; i++)
            free(space->depot[order][i]);
    gaps_destroy(&space->gaps);
    free(space->caches);
    free(space->slots);
    free(space);
}

int pv_iova_reserve(struct pv_iova *space, uint64_t first, uint64_t last, uint64_t *pages)
{
    if (last < first)
        return -EINVAL;
    /* Every gap it touches may leave one more range that is no gap. */
    if (!gaps_reserve(&space->gaps, space->outstanding + space->gaps.count + 3))
        return -ENOMEM;
    space->outstanding += 1 + space->gaps.count;
    *pages = gaps_take_range(&space->gaps, first, last);
    space->total_pages -= *pages;
    return 0;
}


static uint64_t home(const struct pv_iova *space, uint64_t pfn)
{
    return (pfn * 0x9e3779b97f4a7c15ull) >> (64 - __builtin_ctzll(space->slot_count));
}

struct pv_iova_range *pv_iova_find(struct pv_iova *space, uint64_t pfn)
{
    if (!pfn)
        return NULL;
    for (uint64_t at = home(space, pfn);; at = (at + 1) & (space->slot_count - 1)) {
        if (space->slots[at].pfn == pfn)
            return &space->slots[at];
        if (!space->slots[at].pfn)
            return NULL;
    }
}

static void place(struct pv_iova *space, struct pv_iova_range range)
{
    uint64_t at = home(space, range.pfn);
    while (space->slots[at].pfn)
        at = (at + 1) & (space->slot_count - 1);
    space->slots[at] = range;
}

static bool table_room(struct pv_iova *space)
{
    if ((space->live + 1) * 3 <= space->slot_count * 2)
        return true;
    uint64_t count = space->slot_count;
    struct pv_iova_range *old = space->slots, *more = calloc(count * 2, sizeof(*more));
    if (!more)
        return false;
    space->slots = more;
    space->slot_count = count * 2;
    for (uint64_t i = 0; i < count; i++)
        if (old[i].pfn)
            place(space, old[i]);
    free(old);
    return true;
}

static void forget(struct pv_iova *space, struct pv_iova_range *range)
{
    uint64_t mask = space->slot_count - 1, hole = (uint64_t)(range - space->slots);
    for (uint64_t at = (hole + 1) & mask; space->slots[at].pfn; at = (at + 1) & mask) {
        if (((at - home(space, space->slots[at].pfn)) & mask) >= ((at - hole) & mask)) {
            space->slots[hole] = space->slots[at];
            hole = at;
        }
    }
    space->slots[hole].pfn = 0;
}


static void give(struct pv_iova *space, uint64_t pfn, uint64_t pages)
{
    gaps_give(&space->gaps, pfn, pages);
    space->outstanding--;
}

static void empty(struct pv_iova *space, struct magazine *magazine, uint32_t order)
{
    for (uint32_t i = 0; i < magazine->size; i++)
        give(space, magazine->pfns[i], 1ull << order);
    space->cached -= magazine->size;
    space->cached_pages -= (uint64_t)magazine->size << order;
    magazine->size = 0;
}

/* The newest range that ends at or below limit. */
static uint64_t pop(struct pv_iova *space, struct magazine *magazine, uint32_t order, uint64_t limit)
{
    uint64_t pages = 1ull << order;
    for (uint32_t i = magazine->size; i--;) {
        uint64_t pfn = magazine->pfns[i];
        if (pfn + pages - 1 <= limit) {
            magazine->pfns[i] = magazine->pfns[--magazine->size];
            space->cached--;
            space->cached_pages -= pages;
            return pfn;
        }
    }
    return PV_IOVA_NONE;
}

static uint64_t cache_get(struct pv_iova *space, uint32_t vp, uint32_t order, uint64_t limit)
{
    struct vp_cache *cache = &space->caches[(size_t)vp * PV_IOVA_ORDERS + order];
    if (!cache->loaded || !cache->loaded->size) {
        if (cache->previous && cache->previous->size) {
            struct magazine *swap = cache->loaded;
            cache->loaded = cache->previous;
            cache->previous = swap;
        } else if (space->depot_size[order]) {
            if (cache->loaded) {
                free(cache->loaded);
                space->magazines--;
            }
            cache->loaded = space->depot[order][--space->depot_size[order]];
        } else {
            return PV_IOVA_NONE;
        }
    }
    return pop(space, cache->loaded, order, limit);
}

/* A magazine with room in cache->loaded; false for lack of memory. */
static bool cache_room(struct pv_iova *space, struct vp_cache *cache, uint32_t order)
{
    if (cache->loaded && cache->loaded->size < PV_IOVA_MAGAZINE)
        return true;
    if (cache->previous && cache->previous->size < PV_IOVA_MAGAZINE) {
        struct magazine *swap = cache->loaded;
        cache->loaded = cache->previous;
        cache->previous = swap;
        return true;
    }
    struct magazine *fresh = malloc(sizeof(*fresh));
    if (!fresh)
        return false;
    fresh->size = 0;
    space->magazines++;
    if (!cache->loaded) {
        cache->loaded = fresh;
    } else if (!cache->previous) {
        cache->previous = cache->loaded;
        cache->loaded = fresh;
    } else {
        if (space->depot_size[order] < PV_IOVA_DEPOT) {
            space->depot[order][space->depot_size[order]++] = cache->loaded;
        } else {
            empty(space, cache->loaded, order);
            free(cache->loaded);
            space->magazines--;
        }
        cache->loaded = fresh;
    }
    return true;
}

static bool cache_put(struct pv_iova *space, uint32_t vp, uint32_t order, uint64_t pfn)
{
    struct vp_cache *cache = &space->caches[(size_t)vp * PV_IOVA_ORDERS + order];
    if (!cache_room(space, cache, order))
        return false;
    cache->loaded->pfns[cache->loaded->size++] = pfn;
    space->cached++;
    space->cached_pages += 1ull << order;
    return true;
}

void pv_iova_purge(struct pv_iova *space)
{
    for (size_t i = 0; i < (size_t)space->vps * PV_IOVA_ORDERS; i++) {
        if (space->caches[i].loaded)
            empty(space, space->caches[i].loaded, i % PV_IOVA_ORDERS);
        if (space->caches[i].previous)
            empty(space, space->caches[i].previous, i % PV_IOVA_ORDERS);
    }
    for (uint32_t order = 0; order < PV_IOVA_ORDERS; order++) {
        while (space->depot_size[order]) {
            struct magazine *magazine = space->depot[order][--space->depot_size[order]];
            empty(space, magazine, order);
            free(magazine);
            space->magazines--;
        }
    }
}


static uint64_t take(struct pv_iova *space, uint64_t pages, uint32_t order, uint64_t limit)
{
    if (!gaps_reserve(&space->gaps, space->outstanding + 3))
        return PV_IOVA_NONE;
    uint64_t pfn = gaps_take(&space->gaps, pages, order, limit);
    if (pfn != GAPS_NONE)
        space->outstanding++;
    return pfn;
}

uint64_t pv_iova_alloc(struct pv_iova *space, uint32_t vp, uint64_t pages, uint64_t limit, int purge)
{
    if (!pages || pages >> 32 || vp >= space->vps || !table_room(space))
        return PV_IOVA_NONE;
    uint32_t order = order_for(pages);
    uint64_t occupied = rounded(pages), pfn = PV_IOVA_NONE;
    if (order < PV_IOVA_ORDERS)
        pfn = cache_get(space, vp, order, limit);
    if (pfn == PV_IOVA_NONE)
        pfn = take(space, occupied, order, limit);
    if (pfn == PV_IOVA_NONE && purge && space->cached) {
        pv_iova_purge(space);
        pfn = take(space, occupied, order, limit);
    }
    if (pfn == PV_IOVA_NONE)
        return PV_IOVA_NONE;
    place(space, (struct pv_iova_range){.pfn = pfn, .pages = (uint32_t)pages, .cookie = -1});
    space->live++;
    space->live_pages += occupied;
    return pfn;
}

int pv_iova_free(struct pv_iova *space, uint32_t vp, uint64_t pfn)
{
    struct pv_iova_range *range = pv_iova_find(space, pfn);
    if (!range)
        return -ENOENT;
    uint64_t occupied = rounded(range->pages);
    uint32_t order = order_for(range->pages);
    forget(space, range);
    space->live--;
    space->live_pages -= occupied;
    if (order >= PV_IOVA_ORDERS || vp >= space->vps || !cache_put(space, vp, order, pfn))
        give(space, pfn, occupied);
    return 0;
}

uint64_t pv_iova_ranges(const struct pv_iova *space, uint64_t *cursor, struct pv_iova_range *out, uint64_t max)
{
    uint64_t count = 0;
    for (; *cursor < space->slot_count && count < max; ++*cursor)
        if (space->slots[*cursor].pfn)
            out[count++] = space->slots[*cursor];
    return count;
}

void pv_iova_get_stats(const struct pv_iova *space, struct pv_iova_stats *out)
{
    *out = (struct pv_iova_stats){.live = space->live,
                                  .live_pages = space->live_pages,
                                  .cached = space->cached,
                                  .cached_pages = space->cached_pages,
                                  .gaps = space->gaps.count,
                                  .visited = space->gaps.visited};
    gaps_check(&space->gaps, &out->gap_pages);
    out->bytes = sizeof(*space) + space->slot_count * sizeof(*space->slots) +
                 space->gaps.capacity * sizeof(struct gap) + space->magazines * sizeof(struct magazine) +
                 (uint64_t)space->vps * PV_IOVA_ORDERS * sizeof(*space->caches);
}

int pv_iova_check(const struct pv_iova *space)
{
    uint64_t pages, live = 0, live_pages = 0;
    int wrong = gaps_check(&space->gaps, &pages);
    if (wrong)
        return wrong;
    for (uint64_t i = 0; i < space->slot_count; i++) {
        if (!space->slots[i].pfn)
            continue;
        live++;
        live_pages += rounded(space->slots[i].pages);
    }
    if (live != space->live || live_pages != space->live_pages)
        return 10;
    return pages + live_pages + space->cached_pages == space->total_pages ? 0 : 11;
}
