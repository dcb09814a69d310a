/*
 * Nodes of 1 KiB for a tree, in chunks that grow with it: so the memory per entry stays small at every size, and a large
 * tree has few translations. Node contents are whatever was there before.
 *
 * Not modelled: giving a single chunk back; all of them go when the tree is empty.
 */
#ifndef PVFIO_NODE_POOL_H
#define PVFIO_NODE_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NODE_BYTES 1024u

struct free_node;
struct node_chunk;

/* All zero at first; max_bytes: 0 for no limit. */
struct node_pool {
    struct free_node *free;
    uint64_t nfree;
    uint8_t *fresh; /* the newest chunk's nodes that were never used */
    uint64_t nfresh;
    struct node_chunk *chunks;
    uint64_t bytes;
    uint64_t max_bytes;
};

/* Makes sure that the next n calls of node_pool_get succeed; false for lack of memory. */
bool node_pool_reserve(struct node_pool *pool, uint64_t n);
void *node_pool_get(struct node_pool *pool);
void node_pool_put(struct node_pool *pool, void *node);
/* Gives every node back, and the chunks, but for the first and smallest where keep says so. */
void node_pool_drop(struct node_pool *pool, bool keep);

#endif
