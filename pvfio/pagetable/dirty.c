/*
 * Reading and clearing the bits that walkers set in leaves (VT-d 4.1 3.7.2, AMD IOMMU 2.2.3), while they walk.
 *
 * A bit is read and cleared in one atomic operation, so a walker's compare-and-swap either came before and is seen, or
 * comes after and stays. amdv1's replicated entries count as one leaf: the walker marks the replica it read.
 *
 * Not modelled: write protection as another way to find what is written, page-modification logs.
 */
#include <string.h>

#include "radix.h"

struct harvest {
    struct pt_marks marks;
    int format;
    uint64_t bit;
    bool peek;
    uint64_t leaves;
};

static void set_bits(uint64_t *bitmap, uint64_t from, uint64_t to)
{
    for (uint64_t word = from / 64; word <= to / 64; word++) {
        unsigned low = word == from / 64 ? from % 64 : 0, high = word == to / 64 ? to % 64 : 63;
        bitmap[word] |= UINT64_MAX << low & UINT64_MAX >> (63 - high);
    }
}

void pt_mark_leaf(const struct pt_marks *marks, uint64_t iova, unsigned size_lg2)
{
    uint64_t inside = (1ull << size_lg2) - 1, first = iova & ~inside, last = first | inside;
    first = first < marks->first ? marks->first : first;
    last = last > marks->last ? marks->last : last;
    if (first <= last)
        set_bits(marks->bitmap, (first - marks->first) >> PV_PAGE_SHIFT, (last - marks->first) >> PV_PAGE_SHIFT);
}

static bool is_inside(const struct harvest *h, uint64_t iova, unsigned size_lg2)
{
    uint64_t inside = (1ull << size_lg2) - 1;
    return (iova & ~inside) >= h->marks.first && (iova | inside) <= h->marks.last;
}

/* The leaf at `index`; returns the last entry that belongs to it. */
static unsigned harvest_leaf(struct harvest *h, struct pt_node *node, uint64_t iova, unsigned index)
{
    struct pt_entry e = pt_decode(h->format, pt_load(node, index), node->level);
    if (!e.present || !e.leaf || e.reserved)
        return index;
    uint64_t at = pt_item_iova(node->level, iova, index), seen = 0;
    unsigned copies = 1u << (e.size_lg2 - pt_item_lg2(node->level)), first = index & ~(copies - 1);
    bool clear = !h->peek && is_inside(h, at, e.size_lg2);
    for (unsigned i = first; i < first + copies; i++) {
        uint64_t entry = pt_load(node, i);
        if ((entry & h->bit) && clear)
            entry = atomic_fetch_and(&node->entries[i], ~h->bit);
        seen |= entry & h->bit;
        h->leaves += (entry & h->bit) != 0;
    }
    if (seen)
        pt_mark_leaf(&h->marks, at, e.size_lg2);
    return first + copies - 1;
}

static void harvest_node(struct harvest *h, struct pt_node *node, uint64_t first, uint64_t last)
{
    unsigned end = pt_index(node->level, last);
    for (unsigned i = pt_index(node->level, first); i <= end; i++) {
        if (node->level > 1 && node->child[i] != NULL) {
            uint64_t begin = pt_item_iova(node->level, first, i), stop = pt_last_of(node->level - 1u, begin);
            harvest_node(h, node->child[i], begin < first ? first : begin, stop > last ? last : stop);
            continue;
        }
        uint64_t entry = pt_load(node, i);
        /* The bit may stand in another replica of a leaf. */
        if ((entry & h->bit) || (h->format == PT_AMDV1 && pt_present(PT_AMDV1, entry) && pt_is_coded(entry)))
            i = harvest_leaf(h, node, first, i);
    }
}

static int harvest(struct pt_table *table, uint64_t bit, uint64_t iova, uint64_t size, uint64_t *bitmap,
                   uint32_t flags, uint64_t *leaves)
{
    *leaves = 0;
    int error = pt_check_range(table, iova, size);
    if (error != 0)
        return error;
    if ((flags & ~(uint32_t)PT_PEEK) != 0)
        return -EINVAL;
    if (table->config.format == PT_X86_64)
        return -EOPNOTSUPP;
    uint64_t last = iova + (size - 1), covered = pt_last_of(table->root->level, 0);
    struct harvest h = {{bitmap, iova, last}, table->config.format, bit, (flags & PT_PEEK) != 0, 0};
    if (iova <= covered)
        harvest_node(&h, table->root, iova, last < covered ? last : covered);
    *leaves = h.leaves;
    return 0;
}

int pt_read_clear_dirty(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *bitmap, uint32_t flags,
                        uint64_t *leaves)
{
    return harvest(table, pt_dirty_bit(table->config.format), iova, size, bitmap, flags, leaves);
}

int pt_read_clear_accessed(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *bitmap, uint32_t flags,
                           uint64_t *leaves)
{
    return harvest(table, pt_accessed_bit(table->config.format), iova, size, bitmap, flags, leaves);
}

int pt_unmap_range_dirty(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *unmapped, uint64_t *bitmap)
{
    *unmapped = 0;
    int error = pt_check_range(table, iova, size);
    if (error != 0)
        return error;
    if (table->config.format == PT_X86_64)
        return -EOPNOTSUPP;
    uint64_t last = iova + (size - 1), covered = pt_last_of(table->root->level, 0);
    const struct pt_marks marks = {bitmap, iova, last};
    if (iova > covered)
        return 0;
    last = last < covered ? last : covered;
    *unmapped = table->config.format == PT_VTDSS ? pt_unmap(PT_VTDSS, table, iova, last, &marks)
                                                 : pt_unmap(PT_AMDV1, table, iova, last, &marks);
    return 0;
}
