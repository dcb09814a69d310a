/*
 * Ranges of IOVAs, for readers that take no lock and writers that change a few among many.
 *
 * Sorted, in chunks: a change copies one chunk, and the list of chunks only when their number changes, which is rare.
 * Every chunk has an entry, and two neighbours have more than CHUNK / 2 together. A list's slot says from where on
 * entries begin in its chunk, the first one's 0. What was replaced is freed once no section uses it: readers are inside
 * one, writers keep each other out and are not.
 *
 * Not here: what the memory is, permissions.
 */
#ifndef PVFIO_RANGE_TABLE_H
#define PVFIO_RANGE_TABLE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct range_entry {
    uint64_t iova, last;
    uint8_t *ptr; /* NULL: remote */
    uint32_t perm;
};

struct range_chunk {
    uint64_t count;
    struct range_entry entry[];
};

struct range_slot {
    uint64_t from;
    _Atomic(struct range_chunk *) chunk;
};

struct range_list {
    uint64_t count;
    struct range_slot slot[];
};

struct range_table {
    _Atomic(struct range_list *) list;
    _Atomic uint64_t *section;
    _Atomic uint64_t changes; /* a section that read this number may use what others found that read the same */
    uint64_t count, remote; /* entries, and those without memory here */
};

/* 0 or -ENOMEM. */
int range_table_init(struct range_table *table, _Atomic uint64_t *section);
void range_table_free(struct range_table *table);
/* 0, -EEXIST or -ENOMEM. */
int range_table_add(struct range_table *table, const struct range_entry *entry);
/* Takes out what lies inside. 0, -EINVAL where an entry lies partly inside, or -ENOMEM: then nothing happened. */
int range_table_remove(struct range_table *table, uint64_t iova, uint64_t last);

/* The slot of the entries that begin at iova. The list is not empty. */
static inline uint64_t range_slot_of(const struct range_list *list, uint64_t iova)
{
    uint64_t low = 0, high = list->count;
    while (high - low > 1) {
        uint64_t mid = low + (high - low) / 2;
        if (list->slot[mid].from <= iova)
            low = mid;
        else
            high = mid;
    }
    return low;
}

/* How many entries begin at iova or before. */
static inline uint64_t range_count_to(const struct range_chunk *chunk, uint64_t iova)
{
    uint64_t low = 0, high = chunk->count;
    while (low < high) {
        uint64_t mid = low + (high - low) / 2;
        if (chunk->entry[mid].iova <= iova)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static inline struct range_chunk *range_chunk_at(const struct range_list *list, uint64_t slot)
{
    return atomic_load_explicit(&list->slot[slot].chunk, memory_order_acquire);
}

/* The last entry that begins at iova or before, NULL: none. */
static inline const struct range_entry *range_find(const struct range_table *table, uint64_t iova)
{
    const struct range_list *list = atomic_load_explicit(&table->list, memory_order_acquire);
    if (!list->count)
        return NULL;
    uint64_t slot = range_slot_of(list, iova);
    const struct range_chunk *chunk = range_chunk_at(list, slot);
    uint64_t count = range_count_to(chunk, iova);
    if (count)
        return &chunk->entry[count - 1];
    if (!slot)
        return NULL;
    chunk = range_chunk_at(list, slot - 1);
    return &chunk->entry[chunk->count - 1];
}

#endif
