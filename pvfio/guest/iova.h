/*
 * IOVAs for the DMA API: which pages of a device's address space are in use.
 *
 * A range is aligned to its size (rounded up to a power of two) and begins the highest free block of that size below the
 * device's mask; where no whole block is free, it lies in the highest place that holds it. Ranges of
 * up to 32 pages are rounded up and, when freed, kept in magazines of 128: two a VP and size, and a depot of 32 a
 * size, as Linux's iova rcache has them. So the same ranges go round without the tree of gaps (iova_gaps.h) being touched.
 * What is in the magazines is given back to the tree when it has no place left. Reserved ranges are never handed out.
 *
 * A range in use has an entry {pages, cookie, state} found by its first page; the cookie is the owner's. "Ended" is the
 * state of a range that is unmapped and waits for a flush before it can be freed.
 *
 * Page 0 is never handed out. Not modelled: locking (one task at a time), NUMA.
 */
#ifndef PVFIO_IOVA_H
#define PVFIO_IOVA_H

#include <stdint.h>

/* cffi: begin */
#define PV_IOVA_NONE 0xffffffffffffffff
#define PV_IOVA_MAGAZINE 128
#define PV_IOVA_DEPOT 32
#define PV_IOVA_ORDERS 6

struct pv_iova;

struct pv_iova_range {
    uint64_t pfn;
    int64_t cookie;
    uint32_t pages; /* as asked for, before rounding */
    uint32_t ended;
};

struct pv_iova_stats {
    uint64_t live;        /* ranges in use, ended ones included */
    uint64_t live_pages;  /* rounding included */
    uint64_t cached;      /* ranges in magazines */
    uint64_t cached_pages;
    uint64_t gaps;
    uint64_t gap_pages;
    uint64_t visited;     /* gaps looked at in all searches */
    uint64_t bytes;       /* of process memory */
};

/* Pages first to last, inclusive, both below 2^52; first is at least 1. NULL for a space that cannot be, or no memory. */
struct pv_iova *pv_iova_create(uint64_t first, uint64_t last, uint32_t vps);
void pv_iova_destroy(struct pv_iova *space);
/* Keeps what is free of [first, last] from being handed out. 0 and the pages, or -EINVAL, -ENOMEM. */
int pv_iova_reserve(struct pv_iova *space, uint64_t first, uint64_t last, uint64_t *pages);
/* The first page of `pages` pages whose last, after rounding, is at most `limit`; PV_IOVA_NONE where there are none (or no
 * memory). purge: empty the magazines before giving up. */
uint64_t pv_iova_alloc(struct pv_iova *space, uint32_t vp, uint64_t pages, uint64_t limit, int purge);
/* The entry of the range that begins there; NULL where none does. Valid until the next alloc or free. */
struct pv_iova_range *pv_iova_find(struct pv_iova *space, uint64_t pfn);
/* 0, or -ENOENT where no range begins there. */
int pv_iova_free(struct pv_iova *space, uint32_t vp, uint64_t pfn);
/* Up to max entries from *cursor on (0 at first), in no order; how many. Nothing may be allocated or freed meanwhile. */
uint64_t pv_iova_ranges(const struct pv_iova *space, uint64_t *cursor, struct pv_iova_range *out, uint64_t max);
/* Gives what is in the magazines back. */
void pv_iova_purge(struct pv_iova *space);
void pv_iova_get_stats(const struct pv_iova *space, struct pv_iova_stats *out);
/* 0, or a number that says which invariant is broken. */
int pv_iova_check(const struct pv_iova *space);
/* cffi: end */

#endif
