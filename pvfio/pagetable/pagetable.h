/*
 * Radix page tables: one algorithm over three formats (format.h).
 *
 * A table belongs to one writer at a time: calls that change it are serialised by its owner. Hardware walkers read
 * the entries meanwhile: every entry is a 64-bit atomic, a table is published after its entries, and the root and
 * its level are one word. Table pages come from the owner's allocator. A page that unmap empties is unhooked at once and
 * waits on a list inside the table; pt_release_detached, to be called after the flush, hands it back.
 *
 * Beside each table page stands a node in process memory: the number of its leaves, its children, and its address.
 * So a table is known to be empty without looking at 512 entries, and what software follows cannot be bent by a
 * device that scribbles over guest memory.
 *
 * vtdss and amdv1 leaves are born clean: walkers set their accessed and dirty bits (silicon/walker.c), and the owner reads
 * and clears them here, while walkers run. x86_64 leaves are born with both set, as a pvIOMMU guest writes them, so they
 * say nothing.
 *
 * Not modelled: changing a leaf's permission in place, accessed bits of entries that point to tables.
 */
#ifndef PVFIO_PAGETABLE_H
#define PVFIO_PAGETABLE_H

#include <stdint.h>

#include "../memory/memory.h"

/* cffi: begin */
#define PT_X86_64 0
#define PT_VTDSS 1
#define PT_AMDV1 2

#define PT_READ 1
#define PT_WRITE 2

#define PT_NONE 0xffffffffffffffff
#define PT_MAX_LEVELS 6

struct pv_space;
struct pt_table;

struct pt_config {
    int format;
    uint32_t levels;        /* x86_64: 4, 5; vtdss: 3, 4, 5; amdv1: 1 to 6, where it begins */
    uint32_t input_bits;    /* 0: all the levels reach (amdv1: 64) */
    uint32_t output_bits;   /* 0: 52 */
    uint64_t pgsize_bitmap; /* 0: every size of the format */
    const struct pv_space *space;          /* where the table pages are */
    void *owner;                           /* first argument of the two below */
    uint64_t (*alloc_page)(void *owner);   /* a zeroed page, or PV_PHYS_NONE */
    void (*free_page)(void *owner, uint64_t phys);
};

/* One entry on the way of an IOVA, from the root down. */
struct pt_walk_entry {
    uint64_t table; /* physical address of the table */
    uint64_t entry;
    uint64_t addr;  /* of the page or the next table; 0 where not present */
    uint32_t index;
    uint8_t level;
    uint8_t present;
    uint8_t leaf;
    uint8_t perm;
    uint8_t size_lg2;
    uint8_t reserved;
};

struct pt_stats {
    uint64_t tables;   /* table pages in use, the root included */
    uint64_t detached; /* table pages that wait for pt_release_detached */
};

/* NULL and *error: -EINVAL for a configuration the format cannot have, -ENOMEM. */
struct pt_table *pt_create(const struct pt_config *config, int *error);
/* Hands every page back. The table must be attached to nothing. */
void pt_destroy(struct pt_table *table);

/* All or nothing: 0, or the negative errno with nothing mapped (and no leaf ever shown to a walker):
 * EINVAL size 0 or no permission, EOVERFLOW iova + size wraps, ENXIO not aligned to the smallest page size, ERANGE
 * beyond the input or output width, EADDRINUSE overlaps a mapping, ENOMEM no table page. Tables made in vain wait on
 * the list as unmapped ones do; amdv1's top stays grown. */
int pt_map_range(struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t size, uint32_t perm);
/* 0 and how many bytes; or -EINVAL, -EOVERFLOW, -ENXIO, -ERANGE as above. Holes are passed over. A leaf that begins
 * in the range goes whole; when the range begins inside a leaf nothing is unmapped. */
int pt_unmap_range(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *unmapped);
uint64_t pt_release_detached(struct pt_table *table);

