/*
 * The B+tree behind mappings.h. Inner nodes hold separators and children, leaves hold the entries. A node that is split
 * at the right or left edge of the tree stays full, so ascending and descending insertion fill their nodes; anywhere else
 * it is split in half. A node that falls below a third is merged with a sibling, or filled from it.
 */
#include "mappings.h"
#include "node_pool.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define LEAF_MAX 31u
#define LEAF_MIN 12u
#define LEAF_MERGE 28u /* merge only into a node that keeps room for a few inserts */
#define INNER_MAX 63u
#define INNER_MIN 21u
#define INNER_MERGE 56u
#define MAX_HEIGHT 16u
#define PREFETCH_HEIGHT 2u /* a smaller tree is in a cache anyway */
#define COOKIE_BITS 56u
#define COOKIE_MASK ((UINT64_C(1) << COOKIE_BITS) - 1)

struct entry {
    uint64_t iova;
    uint64_t last;
    uint64_t vaddr;
    uint64_t word; /* flags << COOKIE_BITS | cookie */
};

struct leaf {
    uint32_t count;
    uint8_t pad[28];
    struct entry e[LEAF_MAX];
};

/* child[i] holds the entries from key[i] up to key[i + 1]; key[0] means nothing. */
struct inner {
    uint32_t count;
    uint8_t pad[12];
    uint64_t key[INNER_MAX];
    void *child[INNER_MAX];
};

_Static_assert(sizeof(struct leaf) == NODE_BYTES, "a leaf is one node");
_Static_assert(sizeof(struct inner) == NODE_BYTES, "an inner node is one node");

/* From the root to a place in a leaf. */
struct path {
    struct leaf *leaf; /* NULL: none */
    uint64_t low, high; /* what the separators send to this leaf, both included */
    uint32_t pos;
    uint32_t index[MAX_HEIGHT];
    struct inner *node[MAX_HEIGHT];
};

struct pv_mappings {
    void *root; /* NULL while empty */
    uint32_t height; /* inner levels above the leaves */
    uint64_t count;
    struct path near; /* to the last leaf looked at: the next call is likely to be about its neighbourhood */
    uint64_t max_bytes;
    /* Apart, so that the inner nodes, which every search passes, lie together: few translations for the processor. */
    struct node_pool leaves;
    struct node_pool inners;
};

/* Search. */

/* All lines of a node at once: a search that met its misses one after the other would wait several times. */
static inline void prefetch(const void *node)
{
    const uint8_t *bytes = node;
    for (unsigned i = 0; i < NODE_BYTES; i += 64)
        __builtin_prefetch(bytes + i);
}

/* The child for iova: the last one whose key is not above it. */
static inline uint32_t inner_find(const struct inner *node, uint64_t iova)
{
    const uint64_t *base = node->key;
    uint32_t n = node->count;
    while (n > 1) {
        uint32_t half = n / 2;
        base = base[half] <= iova ? base + half : base;
        n -= half;
    }
    return (uint32_t)(base - node->key);
}

/* How many entries begin at or below iova. */
static inline uint32_t leaf_find(const struct leaf *leaf, uint64_t iova)
{
    const struct entry *base = leaf->e;
    uint32_t n = leaf->count;
    if (!n)
        return 0;
    while (n > 1) {
        uint32_t half = n / 2;
        base = base[half].iova <= iova ? base + half : base;
        n -= half;
    }
    return (uint32_t)(base - leaf->e) + (base->iova <= iova);
}

/* The tree is not empty. */
static void descend(const struct pv_mappings *m, uint64_t iova, struct path *path)
{
    void *node = m->root;
    uint64_t low = 0, high = UINT64_MAX;
    for (uint32_t level = 0; level < m->height; level++) {
        struct inner *inner = node;
        uint32_t i = inner_find(inner, iova);
        path->node[level] = inner;
        path->index[level] = i;
        node = inner->child[i];
        prefetch(node);
        low = i ? inner->key[i] : low;
        high = i + 1 < inner->count ? inner->key[i + 1] - 1 : high;
    }
    path->leaf = node;
    path->low = low;
    path->high = high;
}

/* The path to iova's leaf, kept in the index until a node comes or goes. pos: how many entries of the leaf begin at or
 * below iova. The tree is not empty. */
