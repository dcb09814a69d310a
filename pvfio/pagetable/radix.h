/*
 * The algorithm of all formats. Every function takes the format as a compile-time constant and is inlined into one
 * instance per format (pagetable.c): no call through a pointer, no test of the format at run time.
 *
 * Emptiness is counted, not searched: each node knows its live entries and its children, so unmap detaches a table in
 * the step that empties it. No empty table is ever left attached but the root, and a large leaf never has to
 * displace one.
 */
#ifndef PVFIO_PAGETABLE_RADIX_H
#define PVFIO_PAGETABLE_RADIX_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

#include "format.h"

#define PT_INLINE static inline __attribute__((always_inline))

/* One table page. */
struct pt_node {
    _Atomic uint64_t *entries;
    uint64_t phys;
    struct pt_node *next; /* on the list of detached pages */
    uint16_t live;        /* present leaf entries */
    uint16_t children;
    uint8_t level;
    struct pt_node *child[]; /* level > 1: PT_ENTRIES */
};

struct pt_table {
    _Atomic uint64_t top; /* what the hardware reads */
    struct pt_node *root;
    uint64_t input_last;
    uint64_t output_last;
    uint64_t pgsize_bitmap;
    uint64_t tables;
    uint64_t detached;
    struct pt_node *detached_first;
    struct pt_node **detached_end;
    struct pt_config config;
};

/* Where dirty pages are noted: a bit per 4 KiB page of [first, last]. */
struct pt_marks {
    uint64_t *bitmap;
    uint64_t first;
    uint64_t last;
};

/* Leaves of one size that lie side by side in one table. */
struct pt_run {
    uint64_t bytes;
    unsigned lg2;
    unsigned level;
    unsigned pages;
    unsigned index;   /* of the first entry */
    unsigned entries; /* pages times the entries each takes */
};

struct pt_node *pt_node_new(struct pt_table *table, unsigned level);
/* Frees a node that no walker has seen. */
void pt_node_free(struct pt_table *table, struct pt_node *node);
/* Puts `entry` in the place of a child table, which waits for pt_release_detached. */
void pt_detach(struct pt_table *table, struct pt_node *parent, unsigned index, uint64_t entry);
int pt_check_range(const struct pt_table *table, uint64_t iova, uint64_t size);
/* Notes the pages of the leaf around `iova` that lie in the range. */
void pt_mark_leaf(const struct pt_marks *marks, uint64_t iova, unsigned size_lg2);

PT_INLINE uint64_t pt_load(const struct pt_node *node, unsigned index)
{
    return atomic_load_explicit(&node->entries[index], memory_order_relaxed);
}

PT_INLINE void pt_store(struct pt_node *node, unsigned index, uint64_t entry)
{
    atomic_store_explicit(&node->entries[index], entry, memory_order_release);
}

PT_INLINE bool pt_empty(const struct pt_node *node)
{
    return node->live == 0 && node->children == 0;
}

/* The last address a table of this level reaches, from any address in it. */
PT_INLINE uint64_t pt_last_of(unsigned level, uint64_t iova)
{
    return level >= PT_MAX_LEVELS ? UINT64_MAX : iova | ((1ull << pt_item_lg2(level + 1)) - 1);
}

/* The first address of an entry, from any address in its table. */
PT_INLINE uint64_t pt_item_iova(unsigned level, uint64_t iova, unsigned index)
{
    uint64_t first = level >= PT_MAX_LEVELS ? 0 : iova >> pt_item_lg2(level + 1) << pt_item_lg2(level + 1);
    return first | (uint64_t)index << pt_item_lg2(level);
}

PT_INLINE unsigned pt_best_lg2(uint64_t sizes, uint64_t iova, uint64_t phys, uint64_t size)
{
    uint64_t aligned = iova | phys;
    unsigned most = 63 - (unsigned)__builtin_clzll(size);
    if (aligned != 0 && (unsigned)__builtin_ctzll(aligned) < most)
        most = (unsigned)__builtin_ctzll(aligned);
    sizes &= (2ull << most) - 1;
    return sizes == 0 ? 0 : 63 - (unsigned)__builtin_clzll(sizes);
}

