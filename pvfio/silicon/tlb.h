/*
 * The IOTLB of one requester: set-associative, tagged by domain, entries of every page size.
 *
 * Its requester alone inserts and looks up, inside a section. Anyone may invalidate who holds the IOMMU's lock, so one at a
 * time: until a bit of `filled` that was cleared too early is set again, a second one would pass over what is there. An
 * entry is found by one probe per page size that was ever inserted. It is large, and memory that is never touched costs
 * nothing: what an invalidation takes grows with the entries there are, or with the pages it is about where those are
 * fewer, not with the room.
 *
 * Not modelled: paging-structure caches, global pages, the replacement policies of real parts (here: round robin).
 */
#ifndef PVFIO_TLB_H
#define PVFIO_TLB_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define TLB_SETS 4096
#define TLB_WAYS_LG2 2
#define TLB_WAYS (1u << TLB_WAYS_LG2)
#define TLB_DOMAIN_SHIFT 46 /* of the tag: above a 57-bit IOVA's page number and its size mark */

struct tlb_entry {
    _Atomic uint64_t tag;  /* domain, page number, size; 0: empty */
    _Atomic uint64_t data; /* host pointer of the page, permissions in the low bits */
};

struct tlb {
    struct tlb_entry entry[TLB_SETS][TLB_WAYS];
    uint8_t next_way[TLB_SETS];
    _Atomic uint64_t filled[TLB_SETS / 64]; /* a bit per set: it may have entries */
    _Atomic uint64_t sizes;    /* bit n: a page of 2^n bytes may be here */
    _Atomic uint64_t hits, misses, invalidations;
};

/* Page number and size in one number: the lowest set bit marks the size. */
static inline uint64_t tlb_tag(uint16_t domain, uint64_t iova, unsigned lg2)
{
    uint64_t page = iova >> lg2 << (lg2 - 12);
    return (uint64_t)domain << TLB_DOMAIN_SHIFT | page << 1 | 1ull << (lg2 - 12);
}

/* Neighbours share a set, so that a range is in few of them, and each has a way where it is looked for first. */
static inline unsigned tlb_set(uint64_t iova, unsigned lg2)
{
    uint64_t page = iova >> lg2 >> TLB_WAYS_LG2;
    return (page ^ page >> 8 ^ page >> 16) & (TLB_SETS - 1);
}

static inline unsigned tlb_way(uint64_t iova, unsigned lg2)
{
    return iova >> lg2 & (TLB_WAYS - 1);
}