static struct path *locate(struct pv_mappings *m, uint64_t iova)
{
    struct path *path = &m->near;
    if (!path->leaf || iova < path->low || iova > path->high)
        descend(m, iova, path);
    path->pos = leaf_find(path->leaf, iova);
    return path;
}

static void forget_path(struct pv_mappings *m)
{
    m->near.leaf = NULL;
}

/* The leaf after (step 1) or before (step -1) the path's, with the path on its first or last entry; or NULL at the edge. */
static const struct leaf *sibling(const struct pv_mappings *m, struct path *path, int step)
{
    uint32_t level = m->height;
    while (level > 0) {
        level--;
        struct inner *node = path->node[level];
        uint32_t edge = step > 0 ? node->count - 1 : 0;
        if (path->index[level] == edge)
            continue;
        path->index[level] += (uint32_t)step;
        void *child = node->child[path->index[level]];
        for (level++; level < m->height; level++) {
            path->node[level] = child;
            path->index[level] = step > 0 ? 0 : path->node[level]->count - 1;
            child = path->node[level]->child[path->index[level]];
        }
        path->leaf = child;
        path->pos = step > 0 ? 0 : path->leaf->count - 1;
        return path->leaf;
    }
    return NULL;
}

/* The last entry that begins at or below the path's place, and the first above it; NULL where there is none. */
static const struct entry *entry_before(const struct pv_mappings *m, const struct path *path)
{
    if (path->pos)
        return &path->leaf->e[path->pos - 1];
    struct path other = *path;
    const struct leaf *leaf = sibling(m, &other, -1);
    return leaf ? &leaf->e[leaf->count - 1] : NULL;
}

static const struct entry *entry_after(const struct pv_mappings *m, const struct path *path)
{
    if (path->pos < path->leaf->count)
        return &path->leaf->e[path->pos];
    struct path other = *path;
    const struct leaf *leaf = sibling(m, &other, 1);
    return leaf ? &leaf->e[0] : NULL;
}

void pv_mappings_prefetch(const struct pv_mappings *m, uint64_t iova, uint32_t step)
{
    const void *node = m->root;
    if (m->height < PREFETCH_HEIGHT || (m->near.leaf && iova >= m->near.low && iova <= m->near.high))
        return;
    for (uint32_t left = m->height - (step ? 0 : 1); left > 0; left--) {
        const struct inner *inner = node;
        node = inner->child[inner_find(inner, iova)];
    }
    if (step == 1)
        __builtin_prefetch(node);
    else
        prefetch(node);
}

static inline void entry_out(const struct entry *entry, struct pv_mapping *out)
{
    out->iova = entry->iova;
    out->size = entry->last - entry->iova + 1;
    out->vaddr = entry->vaddr;
    out->cookie = entry->word & COOKIE_MASK;
    out->flags = (uint32_t)(entry->word >> COOKIE_BITS);
    out->reserved = 0;
}

int pv_mappings_find(struct pv_mappings *m, uint64_t iova, struct pv_mapping *out)
{
    if (!m->root)
        return 0;
    const struct entry *entry = entry_before(m, locate(m, iova));
    if (!entry || entry->last < iova)
        return 0;
    entry_out(entry, out);
    return 1;
}

uint64_t pv_mappings_range(struct pv_mappings *m, uint64_t start, uint64_t last, struct pv_mapping *out, uint64_t max)
{
    uint64_t n = 0;
    if (!m->root || last < start || !max)
        return 0;
    const struct path *near = locate(m, start);
    const struct entry *before = entry_before(m, near);
    if (before && before->last >= start)
        entry_out(before, &out[n++]);
    if (n == max || (near->pos < near->leaf->count && near->leaf->e[near->pos].iova > last))
        return n;
    struct path path = *near;
    while (n < max) {
        if (path.pos == path.leaf->count && !sibling(m, &path, 1))
            break;
        const struct entry *entry = &path.leaf->e[path.pos];
        if (entry->iova > last)
            break;
        entry_out(entry, &out[n++]);
        path.pos++;
    }
    return n;
}

/* Insertion. */

