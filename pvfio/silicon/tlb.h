/*
 * The IOTLB of one requester: set-associative, tagged by domain, entries of every page size.
 *
 * Its requester alone inserts and looks up, inside a section; anyone may invalidate. An entry is found by one probe
 * per page size that was ever inserted.
 *
 * Not modelled: paging-structure caches, global pages, the replacement policies of real parts (here: round robin).
 */
#ifndef PVFIO_TLB_H
#define PVFIO_TLB_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define TLB_SETS 256
#define TLB_WAYS 4
#define TLB_DOMAIN_SHIFT 46 /* of the tag: above a 57-bit IOVA's page number and its size mark */

struct tlb_entry {
    _Atomic uint64_t tag;  /* domain, page number, size; 0: empty */
    _Atomic uint64_t data; /* host pointer of the page, permissions in the low bits */
};

struct tlb {
    struct tlb_entry entry[TLB_SETS][TLB_WAYS];
    uint8_t next_way[TLB_SETS];
    _Atomic uint64_t sizes;    /* bit n: a page of 2^n bytes may be here */
    _Atomic uint64_t sequence; /* how many invalidations began */
    _Atomic uint64_t hits, misses, invalidations;
};

/* Page number and size in one number: the lowest set bit marks the size. */
static inline uint64_t tlb_tag(uint16_t domain, uint64_t iova, unsigned lg2)
{
    uint64_t page = iova >> lg2 << (lg2 - 12);
    return (uint64_t)domain << TLB_DOMAIN_SHIFT | page << 1 | 1ull << (lg2 - 12);
}

static inline unsigned tlb_set(uint64_t iova, unsigned lg2)
{
    uint64_t page = iova >> lg2;
    return (page ^ page >> 8 ^ page >> 16) & (TLB_SETS - 1);
}

static inline bool tlb_find(struct tlb *tlb, uint16_t domain, uint64_t iova, uint64_t *data, unsigned *lg2)
{
    uint64_t sizes = atomic_load_explicit(&tlb->sizes, memory_order_relaxed);
    while (sizes) {
        unsigned size = (unsigned)__builtin_ctzll(sizes);
        uint64_t tag = tlb_tag(domain, iova, size);
        struct tlb_entry *set = tlb->entry[tlb_set(iova, size)];
        for (unsigned way = 0; way < TLB_WAYS; way++) {
            if (atomic_load_explicit(&set[way].tag, memory_order_relaxed) == tag) {
                *data = atomic_load_explicit(&set[way].data, memory_order_relaxed);
                *lg2 = size;
                return true;
            }
        }
        sizes &= sizes - 1;
    }
    return false;
}

static inline void tlb_bump(_Atomic uint64_t *counter)
{
    /* One writer at a time; readers only want a recent value. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* `sequence` is what the section read when it began: an invalidation since then may be about this very entry. */
static inline void tlb_insert(struct tlb *tlb, uint16_t domain, uint64_t iova, unsigned lg2, uint64_t data,
                              uint64_t sequence)
{
    uint64_t tag = tlb_tag(domain, iova, lg2);
    unsigned set = tlb_set(iova, lg2);
    unsigned way = 0;
    while (way < TLB_WAYS && atomic_load_explicit(&tlb->entry[set][way].tag, memory_order_relaxed) != tag)
        way++;
    if (way == TLB_WAYS)
        way = tlb->next_way[set]++ % TLB_WAYS;
    struct tlb_entry *e = &tlb->entry[set][way];
    atomic_store_explicit(&e->tag, 0, memory_order_relaxed);
    atomic_store_explicit(&e->data, data, memory_order_relaxed);
    atomic_fetch_or_explicit(&tlb->sizes, 1ull << lg2, memory_order_relaxed);
    atomic_store(&e->tag, tag);
    if (atomic_load(&tlb->sequence) != sequence)
        atomic_store(&e->tag, 0);
}

static inline void tlb_clear(struct tlb *tlb)
{
    for (unsigned set = 0; set < TLB_SETS; set++)
        for (unsigned way = 0; way < TLB_WAYS; way++)
            atomic_store_explicit(&tlb->entry[set][way].tag, 0, memory_order_relaxed);
}

static inline uint64_t tlb_entries(struct tlb *tlb)
{
    uint64_t count = 0;
    for (unsigned set = 0; set < TLB_SETS; set++)
        for (unsigned way = 0; way < TLB_WAYS; way++)
            count += atomic_load_explicit(&tlb->entry[set][way].tag, memory_order_relaxed) != 0;
    return count;
}

/* Does the entry's page meet [first, last] of that domain? */
static inline bool tlb_meets(uint64_t tag, uint16_t domain, uint64_t first, uint64_t last)
{
    if (!tag || tag >> TLB_DOMAIN_SHIFT != domain)
        return false;
    uint64_t body = tag & ((1ull << TLB_DOMAIN_SHIFT) - 1);
    uint64_t mark = body & -body;
    uint64_t page = (body - mark) >> 1 << 12;
    return page <= last && page + (mark << 12) - 1 >= first;
}

static inline void tlb_drop_set(struct tlb_entry *set, uint16_t domain, uint64_t first, uint64_t last)
{
    for (unsigned way = 0; way < TLB_WAYS; way++)
        if (tlb_meets(atomic_load_explicit(&set[way].tag, memory_order_relaxed), domain, first, last))
            atomic_store_explicit(&set[way].tag, 0, memory_order_relaxed);
}

/* Drops what meets [first, last]: by probing where few pages of each size can, else by looking at every entry. */
static inline void tlb_drop(struct tlb *tlb, uint16_t domain, uint64_t first, uint64_t last)
{
    uint64_t sizes = atomic_load_explicit(&tlb->sizes, memory_order_relaxed);
    uint64_t smallest = sizes & -sizes;
    if (!sizes)
        return;
    if ((last - first) / smallest >= 16) {
        for (unsigned set = 0; set < TLB_SETS; set++)
            tlb_drop_set(tlb->entry[set], domain, first, last);
        return;
    }
    for (; sizes; sizes &= sizes - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(sizes);
        for (uint64_t page = first >> lg2; page <= last >> lg2; page++)
            tlb_drop_set(tlb->entry[tlb_set(page << lg2, lg2)], domain, first, last);
    }
}

#endif