/*
 * The run at the start of the range. It ends with the table, and before the first address where a larger page fits;
 * in a format with one size per level that is never inside a table.
 */
PT_INLINE struct pt_run pt_next_run(int format, uint64_t sizes, uint64_t iova, uint64_t phys, uint64_t size)
{
    struct pt_run run;
    run.lg2 = pt_best_lg2(sizes, iova, phys, size);
    run.level = pt_level_of(run.lg2);
    unsigned item = pt_item_lg2(run.level);
    uint64_t room = pt_last_of(run.level, iova) - iova;
    uint64_t bytes = room < size ? room + 1 : size;
    if (format == PT_AMDV1) {
        uint64_t wider = sizes & pt_level_sizes(format, run.level) & ~((2ull << run.lg2) - 1);
        uint64_t wide = wider & -wider; /* the next larger size; where it does not fit, none does */
        uint64_t before = -iova & (wide - 1);
        if (wide != 0 && ((iova ^ phys) & (wide - 1)) == 0 && before != 0 && before < size && size - before >= wide)
            bytes = before < bytes ? before : bytes;
    }
    run.pages = (unsigned)(bytes >> run.lg2);
    run.bytes = (uint64_t)run.pages << run.lg2;
    run.index = pt_index(run.level, iova);
    run.entries = format == PT_AMDV1 ? run.pages << (run.lg2 - item) : run.pages;
    return run;
}

/* Down to the table of `level` for iova, making what is missing. */
PT_INLINE int pt_reach(int format, struct pt_table *table, uint64_t iova, unsigned level, struct pt_node **out)
{
    struct pt_node *node = table->root;
    while (node->level > level) {
        unsigned index = pt_index(node->level, iova);
        struct pt_node *child = node->child[index];
        if (__builtin_expect(child == NULL, 0)) {
            if (pt_present(format, pt_load(node, index)))
                return -EADDRINUSE;
            child = pt_node_new(table, node->level - 1u);
            if (child == NULL)
                return -ENOMEM;
            node->child[index] = child;
            node->children++;
            pt_store(node, index, pt_make_table(format, node->level, child->phys));
        }
        node = child;
    }
    *out = node;
    return 0;
}

PT_INLINE bool pt_run_is_free(int format, const struct pt_node *node, const struct pt_run *run)
{
    uint64_t seen = 0;
    for (unsigned i = run->index; i < run->index + run->entries; i++)
        seen |= pt_load(node, i);
    if (pt_present(format, seen))
        return false;
    if (node->level > 1 && node->children != 0) {
        for (unsigned i = run->index; i < run->index + run->entries; i++)
            if (node->child[i] != NULL)
                return false;
    }
    return true;
}

PT_INLINE void pt_write_run(int format, struct pt_node *node, const struct pt_run *run, uint64_t phys, unsigned perm)
{
    uint64_t entry = pt_make_leaf(format, run->level, run->lg2, phys, perm);
    uint64_t step = 1ull << run->lg2;
    unsigned copies = format == PT_AMDV1 ? 1u << (run->lg2 - pt_item_lg2(run->level)) : 1;
    unsigned end = run->index + run->entries;
    if (copies == 1) {
        for (unsigned i = run->index; i < end; i++, entry += step)
            pt_store(node, i, entry);
    } else {
        for (unsigned i = run->index; i < end; entry += step)
            for (unsigned n = 0; n < copies; n++)
                pt_store(node, i++, entry);
    }
    node->live = (uint16_t)(node->live + run->entries);
}

/* Detaches the empty tables of a range: what a map that failed has made. */
static inline void pt_prune(struct pt_table *table, struct pt_node *node, uint64_t iova, uint64_t last)
{
    if (node->level == 1)
        return;
    unsigned end = pt_index(node->level, last);
    for (unsigned i = pt_index(node->level, iova); i <= end; i++) {
        struct pt_node *child = node->child[i];
        uint64_t child_last = pt_last_of(node->level - 1u, iova);
        if (child != NULL) {
            pt_prune(table, child, iova, child_last < last ? child_last : last);
            if (pt_empty(child))
                pt_detach(table, node, i, 0);
        }
        iova = child_last + 1;
    }
}

