/*
 * Changing the size of leaves under walkers: large ones into 4 KiB ones, so that what is dirty is known to the page, and
 * back. No walker finds a hole on the way: an entry goes from one valid value to another.
 *
 * Not modelled: contiguous sizes of amdv1 on the way back (64 KiB and the like stay 4 KiB leaves).
 */
#include "radix.h"

/* Entries of one leaf in one table: 1, or all the replicas of an amdv1 size. */
struct leaf {
    struct pt_entry decoded;
    unsigned first;
    unsigned copies;
};

static bool leaf_at(int format, const struct pt_node *node, unsigned index, struct leaf *leaf)
{
    leaf->decoded = pt_decode(format, pt_load(node, index), node->level);
    if (!leaf->decoded.present || !leaf->decoded.leaf || leaf->decoded.reserved)
        return false;
    leaf->copies = 1u << (leaf->decoded.size_lg2 - pt_item_lg2(node->level));
    leaf->first = index & ~(leaf->copies - 1);
    /* Where a device scribbled over the table, tables may hang inside what looks like one leaf. */
    for (unsigned i = leaf->first; node->level > 1 && i < leaf->first + leaf->copies; i++)
        if (node->child[i] != NULL)
            return false;
    return true;
}

static uint64_t marks_of(int format)
{
    return pt_accessed_bit(format) | pt_dirty_bit(format);
}

/* Fills a table that nobody sees yet with what `entry` amounts to. */
static void fill_child(int format, struct pt_node *child, uint64_t phys, unsigned perm, uint64_t marks)
{
    unsigned lg2 = pt_item_lg2(child->level);
    uint64_t entry = pt_make_leaf(format, child->level, lg2, phys, perm) | marks;
    for (unsigned i = 0; i < PT_ENTRIES; i++, entry += 1ull << lg2)
        atomic_store_explicit(&child->entries[i], entry, memory_order_relaxed);
    child->live = PT_ENTRIES;
}

/* One entry of a leaf becomes a table, or in the lowest table a 4 KiB leaf. Returns the marks it had. */
static uint64_t split_entry(int format, struct pt_node *node, unsigned index, const struct leaf *leaf,
                            struct pt_node *child)
{
    uint64_t phys = leaf->decoded.addr + ((uint64_t)(index - leaf->first) << pt_item_lg2(node->level));
    uint64_t entry = pt_load(node, index), marks, next;
    unsigned perm = leaf->decoded.perm;
    do { /* a walker may mark the entry meanwhile */
        marks = entry & marks_of(format);
        if (child == NULL) {
            next = pt_make_leaf(format, 1, PV_PAGE_SHIFT, phys, perm) | marks;
        } else {
            fill_child(format, child, phys, perm, marks);
            next = pt_make_table(format, node->level, child->phys);
        }
    } while (!atomic_compare_exchange_strong(&node->entries[index], &entry, next));
    if (child != NULL) {
        node->child[index] = child;
        node->children++;
        node->live = (uint16_t)(node->live - (node->live > 0));
    }
    return marks;
}

static void add_marks(struct pt_node *node, unsigned first, unsigned count, uint64_t marks)
{
    for (unsigned i = first; i < first + count; i++)
        atomic_fetch_or(&node->entries[i], marks);
}

/* One leaf of a table, all its replicas: nothing is done unless there is memory for all of it. */
static int split_leaf(struct pt_table *table, struct pt_node *node, const struct leaf *leaf)
{
    struct pt_node *child[PT_ENTRIES] = {NULL};
    int format = table->config.format;
    for (unsigned n = 0; node->level > 1 && n < leaf->copies; n++) {
        child[n] = pt_node_new(table, node->level - 1u);
        if (child[n] == NULL) {
            while (n > 0)
                pt_node_free(table, child[--n]);
            return -ENOMEM;
        }
    }
    uint64_t marks = 0;
    for (unsigned n = 0; n < leaf->copies; n++)
        marks |= split_entry(format, node, leaf->first + n, leaf, child[n]);
    if (leaf->copies == 1 || marks == 0)
        return 0;
    /* A mark in one replica speaks for the whole leaf. */
    if (node->level == 1)
        add_marks(node, leaf->first, leaf->copies, marks);
    for (unsigned n = 0; node->level > 1 && n < leaf->copies; n++)
        add_marks(child[n], 0, PT_ENTRIES, marks);
    return 0;
}

