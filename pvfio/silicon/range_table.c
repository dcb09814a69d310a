/*
 * Changing a table of ranges (see range_table.h).
 */
#include "range_table.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "section.h"

#define CHUNK 64 /* the most entries */

static struct range_list *new_list(uint64_t count)
{
    struct range_list *list = malloc(sizeof(*list) + count * sizeof(struct range_slot));
    if (list)
        list->count = count;
    return list;
}

int range_table_init(struct range_table *table, _Atomic uint64_t *section)
{
    struct range_list *list = new_list(0);
    atomic_init(&table->list, list);
    table->section = section;
    return list ? 0 : -ENOMEM;
}

void range_table_free(struct range_table *table)
{
    struct range_list *list = atomic_load(&table->list);
    for (uint64_t i = 0; list && i < list->count; i++)
        free(range_chunk_at(list, i));
    free(list);
}

static struct range_chunk *new_chunk(const struct range_entry *entries, uint64_t count)
{
    struct range_chunk *chunk = malloc(sizeof(*chunk) + count * sizeof(*entries));
    if (chunk) {
        chunk->count = count;
        memcpy(chunk->entry, entries, count * sizeof(*entries));
    }
    return chunk;
}

/* What a change takes from the table and puts there. */
struct change {
    uint64_t low, high; /* the slots [low, high) go */
    uint64_t count;
    struct range_entry entry[2 * CHUNK]; /* their place is these entries' */
};

static void set_slot(struct range_list *list, uint64_t at, uint64_t from, struct range_chunk *chunk)
{
    list->slot[at].from = at ? from : 0;
    atomic_init(&list->slot[at].chunk, chunk);
}

static struct range_list *changed_list(const struct range_list *old, const struct change *change,
                                       struct range_chunk *const *piece, uint64_t pieces)
{
    struct range_list *list = new_list(old->count - (change->high - change->low) + pieces);
    uint64_t to = 0;
    if (!list)
        return NULL;
    for (uint64_t i = 0; i < change->low; i++)
        set_slot(list, to++, old->slot[i].from, range_chunk_at(old, i));
    for (uint64_t i = 0; i < pieces; i++)
        set_slot(list, to++, i || change->low == old->count ? piece[i]->entry[0].iova : old->slot[change->low].from,
                 piece[i]);
    for (uint64_t i = change->high; i < old->count; i++)
        set_slot(list, to++, old->slot[i].from, range_chunk_at(old, i));
    return list;
}

/* After a change, before what it replaced is freed: no section has that any more, and none takes it from another. */
static void settle(struct range_table *table)
{
    atomic_fetch_add(&table->changes, 1);
    pv_section_wait(table->section);
}

static void replace_list(struct range_table *table, struct range_list *list, const struct change *change)
{
    struct range_list *old = atomic_exchange(&table->list, list);
    settle(table);
    for (uint64_t i = change->low; i < change->high; i++)
        free(range_chunk_at(old, i));
    free(old);
}

static int apply(struct range_table *table, const struct change *change)
{
    struct range_list *old = atomic_load(&table->list);
    struct range_chunk *piece[2] = {NULL, NULL};
    uint64_t pieces = (change->count + CHUNK - 1) / CHUNK, done = 0;
    for (uint64_t i = 0; i < pieces; i++) {
        uint64_t count = (change->count - done) / (pieces - i);
        piece[i] = new_chunk(change->entry + done, count);
        done += count;
    }
    bool in_place = pieces == 1 && change->high - change->low == 1, failed = false;
    for (uint64_t i = 0; i < pieces; i++)
        failed |= !piece[i];
    struct range_list *list = in_place || failed ? NULL : changed_list(old, change, piece, pieces);
    if (failed || (!in_place && !list)) {
        free(piece[0]);
        free(piece[1]);
        return -ENOMEM;
    }
    if (list) {
        replace_list(table, list, change);
        return 0;
    }
    struct range_chunk *gone = atomic_exchange(&old->slot[change->low].chunk, piece[0]);
    settle(table);
    free(gone);
    return 0;
}

static void take(struct change *change, const struct range_entry *entries, uint64_t count)
{
    memcpy(change->entry + change->count, entries, count * sizeof(*entries));
    change->count += count;
}

int range_table_add(struct range_table *table, const struct range_entry *entry)
{
    const struct range_list *list = atomic_load(&table->list);
    const struct range_entry *before = range_find(table, entry->last);
    struct change change;
    change.low = change.high = change.count = 0;
    if (before && before->last >= entry->iova)
        return -EEXIST;
    if (list->count) {
        change.low = range_slot_of(list, entry->iova);
        change.high = change.low + 1;
        const struct range_chunk *chunk = range_chunk_at(list, change.low);
        uint64_t at = range_count_to(chunk, entry->iova);
        take(&change, chunk->entry, at);
        take(&change, entry, 1);
        take(&change, chunk->entry + at, chunk->count - at);
    } else {
        take(&change, entry, 1);
    }
    int error = apply(table, &change);
    if (!error) {
        table->count++;
        table->remote += !entry->ptr;
    }
    return error;
}

static uint64_t remote_among(const struct range_entry *entries, uint64_t count)
{
    uint64_t remote = 0;
    for (uint64_t i = 0; i < count; i++)
        remote += !entries[i].ptr;
    return remote;
}

/* A neighbour that is small enough together with what is left joins it. */
static const struct range_chunk *small_neighbour(const struct range_list *list, uint64_t slot, uint64_t left)
{
    const struct range_chunk *chunk = slot < list->count ? range_chunk_at(list, slot) : NULL;
    return chunk && chunk->count + left <= CHUNK / 2 ? chunk : NULL;
}

int range_table_remove(struct range_table *table, uint64_t iova, uint64_t last)
{
    const struct range_list *list = atomic_load(&table->list);
    const struct range_entry *first = range_find(table, iova), *end = range_find(table, last);
    if (!end || end->last < iova)
        return 0;
    if (end->last > last || (first && first->iova < iova && first->last >= iova))
        return -EINVAL;
    struct change change;
    change.low = range_slot_of(list, iova);
    change.high = range_slot_of(list, last) + 1;
    change.count = 0;
    const struct range_chunk *left = range_chunk_at(list, change.low), *right = range_chunk_at(list, change.high - 1);
    uint64_t kept = iova ? range_count_to(left, iova - 1) : 0, skipped = range_count_to(right, last);
    uint64_t count = 0, remote = 0;
    for (uint64_t i = change.low; i < change.high; i++) {
        const struct range_chunk *chunk = range_chunk_at(list, i);
        uint64_t from = i == change.low ? kept : 0, to = i == change.high - 1 ? skipped : chunk->count;
        count += to - from;
        remote += remote_among(chunk->entry + from, to - from);
    }
    uint64_t sum = kept + right->count - skipped;
    const struct range_chunk *before = small_neighbour(list, change.low - 1, sum);
    sum += before ? before->count : 0;
    const struct range_chunk *after = small_neighbour(list, change.high, sum);
    if (before)
        take(&change, before->entry, before->count);
    take(&change, left->entry, kept);
    take(&change, right->entry + skipped, right->count - skipped);
    if (after)
        take(&change, after->entry, after->count);
    change.low -= before != NULL;
    change.high += after != NULL;
    int error = apply(table, &change);
    if (!error) {
        table->count -= count;
        table->remote -= remote;
    }
    return error;
}