/*
 * Dirty and accessed pages: `bitmap` has a bit for each 4 KiB page of the range, bit 0 of word 0 the first; bits are added,
 * none removed. A large leaf that is dirty sets the bits of all its pages in the range. Unless PT_PEEK is given the
 * leaf is made clean; one that is only partly in the range stays dirty, so that nothing is lost. *leaves says how many
 * entries had the bit: after a call that cleared some, the owner flushes the IOMMU, for a cached translation sets no
 * bits. -EOPNOTSUPP: x86_64. -EINVAL (size 0, unknown flags), -EOVERFLOW, -ENXIO, -ERANGE as above.
 */
#define PT_PEEK 1
int pt_read_clear_dirty(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *bitmap, uint32_t flags,
                        uint64_t *leaves);
int pt_read_clear_accessed(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *bitmap, uint32_t flags,
                           uint64_t *leaves);
/* pt_unmap_range, each entry by exchange, its dirty bit noted as above (of the pages in the range). -EOPNOTSUPP: x86_64. */
int pt_unmap_range_dirty(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *unmapped, uint64_t *bitmap);

/*
 * Leaves that meet the range are replaced by 4 KiB leaves to the same memory, with the same permissions and accessed
 * and dirty bits; at no moment does a walker find anything else. 0, -ENOMEM (what was split stays so), -EINVAL also
 * where the table has no 4 KiB pages, -EOVERFLOW, -ENXIO, -ERANGE. The owner flushes afterwards: the IOMMU may
 * hold the large pages.
 */
int pt_split_range(struct pt_table *table, uint64_t iova, uint64_t size);
/*
 * The way back: tables of the range that are full of leaves in a row, with the same permissions, become the leaf they
 * amount to (2 MiB, then 1 GiB; not amdv1's sizes between). It is accessed or dirty where one of them was; what a
 * walker marks during the call may be lost. *merged counts. The emptied tables wait for pt_release_detached.
 */
int pt_merge_range(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *merged);

/* Asks the processor for what a call about this iova will touch in a large table, and waits for none of it. Each step
 * needs what the one before has asked for: 0 the way to the lowest node, 1 that node, 2 the entry. */
void pt_prefetch(const struct pt_table *table, uint64_t iova, uint32_t step);
/* PT_NONE where nothing is mapped. */
uint64_t pt_iova_to_phys(const struct pt_table *table, uint64_t iova);
/* The entries as they are in memory; how many (the last is a leaf, not present, or malformed). */
uint32_t pt_walk(const struct pt_table *table, uint64_t iova, struct pt_walk_entry out[PT_MAX_LEVELS]);

/* Root address (bits 51:12) and level (bits 2:0) in one word, as the hardware reads it. */
uint64_t pt_top(const struct pt_table *table);
uint64_t pt_pgsize_bitmap(const struct pt_table *table);
void pt_get_stats(const struct pt_table *table, struct pt_stats *out);

/* log2 of the largest page of the bitmap that fits at the start of the range; 0: none. */
uint32_t pt_best_pgsize_lg2(uint64_t pgsize_bitmap, uint64_t iova, uint64_t phys, uint64_t size);
/* One entry, for tests and tools: as the hardware reads it; as software writes it (0: this level cannot hold it). */
void pt_decode_entry(int format, uint64_t entry, uint32_t level, struct pt_walk_entry *out);
uint64_t pt_encode_leaf(int format, uint32_t level, uint32_t size_lg2, uint64_t phys, uint32_t perm);
uint64_t pt_encode_table(int format, uint32_t level, uint64_t phys);

/* A series of map calls, `stride` apart, and then the unmaps of the same ranges (bench.c). */
struct pt_bench {
    uint64_t iova;
    uint64_t phys;
    uint64_t size;
    uint64_t stride;
    uint32_t calls;
    uint32_t perm;
};

/* 0 and the nanoseconds of each series, or what a call was refused with (-EIO: bytes missing); all unmapped again. */
int pt_bench(struct pt_table *table, const struct pt_bench *bench, uint64_t *map_ns, uint64_t *unmap_ns);
/* Nanoseconds of `calls` plain loops that store that many entries: the floor under a map. 0: no memory. */
uint64_t pt_bench_stores(uint32_t entries, uint32_t calls);
/* cffi: end */

#endif