static int split_node(struct pt_table *table, struct pt_node *node, uint64_t first, uint64_t last)
{
    unsigned end = pt_index(node->level, last);
    struct leaf leaf;
    for (unsigned i = pt_index(node->level, first); i <= end; i++) {
        if (leaf_at(table->config.format, node, i, &leaf) && leaf.decoded.size_lg2 > PV_PAGE_SHIFT) {
            int error = split_leaf(table, node, &leaf);
            if (error != 0)
                return error;
        }
        if (node->level == 1 || node->child[i] == NULL)
            continue;
        uint64_t begin = pt_item_iova(node->level, first, i), stop = pt_last_of(node->level - 1u, begin);
        int error = split_node(table, node->child[i], begin < first ? first : begin, stop > last ? last : stop);
        if (error != 0)
            return error;
    }
    return 0;
}

int pt_split_range(struct pt_table *table, uint64_t iova, uint64_t size)
{
    int error = pt_check_range(table, iova, size);
    if (error != 0)
        return error;
    if ((table->pgsize_bitmap & PV_PAGE_SIZE) == 0)
        return -EINVAL;
    uint64_t last = iova + (size - 1), covered = pt_last_of(table->root->level, 0);
    return iova > covered ? 0 : split_node(table, table->root, iova, last < covered ? last : covered);
}

/* The leaf of the table above that a whole table amounts to, or 0. */
static uint64_t merged_entry(const struct pt_table *table, const struct pt_node *node)
{
    int format = table->config.format;
    unsigned lg2 = pt_item_lg2(node->level), level = node->level + 1u, above = pt_item_lg2(level);
    struct leaf leaf;
    if (node->live != PT_ENTRIES || node->children != 0)
        return 0;
    if (!(table->pgsize_bitmap & pt_level_sizes(format, level) & 1ull << above))
        return 0;
    if (!leaf_at(format, node, 0, &leaf) || leaf.copies != 1 || (leaf.decoded.addr & ((1ull << above) - 1)) != 0)
        return 0;
    uint64_t expected = pt_load(node, 0) & ~marks_of(format), marks = 0;
    for (unsigned i = 0; i < PT_ENTRIES; i++, expected += 1ull << lg2) {
        uint64_t entry = pt_load(node, i);
        if ((entry & ~marks_of(format)) != expected)
            return 0;
        marks |= entry & marks_of(format);
    }
    return pt_make_leaf(format, level, above, leaf.decoded.addr, leaf.decoded.perm) | marks;
}

static uint64_t merge_node(struct pt_table *table, struct pt_node *node, uint64_t first, uint64_t last)
{
    uint64_t merged = 0;
    unsigned end = pt_index(node->level, last);
    for (unsigned i = pt_index(node->level, first); node->level > 1 && i <= end; i++) {
        struct pt_node *child = node->child[i];
        if (child == NULL)
            continue;
        uint64_t begin = pt_item_iova(node->level, first, i), stop = pt_last_of(child->level, begin);
        bool whole = begin >= first && stop <= last;
        merged += merge_node(table, child, begin < first ? first : begin, stop > last ? last : stop);
        uint64_t entry = whole ? merged_entry(table, child) : 0;
        if (entry != 0) {
            pt_detach(table, node, i, entry);
            node->live++;
            merged++;
        }
    }
    return merged;
}

int pt_merge_range(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *merged)
{
    *merged = 0;
    int error = pt_check_range(table, iova, size);
    if (error != 0)
        return error;
    uint64_t last = iova + (size - 1), covered = pt_last_of(table->root->level, 0);
    if (iova <= covered)
        *merged = merge_node(table, table->root, iova, last < covered ? last : covered);
    return 0;
}