/* Whether the path keeps to the left (or right) edge of the tree. */
static bool on_edge(const struct pv_mappings *m, const struct path *path, bool right)
{
    for (uint32_t level = 0; level < m->height; level++)
        if (path->index[level] != (right ? path->node[level]->count - 1 : 0))
            return false;
    return true;
}

static void inner_put(struct inner *node, uint32_t at, uint64_t key, void *child)
{
    memmove(&node->key[at + 1], &node->key[at], (node->count - at) * sizeof(node->key[0]));
    memmove(&node->child[at + 1], &node->child[at], (node->count - at) * sizeof(node->child[0]));
    node->key[at] = key;
    node->child[at] = child;
    node->count++;
}

static void inner_copy(struct inner *to, uint32_t at, const struct inner *from, uint32_t first, uint32_t n)
{
    memmove(&to->key[at], &from->key[first], n * sizeof(to->key[0]));
    memmove(&to->child[at], &from->child[first], n * sizeof(to->child[0]));
}

/* Puts the new right neighbour of the path's node at `level` into its parent, splitting upwards. Nodes are reserved. */
static void link_right(struct pv_mappings *m, struct path *path, uint32_t level, uint64_t key, void *child, int edge)
{
    while (level > 0) {
        level--;
        struct inner *node = path->node[level];
        uint32_t at = path->index[level] + 1;
        if (node->count < INNER_MAX) {
            inner_put(node, at, key, child);
            return;
        }
        struct inner *right = node_pool_get(&m->inners);
        uint32_t keep = edge > 0 ? INNER_MAX - 1 : edge < 0 ? 2 : (INNER_MAX + 1) / 2;
        right->count = INNER_MAX - keep;
        inner_copy(right, 0, node, keep, right->count);
        node->count = keep;
        uint64_t separator = right->key[0];
        if (at > keep || (at == keep && edge > 0))
            inner_put(right, at - keep, key, child);
        else
            inner_put(node, at, key, child);
        key = separator;
        child = right;
    }
    struct inner *root = node_pool_get(&m->inners);
    root->count = 2;
    root->key[0] = 0;
    root->child[0] = m->root;
    root->key[1] = key;
    root->child[1] = child;
    m->root = root;
    m->height++;
}

static void leaf_put(struct leaf *leaf, uint32_t at, const struct entry *entry)
{
    memmove(&leaf->e[at + 1], &leaf->e[at], (leaf->count - at) * sizeof(*entry));
    leaf->e[at] = *entry;
    leaf->count++;
}

static void leaf_split_put(struct pv_mappings *m, struct path *path, const struct entry *entry)
{
    struct leaf *leaf = path->leaf;
    struct leaf *right = node_pool_get(&m->leaves);
    int edge = 0;
    uint32_t keep = (LEAF_MAX + 1) / 2;
    if (path->pos == LEAF_MAX && on_edge(m, path, true)) {
        edge = 1;
        keep = LEAF_MAX;
    } else if (path->pos == 0 && on_edge(m, path, false)) {
        edge = -1;
        keep = 0;
    }
    right->count = LEAF_MAX - keep;
    memcpy(right->e, &leaf->e[keep], right->count * sizeof(*entry));
    leaf->count = keep;
    if (path->pos > keep || edge > 0)
        leaf_put(right, path->pos - keep, entry);
    else
        leaf_put(leaf, path->pos, entry);
    link_right(m, path, m->height, right->e[0].iova, right, edge);
}

/* How many inner nodes a split of the path's leaf makes. */
static uint32_t inners_needed(const struct pv_mappings *m, const struct path *path)
{
    uint32_t needed = 0;
    uint32_t level = m->height;
    while (level > 0 && path->node[level - 1]->count == INNER_MAX) {
        needed++;
        level--;
    }
    return level ? needed : needed + 1;
}

/* What one pool may take beside the other; never 0, which is no limit. */
static uint64_t share(const struct pv_mappings *m, const struct node_pool *other)
{
    if (!m->max_bytes)
        return 0;
    return m->max_bytes > other->bytes ? m->max_bytes - other->bytes : 1;
}

/* Makes sure of a leaf and so many inner nodes. */
static bool reserve(struct pv_mappings *m, uint32_t inners)
{
    m->leaves.max_bytes = share(m, &m->inners);
    if (!node_pool_reserve(&m->leaves, 1))
        return false;
    m->inners.max_bytes = share(m, &m->leaves);
    return node_pool_reserve(&m->inners, inners);
}

