/*
 * What the files of this room share: the memory itself, and its frame allocator. Callers hold the lock.
 */
#ifndef PVFIO_MEMORY_PRIVATE_H
#define PVFIO_MEMORY_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "memory.h"

#define MAX_ORDER 18 /* 1 GiB: the GPA hole begins at a multiple of it, so no block spans the hole */
#define NO_FRAME UINT32_MAX
#define NOT_FREE 0xff

struct extent {
    uint64_t vaddr;
    uint64_t size;
    uint64_t gpa;     /* contiguous extents */
    uint64_t *pages;  /* others: GPA of every page */
    uint64_t pins;
    bool used;        /* this slot is an extent */
    bool held;        /* an array still views it */
};

struct pv_memory {
    _Atomic uint32_t references;
    pthread_mutex_t lock;
    int fd;
    uint64_t size;
    uint64_t low_size;    /* bytes below the hole */
    struct pv_space guest, host;
    void *reservation;    /* of both views of RAM */
    uint64_t reservation_size;
    uint32_t *block_hpa;  /* 2 MiB block number by GPA order -> by HPA order */

    uint32_t frames;
    uint32_t free_frames;
    uint32_t *next, *prev; /* free lists, by the first frame of a free block */
    uint8_t *order;        /* order of the free block that begins here, or NOT_FREE */
    uint8_t *used_before;
    uint8_t *huge; /* by block in GPA order: it was asked for as a huge page */
    uint32_t *owner;       /* extent slot + 1 of a contiguous extent's frame */
    uint32_t head[MAX_ORDER + 1];

    struct extent *extents;
    uint32_t extent_slots, extent_free_hint;
    uint32_t *apart;       /* slots of extents outside the guest view, by vaddr */
    uint32_t apart_count, apart_room;

    uint32_t host_frames, host_next, host_free_head;
    uint32_t *host_free;   /* linked list of freed host pages */
    uint64_t table_pages, host_pages, extent_count, pins;
};

static inline uint64_t frame_gpa(const struct pv_memory *m, uint32_t frame)
{
    uint64_t offset = (uint64_t)frame << PV_PAGE_SHIFT;
    return offset < m->low_size ? offset : PV_GPA_HOLE_END + (offset - m->low_size);
}

/* The memfd-order number of a GPA's frame, or NO_FRAME outside RAM. */
static inline uint32_t gpa_frame(const struct pv_memory *m, uint64_t gpa)
{
    if (gpa < m->low_size)
        return gpa >> PV_PAGE_SHIFT;
    uint64_t high = gpa - PV_GPA_HOLE_END;
    if (gpa >= PV_GPA_HOLE_END && high < m->size - m->low_size)
        return (m->low_size + high) >> PV_PAGE_SHIFT;
    return NO_FRAME;
}

static inline uint64_t frame_offset(const struct pv_memory *m, uint32_t frame)
{
    uint64_t offset = (uint64_t)frame << PV_PAGE_SHIFT;
    return (uint64_t)m->block_hpa[offset / PV_BLOCK_SIZE] * PV_BLOCK_SIZE + offset % PV_BLOCK_SIZE;
}

/* A free block of 2^order frames, or NO_FRAME. */
uint32_t pv_frames_take_block(struct pv_memory *m, unsigned order);
/* A contiguous run of frames aligned to `align` frames, or NO_FRAME. */
uint32_t pv_frames_take_run(struct pv_memory *m, uint64_t count, uint64_t align);
void pv_frames_free_block(struct pv_memory *m, uint32_t frame, unsigned order);
void pv_frames_free(struct pv_memory *m, uint32_t frame, uint32_t count);
/* Zeroes those of the frames that were used before. */
void pv_frames_zero(struct pv_memory *m, uint32_t frame, uint32_t count);

/* Takes down the address range of an extent that has one of its own. */
void pv_extent_unmap(struct extent *e);

#endif
