/*
 * The index of a container's mappings, ordered by IOVA: a B+tree with 1 KiB nodes.
 *
 * An entry is {iova, size, vaddr, flags, cookie}; entries never overlap. All ends are inclusive inside, so a mapping may
 * end at the top of the 64-bit space. Every operation is O(log n) with one node per level to touch; nothing recurses, and a
 * failed insert changes nothing. The way to the last leaf is kept: what follows in its neighbourhood needs no descent.
 * Memory comes in chunks that grow with the index and go back when it becomes empty.
 *
 * Not modelled: locking (the container's owner serialises), coalescing of neighbours, splitting of entries.
 */
#ifndef PVFIO_MAPPINGS_H
#define PVFIO_MAPPINGS_H

#include <stdint.h>

/* cffi: begin */
struct pv_mappings;

struct pv_mapping {
    uint64_t iova;
    uint64_t size;
    uint64_t vaddr;
    uint64_t cookie; /* the owner's, below 2^56 */
    uint32_t flags;  /* the owner's, below 2^8 */
    uint32_t reserved;
};

/* max_bytes: what the index may take for its nodes, 0 for no limit. NULL for lack of memory. */
struct pv_mappings *pv_mappings_create(uint64_t max_bytes);
void pv_mappings_destroy(struct pv_mappings *mappings);
uint64_t pv_mappings_count(const struct pv_mappings *mappings);
/* Bytes taken from the system. */
uint64_t pv_mappings_bytes(const struct pv_mappings *mappings);
void pv_mappings_clear(struct pv_mappings *mappings);

/* Asks the processor for what a call about this iova will touch in a large index, and waits for none of it. Each step
 * needs what the one before has asked for: 0 the node above the leaf, 1 the leaf's address and first line, 2 all of it. */
void pv_mappings_prefetch(const struct pv_mappings *mappings, uint64_t iova, uint32_t step);
/* 0; -EINVAL (size 0, cookie or flags too wide), -EOVERFLOW (wraps), -EEXIST (overlaps an entry), -ENOMEM. */
int pv_mappings_insert(struct pv_mappings *mappings, uint64_t iova, uint64_t size, uint64_t vaddr, uint32_t flags,
                       uint64_t cookie);
/* The entry that contains iova. 1 and *out, or 0. */
int pv_mappings_find(struct pv_mappings *mappings, uint64_t iova, struct pv_mapping *out);
/* The entries that overlap [start, last], in order, at most max of them. How many were stored. */
uint64_t pv_mappings_range(struct pv_mappings *mappings, uint64_t start, uint64_t last, struct pv_mapping *out,
                           uint64_t max);
/* Takes out the entry that begins at iova. 1 and *out (may be NULL), or 0. */
int pv_mappings_remove(struct pv_mappings *mappings, uint64_t iova, struct pv_mapping *out);
/* Replaces the flags of the entry that begins at iova. 1, or 0: there is none, or the flags are too wide. */
int pv_mappings_set_flags(struct pv_mappings *mappings, uint64_t iova, uint32_t flags);
/* Walks the whole tree and checks its invariants: 0, or a number that says which one is broken. */
int pv_mappings_check(const struct pv_mappings *mappings);
/* cffi: end */

#endif