static inline bool tlb_find(struct tlb *tlb, uint16_t domain, uint64_t iova, uint64_t *data, unsigned *lg2)
{
    uint64_t sizes = atomic_load_explicit(&tlb->sizes, memory_order_relaxed);
    while (sizes) {
        unsigned size = (unsigned)__builtin_ctzll(sizes);
        uint64_t tag = tlb_tag(domain, iova, size);
        struct tlb_entry *set = tlb->entry[tlb_set(iova, size)];
        unsigned first = tlb_way(iova, size);
        for (unsigned i = 0; i < TLB_WAYS; i++) {
            struct tlb_entry *e = &set[i ^ first];
            if (atomic_load_explicit(&e->tag, memory_order_relaxed) == tag) {
                *data = atomic_load_explicit(&e->data, memory_order_relaxed);
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

static inline bool tlb_is_filled(struct tlb *tlb, unsigned set)
{
    return atomic_load(&tlb->filled[set / 64]) >> set % 64 & 1;
}

/*
 * `sequence` is what the section read of `announced` when it began: an invalidation since then may be about this very
 * entry. The order is tag, bit, `announced`: an invalidation that does not see the bit yet has announced itself before.
 */
static inline void tlb_insert(struct tlb *tlb, uint16_t domain, uint64_t iova, unsigned lg2, uint64_t data,
                              const _Atomic uint64_t *announced, uint64_t sequence)
{
    uint64_t tag = tlb_tag(domain, iova, lg2);
    unsigned set = tlb_set(iova, lg2);
    unsigned way = 0;
    while (way < TLB_WAYS && atomic_load_explicit(&tlb->entry[set][way].tag, memory_order_relaxed) != tag)
        way++;
    if (way == TLB_WAYS) {
        way = tlb_way(iova, lg2);
        if (atomic_load_explicit(&tlb->entry[set][way].tag, memory_order_relaxed))
            way = tlb->next_way[set]++ % TLB_WAYS;
    }
    struct tlb_entry *e = &tlb->entry[set][way];
    atomic_store_explicit(&e->tag, 0, memory_order_relaxed);
    atomic_store_explicit(&e->data, data, memory_order_relaxed);
    atomic_fetch_or_explicit(&tlb->sizes, 1ull << lg2, memory_order_relaxed);
    atomic_store(&e->tag, tag);
    if (!tlb_is_filled(tlb, set))
        atomic_fetch_or(&tlb->filled[set / 64], 1ull << set % 64);
    if (atomic_load(announced) != sequence)
        atomic_store(&e->tag, 0);
}

static inline unsigned tlb_count_filled(struct tlb *tlb)
{
    unsigned count = 0;
    for (unsigned word = 0; word < TLB_SETS / 64; word++)
        count += (unsigned)__builtin_popcountll(atomic_load_explicit(&tlb->filled[word], memory_order_relaxed));
    return count;
}

static inline unsigned tlb_used_ways(const struct tlb_entry *set)
{
    unsigned used = 0;
    for (unsigned way = 0; way < TLB_WAYS; way++)
        used += atomic_load(&set[way].tag) != 0;
    return used;
}

/* Of the sets that `word` of `filled` is about: the first in `bits`, which loses it. */
static inline unsigned tlb_take_set(unsigned word, uint64_t *bits)
{
    unsigned set = 64 * word + (unsigned)__builtin_ctzll(*bits);
    *bits &= *bits - 1;
    return set;
}

static inline void tlb_clear(struct tlb *tlb)
{
    for (unsigned word = 0; word < TLB_SETS / 64; word++) {
        /* First the bits: whoever stores a tag after this sets its own again. */
        uint64_t bits = atomic_load(&tlb->filled[word]) ? atomic_exchange(&tlb->filled[word], 0) : 0;
        while (bits) {
            struct tlb_entry *set = tlb->entry[tlb_take_set(word, &bits)];
            for (unsigned way = 0; way < TLB_WAYS; way++)
                atomic_store_explicit(&set[way].tag, 0, memory_order_relaxed);
        }
    }
}

static inline uint64_t tlb_entries(struct tlb *tlb)
{
    uint64_t count = 0;
    for (unsigned word = 0; word < TLB_SETS / 64; word++)
        for (uint64_t bits = atomic_load(&tlb->filled[word]); bits;)
            count += tlb_used_ways(tlb->entry[tlb_take_set(word, &bits)]);
    return count;
}

/* Drops the entries of a set whose tags are lowest to lowest + span. */
static inline void tlb_drop_set(struct tlb *tlb, unsigned number, uint64_t lowest, uint64_t span)
{
    struct tlb_entry *set = tlb->entry[number];
    unsigned found = 0;
    for (unsigned way = 0; way < TLB_WAYS; way++)
        found |= (unsigned)(atomic_load_explicit(&set[way].tag, memory_order_relaxed) - lowest <= span) << way;
    if (!found)
        return;
    for (unsigned way = 0; way < TLB_WAYS; way++)
        if (found >> way & 1)
            atomic_store_explicit(&set[way].tag, 0, memory_order_relaxed);
    if (tlb_used_ways(set))
        return;
    uint64_t bit = 1ull << number % 64;
    atomic_fetch_and(&tlb->filled[number / 64], ~bit);
    if (tlb_used_ways(set)) /* inserted meanwhile, by one who may have seen the bit */
        atomic_fetch_or(&tlb->filled[number / 64], bit);
}

static inline void tlb_probe_set(struct tlb *tlb, unsigned number, uint64_t lowest, uint64_t span)
{
    if (tlb_is_filled(tlb, number))
        tlb_drop_set(tlb, number, lowest, span);
}

/*
 * Drops what meets [first, last], a power of two of bytes at a multiple of it, or less than a page: by probing for the
 * pages of each size, or by looking at all there is where that is less. The tags of the pages inside it are neighbours.
 */
static inline void tlb_drop(struct tlb *tlb, uint16_t domain, uint64_t first, uint64_t last)
{
    uint64_t sizes = atomic_load_explicit(&tlb->sizes, memory_order_relaxed);
    uint64_t pages = (last >> 12) - (first >> 12) + 1;
    uint64_t lowest = tlb_tag(domain, first, 12), span = 2 * (pages - 1);
    bool all = pages >= 128 && pages / TLB_WAYS >= tlb_count_filled(tlb);
    for (; sizes; sizes &= sizes - 1) {
        unsigned lg2 = (unsigned)__builtin_ctzll(sizes);
        if (pages >> (lg2 - 12) <= 1)
            tlb_probe_set(tlb, tlb_set(first, lg2), tlb_tag(domain, first, lg2), 0);
        else if (!all)
            for (uint64_t page = first >> lg2; page <= last >> lg2; page += TLB_WAYS)
                tlb_probe_set(tlb, tlb_set(page << lg2, lg2), lowest, span);
    }
    for (unsigned word = 0; all && word < TLB_SETS / 64; word++)
        for (uint64_t bits = atomic_load(&tlb->filled[word]); bits;)
            tlb_drop_set(tlb, tlb_take_set(word, &bits), lowest, span);
}

#endif
