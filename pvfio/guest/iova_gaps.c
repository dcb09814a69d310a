/*
 * The treap of iova_gaps.h. Recursion is as deep as the tree: about twice the logarithm of the number of gaps.
 */
#include "iova_gaps.h"

#include <stdlib.h>
#include <string.h>

static uint64_t size_of(const struct gap *gap)
{
    return gap->last - gap->start + 1;
}

/* log2 of the largest aligned power of two inside [start, last]. */
static int order_of(uint64_t start, uint64_t last)
{
    uint64_t size = last - start + 1;
    for (int order = 63 - __builtin_clzll(size); order > 0; order--) {
        uint64_t mask = (1ull << order) - 1;
        if (((start + mask) & ~mask) + mask <= last)
            return order;
    }
    return 0;
}

static void update(struct gap *nodes, uint32_t at)
{
    struct gap *gap = &nodes[at];
    uint64_t size = size_of(gap);
    int8_t order = (int8_t)order_of(gap->start, gap->last);
    const uint32_t below[2] = {gap->left, gap->right};
    for (int i = 0; i < 2; i++) {
        if (!below[i])
            continue;
        const struct gap *child = &nodes[below[i]];
        if (child->max_size > size)
            size = child->max_size;
        if (child->max_order > order)
            order = child->max_order;
    }
    gap->max_size = size;
    gap->max_order = order;
}

static void split(struct gap *nodes, uint32_t at, uint64_t key, uint32_t *low, uint32_t *high)
{
    if (!at) {
        *low = *high = 0;
    } else if (nodes[at].start < key) {
        split(nodes, nodes[at].right, key, &nodes[at].right, high);
        *low = at;
        update(nodes, at);
    } else {
        split(nodes, nodes[at].left, key, low, &nodes[at].left);
        *high = at;
        update(nodes, at);
    }
}

static uint32_t merge(struct gap *nodes, uint32_t low, uint32_t high)
{
    if (!low || !high)
        return low ? low : high;
    if (nodes[low].priority > nodes[high].priority) {
        nodes[low].right = merge(nodes, nodes[low].right, high);
        update(nodes, low);
        return low;
    }
    nodes[high].left = merge(nodes, low, nodes[high].left);
    update(nodes, high);
    return high;
}

/* After a change of the gap that begins at key. */
static void refresh(struct gap *nodes, uint32_t at, uint64_t key)
{
    if (key != nodes[at].start)
        refresh(nodes, key < nodes[at].start ? nodes[at].left : nodes[at].right, key);
    update(nodes, at);
}

static uint32_t without(struct gap *nodes, uint32_t at, uint64_t key)
{
    if (key == nodes[at].start)
        return merge(nodes, nodes[at].left, nodes[at].right);
    uint32_t *next = key < nodes[at].start ? &nodes[at].left : &nodes[at].right;
    *next = without(nodes, *next, key);
    update(nodes, at);
    return at;
}

/* The gap with the highest start at or below key; 0 for none. */
static uint32_t floor_of(const struct gaps *gaps, uint64_t key)
{
    uint32_t best = 0;
    for (uint32_t at = gaps->root; at;) {
        bool below = gaps->nodes[at].start <= key;
        if (below)
            best = at;
        at = below ? gaps->nodes[at].right : gaps->nodes[at].left;
    }
    return best;
}

/* The gap with the lowest start above key; 0 for none. */
static uint32_t above(const struct gaps *gaps, uint64_t key)
{
    uint32_t best = 0;
    for (uint32_t at = gaps->root; at;) {
        bool over = gaps->nodes[at].start > key;
        if (over)
            best = at;
        at = over ? gaps->nodes[at].left : gaps->nodes[at].right;
    }
    return best;
}

bool gaps_reserve(struct gaps *gaps, uint64_t count)
{
    if (gaps->capacity > count)
        return true;
    uint64_t room = gaps->capacity ? gaps->capacity * 2ull : 64;
    while (room <= count)
        room *= 2;
    if (room > UINT32_MAX)
        return false;
    struct gap *more = realloc(gaps->nodes, room * sizeof(*more));
    if (!more)
        return false;
    gaps->nodes = more;
    gaps->capacity = (uint32_t)room;
    if (!gaps->used) {
        memset(&more[0], 0, sizeof(more[0]));
        gaps->used = 1;
        gaps->random = 0x9e3779b9u;
    }
    return true;
}

static void insert(struct gaps *gaps, uint64_t start, uint64_t last)
{
    uint32_t at = gaps->free_list;
    if (at)
        gaps->free_list = gaps->nodes[at].left;
    else
        at = gaps->used++;
    gaps->random ^= gaps->random << 13;
    gaps->random ^= gaps->random >> 17;
    gaps->random ^= gaps->random << 5;
    gaps->nodes[at] = (struct gap){.start = start, .last = last, .priority = gaps->random};
    update(gaps->nodes, at);
    uint32_t low, high;
    split(gaps->nodes, gaps->root, start, &low, &high);
    gaps->root = merge(gaps->nodes, merge(gaps->nodes, low, at), high);
    gaps->count++;
}

static void erase(struct gaps *gaps, uint32_t at)
{
    gaps->root = without(gaps->nodes, gaps->root, gaps->nodes[at].start);
    gaps->nodes[at].left = gaps->free_list;
    gaps->free_list = at;
    gaps->count--;
}

