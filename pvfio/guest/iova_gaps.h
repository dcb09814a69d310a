/*
 * The free gaps of an IOVA space, in pages: a treap ordered by address in which every node knows the largest gap and the
 * largest aligned power of two below it. So the highest block of a power of two is found without looking at gaps that hold
 * none, however many there are.
 *
 * Not modelled: locking.
 */
#ifndef PVFIO_IOVA_GAPS_H
#define PVFIO_IOVA_GAPS_H

#include <stdbool.h>
#include <stdint.h>

#define GAPS_NONE UINT64_MAX

struct gap {
    uint64_t start, last;
    uint64_t max_size; /* of this subtree's gaps, in pages */
    uint32_t left, right;
    uint32_t priority;
    int8_t max_order; /* of this subtree: log2 of the largest aligned power of two */
};

/* All zero at first. Node 0 is "none". */
struct gaps {
    struct gap *nodes;
    uint32_t capacity, used; /* nodes there are; nodes ever handed out, node 0 included */
    uint32_t free_list, root;
    uint32_t count;
    uint32_t random;
    uint64_t visited; /* gaps looked at in all searches */
};

/* Room for that many gaps in all; false for lack of memory. */
bool gaps_reserve(struct gaps *gaps, uint64_t count);
/* Takes `pages` (at most 2^align) pages out, from an aligned start, none above `limit`: the first ones of the highest free
 * 2^align; where no such block is free, the highest place that holds them, which looks at gaps one by one. GAPS_NONE where
 * there is none. Needs room for one more gap. */
uint64_t gaps_take(struct gaps *gaps, uint64_t pages, uint32_t align, uint64_t limit);
/* Takes [start, last] out, wherever it is free. Needs room for one more gap. Pages that were free. */
uint64_t gaps_take_range(struct gaps *gaps, uint64_t start, uint64_t last);
/* Gives pages back; false, and nothing done, where one of them is free already. Needs room for one more gap. */
bool gaps_give(struct gaps *gaps, uint64_t start, uint64_t pages);
/* 0, or which invariant is broken; *pages: in all gaps. */
int gaps_check(const struct gaps *gaps, uint64_t *pages);
void gaps_destroy(struct gaps *gaps);

#endif
