/*
 * The memory behind node_pool.h: anonymous mappings, from 2 MiB on in huge pages where the system gives them.
 */
#include "node_pool.h"

#include <stdlib.h>
#include <sys/mman.h>

#define FIRST_CHUNK ((size_t)16384)
#define MAX_CHUNK ((size_t)8 << 20)
#define HUGE_PAGE ((size_t)2 << 20)

struct node_chunk {
    struct node_chunk *next;
    uint8_t *base;
    size_t size;
};

struct free_node {
    struct free_node *next;
};

static uint8_t *chunk_map(size_t size)
{
    size_t slack = size >= HUGE_PAGE ? HUGE_PAGE : 0;
    uint8_t *raw = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    if (!slack)
        return raw;
    size_t lead = (HUGE_PAGE - ((uintptr_t)raw & (HUGE_PAGE - 1))) & (HUGE_PAGE - 1);
    if (lead)
        munmap(raw, lead);
    if (slack > lead)
        munmap(raw + lead + size, slack - lead);
    madvise(raw + lead, size, MADV_HUGEPAGE);
    return raw + lead;
}

static bool chunk_add(struct node_pool *pool)
{
    size_t size = (size_t)pool->bytes / 2;
    if (size > MAX_CHUNK)
        size = MAX_CHUNK;
    if (size < FIRST_CHUNK)
        size = FIRST_CHUNK;
    size &= ~((size >= HUGE_PAGE ? HUGE_PAGE : (size_t)4096) - 1);
    if (pool->max_bytes && (pool->bytes > pool->max_bytes || size > pool->max_bytes - pool->bytes))
        return false;
    struct node_chunk *chunk = malloc(sizeof(*chunk));
    if (!chunk)
        return false;
    chunk->base = chunk_map(size);
    if (!chunk->base) {
        free(chunk);
        return false;
    }
    chunk->size = size;
    chunk->next = pool->chunks;
    pool->chunks = chunk;
    pool->bytes += size;
    pool->fresh = chunk->base;
    pool->nfresh = size / NODE_BYTES;
    return true;
}

void node_pool_drop(struct node_pool *pool, bool keep)
{
    while (pool->chunks && !(keep && !pool->chunks->next)) {
        struct node_chunk *chunk = pool->chunks;
        pool->chunks = chunk->next;
        pool->bytes -= chunk->size;
        munmap(chunk->base, chunk->size);
        free(chunk);
    }
    pool->free = NULL;
    pool->nfree = 0;
    pool->fresh = pool->chunks ? pool->chunks->base : NULL;
    pool->nfresh = pool->chunks ? pool->chunks->size / NODE_BYTES : 0;
}

void node_pool_put(struct node_pool *pool, void *node)
{
    struct free_node *entry = node;
    entry->next = pool->free;
    pool->free = entry;
    pool->nfree++;
}

bool node_pool_reserve(struct node_pool *pool, uint64_t n)
{
    while (pool->nfree + pool->nfresh < n) {
        while (pool->nfresh) {
            node_pool_put(pool, pool->fresh);
            pool->fresh += NODE_BYTES;
            pool->nfresh--;
        }
        if (!chunk_add(pool))
            return false;
    }
    return true;
}

void *node_pool_get(struct node_pool *pool)
{
    if (pool->free) {
        struct free_node *node = pool->free;
        pool->free = node->next;
        pool->nfree--;
        return node;
    }
    void *node = pool->fresh;
    pool->fresh += NODE_BYTES;
    pool->nfresh--;
    return node;
}