/* Cuts [start, last], which lies inside the gap, out of it. */
static void carve(struct gaps *gaps, uint32_t at, uint64_t start, uint64_t last)
{
    struct gap *gap = &gaps->nodes[at];
    uint64_t end = gap->last;
    if (gap->start < start) {
        gap->last = start - 1;
        refresh(gaps->nodes, gaps->root, gap->start);
        if (last < end)
            insert(gaps, last + 1, end);
    } else if (last < end) {
        gap->start = last + 1; /* no other gap begins in between: the order holds */
        refresh(gaps->nodes, gaps->root, gap->start);
    } else {
        erase(gaps, at);
    }
}

struct wanted {
    uint64_t pages, limit, mask;
    int order; /* an aligned power of two that any place for it holds */
    uint64_t visited;
};

static uint64_t place_in(const struct gap *gap, const struct wanted *wanted)
{
    uint64_t end = gap->last < wanted->limit ? gap->last : wanted->limit;
    if (end < gap->start || end - gap->start + 1 < wanted->pages)
        return GAPS_NONE;
    uint64_t place = (end - wanted->pages + 1) & ~wanted->mask;
    return place >= gap->start ? place : GAPS_NONE;
}

static uint32_t find(const struct gap *nodes, uint32_t at, struct wanted *wanted, uint64_t *place)
{
    while (at && nodes[at].max_order >= wanted->order && nodes[at].max_size >= wanted->pages) {
        wanted->visited++;
        if (nodes[at].start <= wanted->limit) {
            uint32_t found = find(nodes, nodes[at].right, wanted, place);
            if (found)
                return found;
            *place = place_in(&nodes[at], wanted);
            if (*place != GAPS_NONE)
                return at;
        }
        at = nodes[at].left;
    }
    return 0;
}

uint64_t gaps_take(struct gaps *gaps, uint64_t pages, uint32_t align, uint64_t limit)
{
    if (!gaps->root || !pages || align > 52 || pages > 1ull << align)
        return GAPS_NONE;
    struct wanted wanted = {.pages = 1ull << align, .limit = limit, .mask = (1ull << align) - 1, .order = (int)align};
    uint64_t place = GAPS_NONE;
    /* A whole aligned power of two is found at once: the tree knows where one is. */
    uint32_t at = find(gaps->nodes, gaps->root, &wanted, &place);
    if (!at && pages < 1ull << align) {
        wanted.pages = pages;
        wanted.order = 63 - __builtin_clzll(pages);
        at = find(gaps->nodes, gaps->root, &wanted, &place);
    }
    gaps->visited += wanted.visited;
    if (!at)
        return GAPS_NONE;
    carve(gaps, at, place, place + pages - 1);
    return place;
}

uint64_t gaps_take_range(struct gaps *gaps, uint64_t start, uint64_t last)
{
    uint64_t taken = 0;
    while (start <= last) {
        uint32_t at = floor_of(gaps, start);
        if (!at || gaps->nodes[at].last < start)
            at = above(gaps, start);
        if (!at || gaps->nodes[at].start > last)
            break;
        uint64_t from = gaps->nodes[at].start > start ? gaps->nodes[at].start : start;
        uint64_t to = gaps->nodes[at].last < last ? gaps->nodes[at].last : last;
        carve(gaps, at, from, to);
        taken += to - from + 1;
        start = to + 1;
    }
    return taken;
}

bool gaps_give(struct gaps *gaps, uint64_t start, uint64_t pages)
{
    uint64_t last = start + pages - 1;
    uint32_t before = gaps->root ? floor_of(gaps, start) : 0, after = gaps->root ? above(gaps, start) : 0;
    if (!pages || last < start || (before && gaps->nodes[before].last >= start) ||
        (after && gaps->nodes[after].start <= last))
        return false;
    bool joins_before = before && gaps->nodes[before].last + 1 == start;
    if (after && gaps->nodes[after].start == last + 1) {
        if (joins_before) {
            last = gaps->nodes[after].last;
            erase(gaps, after);
        } else {
            gaps->nodes[after].start = start;
            refresh(gaps->nodes, gaps->root, start);
            return true;
        }
    }
    if (joins_before) {
        gaps->nodes[before].last = last;
        refresh(gaps->nodes, gaps->root, gaps->nodes[before].start);
    } else {
        insert(gaps, start, last);
    }
    return true;
}

/* Walks in order; *edge is the first page the next gap may begin at. */
static int check(const struct gaps *gaps, uint32_t at, uint64_t *edge, uint64_t *pages, uint32_t *count)
{
    if (!at)
        return 0;
    const struct gap *gap = &gaps->nodes[at];
    int wrong = check(gaps, gap->left, edge, pages, count);
    if (wrong)
        return wrong;
    if (gap->last < gap->start)
        return 1;
    if (gap->start < *edge)
        return 2; /* out of order, or neighbours that should be one */
    *edge = gap->last + 2;
    *pages += size_of(gap);
    ++*count;
    uint64_t size = size_of(gap);
    int order = order_of(gap->start, gap->last);
    const uint32_t below[2] = {gap->left, gap->right};
    for (int i = 0; i < 2; i++) {
        const struct gap *child = &gaps->nodes[below[i]];
        if (!below[i])
            continue;
        if (child->priority > gap->priority)
            return 3;
        size = child->max_size > size ? child->max_size : size;
        order = child->max_order > order ? child->max_order : order;
    }
    if (size != gap->max_size || order != gap->max_order)
        return 4;
    return check(gaps, gap->right, edge, pages, count);
}

int gaps_check(const struct gaps *gaps, uint64_t *pages)
{
    uint64_t edge = 0;
    uint32_t count = 0;
    *pages = 0;
    int wrong = check(gaps, gaps->root, &edge, pages, &count);
    return wrong ? wrong : count == gaps->count ? 0 : 5;
}

void gaps_destroy(struct gaps *gaps)
{
    free(gaps->nodes);
    memset(gaps, 0, sizeof(*gaps));
}