int pv_mappings_insert(struct pv_mappings *m, uint64_t iova, uint64_t size, uint64_t vaddr, uint32_t flags,
                       uint64_t cookie)
{
    if (!size || cookie > COOKIE_MASK || flags > 0xff)
        return -EINVAL;
    if (iova + (size - 1) < iova)
        return -EOVERFLOW;
    struct entry entry = {iova, iova + (size - 1), vaddr, (uint64_t)flags << COOKIE_BITS | cookie};
    if (!m->root) {
        if (!reserve(m, 0))
            return -ENOMEM;
        struct leaf *leaf = node_pool_get(&m->leaves);
        leaf->count = 1;
        leaf->e[0] = entry;
        m->root = leaf;
        m->height = 0;
        m->count = 1;
        forget_path(m);
        return 0;
    }
    struct path *path = locate(m, iova);
    const struct entry *before = entry_before(m, path);
    const struct entry *after = entry_after(m, path);
    if ((before && before->last >= iova) || (after && after->iova <= entry.last))
        return -EEXIST;
    if (path->leaf->count < LEAF_MAX) {
        leaf_put(path->leaf, path->pos, &entry);
    } else {
        if (m->height == MAX_HEIGHT || !reserve(m, inners_needed(m, path)))
            return -ENOMEM;
        leaf_split_put(m, path, &entry);
        forget_path(m);
    }
    m->count++;
    return 0;
}

/* Removal. */

static void inner_drop(struct inner *node, uint32_t at)
{
    node->count--;
    memmove(&node->key[at], &node->key[at + 1], (node->count - at) * sizeof(node->key[0]));
    memmove(&node->child[at], &node->child[at + 1], (node->count - at) * sizeof(node->child[0]));
}

/* Evens out two neighbouring leaves, or empties the right one: true, and it can go. *key: where the right one begins. */
static bool leaf_balance(struct leaf *left, struct leaf *right, uint64_t *key)
{
    uint32_t total = left->count + right->count;
    uint32_t keep = total <= LEAF_MERGE ? total : total / 2;
    size_t unit = sizeof(left->e[0]);
    if (keep > left->count) {
        uint32_t n = keep - left->count;
        memcpy(&left->e[left->count], right->e, n * unit);
        memmove(right->e, &right->e[n], (right->count - n) * unit);
    } else {
        uint32_t n = left->count - keep;
        memmove(&right->e[n], right->e, right->count * unit);
        memcpy(right->e, &left->e[keep], n * unit);
    }
    left->count = keep;
    right->count = total - keep;
    if (!right->count)
        return true;
    *key = right->e[0].iova;
    return false;
}

/* The same for inner nodes; *key comes in as the separator between them. */
static bool inner_balance(struct inner *left, struct inner *right, uint64_t *key)
{
    uint32_t total = left->count + right->count;
    uint32_t keep = total <= INNER_MERGE ? total : total / 2;
    right->key[0] = *key;
    if (keep > left->count) {
        uint32_t n = keep - left->count;
        inner_copy(left, left->count, right, 0, n);
        inner_copy(right, 0, right, n, right->count - n);
    } else {
        uint32_t n = left->count - keep;
        inner_copy(right, n, right, 0, right->count);
        inner_copy(right, 0, left, keep, n);
    }
    left->count = keep;
    right->count = total - keep;
    if (!right->count)
        return true;
    *key = right->key[0];
    return false;
}

/* After a removal: fills or merges the nodes on the path that have become too small, from the leaf up. */
static void rebalance(struct pv_mappings *m, struct path *path)
{
    bool small = path->leaf->count < LEAF_MIN;
    if (!small || !m->height)
        return;
    forget_path(m);
    for (uint32_t level = m->height; small && level > 0; level--) {
        struct inner *parent = path->node[level - 1];
        uint32_t left = path->index[level - 1];
        if (left)
            left--;
        void *a = parent->child[left];
        void *b = parent->child[left + 1];
        uint64_t *key = &parent->key[left + 1];
        bool merged = level == m->height ? leaf_balance(a, b, key) : inner_balance(a, b, key);
        if (!merged)
            return;
        inner_drop(parent, left + 1);
        node_pool_put(level == m->height ? &m->leaves : &m->inners, b);
        small = parent->count < INNER_MIN;
    }
    while (m->height && ((struct inner *)m->root)->count == 1) {
        struct inner *root = m->root;
        m->root = root->child[0];
        m->height--;
        node_pool_put(&m->inners, root);
    }
}