/*
 * Two passes over a range of several runs: the first makes the tables and finds overlaps, the second writes the
 * leaves. So a map that fails has shown no leaf to a walker, and nothing needs a flush.
 */
PT_INLINE int pt_map(int format, struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t size, unsigned perm)
{
    uint64_t sizes = table->pgsize_bitmap;
    struct pt_node *node = NULL;
    for (uint64_t done = 0; done < size;) {
        struct pt_run run = pt_next_run(format, sizes, iova + done, phys + done, size - done);
        int error = pt_reach(format, table, iova + done, run.level, &node);
        if (error == 0 && !pt_run_is_free(format, node, &run))
            error = -EADDRINUSE;
        if (error != 0) {
            pt_prune(table, table->root, iova, iova + done + run.bytes - 1);
            return error;
        }
        if (run.bytes == size) {
            pt_write_run(format, node, &run, phys, perm);
            return 0;
        }
        done += run.bytes;
    }
    for (uint64_t done = 0; done < size;) {
        struct pt_run run = pt_next_run(format, sizes, iova + done, phys + done, size - done);
        node = table->root;
        while (node->level > run.level)
            node = node->child[pt_index(node->level, iova + done)];
        pt_write_run(format, node, &run, phys + done, perm);
        done += run.bytes;
    }
    return 0;
}

PT_INLINE bool pt_is_coded(uint64_t entry)
{
    return (entry >> PT_AMDV1_NEXT_SHIFT & 7) == PT_AMDV1_NEXT_SIZE;
}

/* A size that cannot be here counts as the level's own, so that clearing stays inside the table. */
PT_INLINE unsigned pt_coded_lg2(uint64_t entry, unsigned level)
{
    struct pt_entry e = pt_decode_amdv1(entry, level);
    return e.reserved ? pt_item_lg2(level) : e.size_lg2;
}

/*
 * Clears an entry. Where nobody asks for its dirty bit a store will do: a walker changes an entry only by
 * compare-and-swap from the value it read, which cannot succeed once the entry is 0. With `marks` it is an exchange:
 * what a walker set until then is seen, and it sets nothing afterwards.
 */
PT_INLINE void pt_take(int format, struct pt_node *node, unsigned index, uint64_t iova, const struct pt_marks *marks)
{
    if (marks == NULL) {
        pt_store(node, index, 0);
        return;
    }
    uint64_t entry = atomic_exchange(&node->entries[index], 0);
    if (entry & pt_dirty_bit(format)) {
        unsigned size_lg2 = pt_decode(format, entry, node->level).size_lg2;
        pt_mark_leaf(marks, pt_item_iova(node->level, iova, index), size_lg2);
    }
}

/* Clears all replicas of the amdv1 leaf that begins at `index`; how many, 0 where none begins there. Out of line: it is rare
 * where the rest is a loop of a few instructions. */
static __attribute__((noinline)) unsigned pt_clear_coded(struct pt_node *node, unsigned index, uint64_t iova,
                                                         const struct pt_marks *marks)
{
    unsigned level = node->level, copies = 1u << (pt_coded_lg2(pt_load(node, index), level) - pt_item_lg2(level));
    if ((index & (copies - 1)) != 0)
        return 0;
    for (unsigned n = 0; n < copies; n++)
        pt_take(PT_AMDV1, node, index + n, iova, marks);
    return copies;
}

/* The usual case in few instructions: leaves of the level's own size, one after the other, in a table without children.
 * Returns the first index that is something else. */