int pv_mappings_remove(struct pv_mappings *m, uint64_t iova, struct pv_mapping *out)
{
    if (!m->root)
        return 0;
    struct path *path = locate(m, iova);
    if (!path->pos || path->leaf->e[path->pos - 1].iova != iova)
        return 0;
    struct leaf *leaf = path->leaf;
    uint32_t at = path->pos - 1;
    if (out)
        entry_out(&leaf->e[at], out);
    leaf->count--;
    memmove(&leaf->e[at], &leaf->e[at + 1], (leaf->count - at) * sizeof(leaf->e[0]));
    if (!--m->count)
        pv_mappings_clear(m);
    else
        rebalance(m, path);
    return 1;
}

int pv_mappings_set_flags(struct pv_mappings *m, uint64_t iova, uint32_t flags)
{
    if (!m->root || flags > 0xff)
        return 0;
    struct path *path = locate(m, iova);
    if (!path->pos || path->leaf->e[path->pos - 1].iova != iova)
        return 0;
    uint64_t *word = &path->leaf->e[path->pos - 1].word;
    *word = (uint64_t)flags << COOKIE_BITS | (*word & COOKIE_MASK);
    return 1;
}

/* The index as a whole. */

struct pv_mappings *pv_mappings_create(uint64_t max_bytes)
{
    struct pv_mappings *m = calloc(1, sizeof(*m));
    if (m)
        m->max_bytes = max_bytes;
    return m;
}

void pv_mappings_clear(struct pv_mappings *m)
{
    node_pool_drop(&m->leaves, true);
    node_pool_drop(&m->inners, false);
    m->root = NULL;
    m->height = 0;
    m->count = 0;
    forget_path(m);
}

void pv_mappings_destroy(struct pv_mappings *m)
{
    if (!m)
        return;
    node_pool_drop(&m->leaves, false);
    node_pool_drop(&m->inners, false);
    free(m);
}

uint64_t pv_mappings_count(const struct pv_mappings *m)
{
    return m->count;
}

uint64_t pv_mappings_bytes(const struct pv_mappings *m)
{
    return m->leaves.bytes + m->inners.bytes;
}

/* The entries of one leaf: 0, or what is wrong. `low` and `high` (inclusive) are what the separators promise. */
static int leaf_check(const struct leaf *leaf, uint64_t low, uint64_t high, uint64_t *count)
{
    if (!leaf->count || leaf->count > LEAF_MAX)
        return 1;
    for (uint32_t i = 0; i < leaf->count; i++) {
        const struct entry *entry = &leaf->e[i];
        if (entry->iova < low || entry->iova > high || entry->last < entry->iova)
            return 2;
        if (i && leaf->e[i - 1].last >= entry->iova)
            return 3;
    }
    *count += leaf->count;
    return 0;
}

int pv_mappings_check(const struct pv_mappings *m)
{
    if (!m->root)
        return m->count ? 4 : 0;
    struct path path = {.leaf = NULL};
    uint64_t count = 0;
    uint64_t previous = 0;
    descend(m, 0, &path);
    path.pos = 0;
    do {
        uint64_t low = 0;
        uint64_t high = UINT64_MAX;
        for (uint32_t level = 0; level < m->height; level++) {
            const struct inner *node = path.node[level];
            uint32_t i = path.index[level];
            if (node->count < 2 || node->count > INNER_MAX)
                return 5;
            if (i && node->key[i] < low)
                return 6;
            if (i)
                low = node->key[i];
            if (i + 1 < node->count)
                high = node->key[i + 1] - 1;
        }
        int wrong = leaf_check(path.leaf, low, high, &count);
        if (wrong)
            return wrong;
        if (count > path.leaf->count && previous >= path.leaf->e[0].iova)
            return 7;
        previous = path.leaf->e[path.leaf->count - 1].last;
    } while (sibling(m, &path, 1));
    return count == m->count ? 0 : 8;
}