PT_INLINE unsigned pt_clear_plain(int format, struct pt_node *node, unsigned i, uint64_t iova, unsigned end,
                                  const struct pt_marks *marks)
{
    uint64_t kind = PT_AMDV1_PR | 7ull << PT_AMDV1_NEXT_SHIFT;
    for (; i <= end; i++) {
        uint64_t entry = pt_load(node, i);
        if (format == PT_AMDV1 ? (entry & kind) != PT_AMDV1_PR : !pt_present(format, entry))
            break;
        pt_take(format, node, i, iova, marks);
    }
    return i;
}

/*
 * Clears the leaves of one table from iova on, as far as `end`, to the next child table, or to a leaf that began
 * before iova (*stop). Returns the index it came to.
 */
PT_INLINE unsigned pt_clear(int format, struct pt_node *node, uint64_t iova, unsigned end, uint64_t *unmapped,
                            bool *stop, const struct pt_marks *marks)
{
    unsigned level = node->level, item = pt_item_lg2(level), i = pt_index(level, iova), cleared = 0;
    bool has_children = level > 1 && node->children != 0;
    *stop = (iova & ((1ull << item) - 1)) != 0 && pt_present(format, pt_load(node, i));
    if (!has_children && !*stop) {
        unsigned from = i;
        i = pt_clear_plain(format, node, i, iova, end, marks);
        cleared = i - from;
    }
    while (i <= end && !*stop) {
        uint64_t entry = pt_load(node, i);
        if (!pt_present(format, entry)) {
            i++;
            continue;
        }
        if (has_children && node->child[i] != NULL)
            break;
        if (format == PT_AMDV1 && __builtin_expect(pt_is_coded(entry), 0)) {
            unsigned copies = pt_clear_coded(node, i, iova, marks);
            *stop = copies == 0;
            cleared += copies;
            i += copies;
        } else {
            pt_take(format, node, i++, iova, marks);
            cleared++;
        }
    }
    *unmapped += (uint64_t)cleared << item;
    node->live = (uint16_t)(cleared < node->live ? node->live - cleared : 0);
    return i;
}

/* One pass over [iova, last]; last is inside what the root covers. marks may be NULL. */
PT_INLINE uint64_t pt_unmap(int format, struct pt_table *table, uint64_t iova, uint64_t last,
                            const struct pt_marks *marks)
{
    struct pt_node *path[PT_MAX_LEVELS + 1];
    uint64_t unmapped = 0;
    bool stop = false;
    while (!stop) {
        struct pt_node *node = table->root;
        while (node->level > 1) {
            struct pt_node *child = node->child[pt_index(node->level, iova)];
            if (child == NULL)
                break;
            path[node->level] = node;
            node = child;
        }
        unsigned level = node->level;
        uint64_t node_last = pt_last_of(level, iova);
        bool final = node_last >= last;
        unsigned end = final ? pt_index(level, last) : PT_ENTRIES - 1;
        unsigned index = pt_clear(format, node, iova, end, &unmapped, &stop, marks);
        while (node != table->root && pt_empty(node)) {
            struct pt_node *parent = path[node->level + 1];
            pt_detach(table, parent, pt_index(parent->level, iova), 0);
            node = parent;
        }
        if (index > end) {
            if (final)
                break;
            iova = node_last + 1;
        } else {
            unsigned item = pt_item_lg2(level);
            iova = (node_last & ~((1ull << item) - 1)) - ((uint64_t)(pt_index(level, node_last) - index) << item);
        }
    }
    return unmapped;
}

PT_INLINE uint64_t pt_translate(int format, const struct pt_table *table, uint64_t iova)
{
    const struct pt_node *node = table->root;
    unsigned index = pt_index(node->level, iova);
    while (node->level > 1 && node->child[index] != NULL) {
        node = node->child[index];
        index = pt_index(node->level, iova);
    }
    uint64_t entry = atomic_load_explicit(&node->entries[index], memory_order_acquire);
    if (!pt_present(format, entry))
        return PT_NONE;
    struct pt_entry e = pt_decode(format, entry, node->level);
    return e.leaf && !e.reserved ? e.addr | (iova & ((1ull << e.size_lg2) - 1)) : PT_NONE;
}

#endif
