/*
 * What every type1 mapping runs through: the checks of a map in Linux's order, pinning, the account of locked memory, the
 * index, the page tables of every domain, and the undoing of all that where a step fails. One request or an array of them.
 *
 * An unmap has two halves, because between them the caller makes the flush: the first clears page tables and marks
 * the mappings, the second takes the marked ones out of the index and unpins. A flush that does not come about is followed by
 * the undoing of the marks instead: the mappings stay known and pinned.
 *
 * Not modelled: the flush itself, groups and domains coming and going, dirty bitmaps (type1.py), locking.
 */
#ifndef PVFIO_TYPE1_MAP_H
#define PVFIO_TYPE1_MAP_H

#include <stdint.h>

#include "../abi/abi.h"
#include "../memory/memory.h"
#include "../pagetable/pagetable.h"
#include "laps.h"
#include "mappings.h"

/* cffi: begin */
#define PV_TYPE1_NO_LIMIT 0xffffffffffffffff

/* Why a request was refused, beside its errno. */
#define PV_TYPE1_BAD_REQUEST 1   /* argsz or flags */
#define PV_TYPE1_BAD_SIZE 2      /* size 0 */
#define PV_TYPE1_WRAPS 3
#define PV_TYPE1_NO_PERMISSION 4 /* neither read nor write */
#define PV_TYPE1_UNALIGNED 5
#define PV_TYPE1_OVERLAPS 6      /* `where`: the mapping that is there */
#define PV_TYPE1_NO_ENTRY 7
#define PV_TYPE1_OUTSIDE 8       /* outside the aperture or in a reserved range */
#define PV_TYPE1_NOT_PINNABLE 9
#define PV_TYPE1_MEMLOCK 10
#define PV_TYPE1_NO_MEMORY 11    /* for the index, or for the list of runs */
#define PV_TYPE1_PAGE_TABLE 12   /* what the page tables said */
#define PV_TYPE1_SPLITS 13       /* `where`: the mapping that would be split */

/* A process's locked memory in bytes; its containers may share one. limit: PV_TYPE1_NO_LIMIT for none. */
struct pv_locked {
    uint64_t limit;
    uint64_t locked;
};

/* One container. What the pointers lead to is the caller's and outlives it; all but the last group may change between
 * two calls. */
struct pv_type1 {
    struct pv_memory *memory;
    struct pv_mappings *mappings; /* flags: the permissions; cookie: the pinned extent */
    struct pv_locked *account;
    struct pt_table *const *tables; /* of every domain */
    const struct vfio_iova_range *ranges; /* usable IOVAs, in order */
    uint32_t table_count;
    uint32_t range_count;
    uint64_t page_mask; /* smallest page size less 1 */
    uint64_t dma_avail; /* how many more mappings there may be */
    uint32_t v2;        /* VFIO_TYPE1v2_IOMMU: a mapping is never split; else it goes whole, or not at all */

    uint32_t reason;    /* of the last refusal */
    uint64_t where;     /* an IOVA */
    uint64_t flush_first, flush_last; /* what the last first half of an unmap cleared; empty where first > last */
    struct pv_laps *laps; /* takes the time of every step; usually NULL */
    struct pv_run *runs; /* scratch, made by the calls; pv_type1_drop_scratch */
    uint64_t run_room;
};

void pv_type1_drop_scratch(struct pv_type1 *type1);

/* 0 or a negative errno with `reason` set. All or nothing, but for a mapping of several runs or domains that failed in the
 * middle: that is -errno with *shown 1, stands in the index, and is to be unmapped like any other. */
int pv_type1_map(struct pv_type1 *type1, uint64_t iova, uint64_t vaddr, uint64_t size, uint32_t flags, int *shown);
/* The same for a request of VFIO_IOMMU_MAP_DMA. */
int pv_type1_map_request(struct pv_type1 *type1, const struct vfio_iommu_type1_dma_map *request, int *shown);
/* n of them in order, until one is refused. *done: how many are in the index, the one that was shown included;
 * *index: the one refused. The caller unmaps the first *done. */
int pv_type1_map_batch(struct pv_type1 *type1, uint64_t n, const uint64_t *iova, const uint64_t *vaddr,
                       const uint64_t *size, uint32_t flags, uint64_t *done, uint64_t *index);

/* First half: the bytes of what lies in the range and was cleared, or a negative errno with `reason` set and nothing done. */
int64_t pv_type1_unmap(struct pv_type1 *type1, uint64_t iova, uint64_t size);
int64_t pv_type1_unmap_all(struct pv_type1 *type1);
/* The same for a request of VFIO_IOMMU_UNMAP_DMA without flags; -EINVAL for one with flags. */
int64_t pv_type1_unmap_request(struct pv_type1 *type1, const struct vfio_iommu_type1_dma_unmap *request);
/* n of them in order, until one is refused (the negative errno; else 0). *done: how many were not; `bytes` of each. */
int pv_type1_unmap_batch(struct pv_type1 *type1, uint64_t n, const uint64_t *iova, const uint64_t *size, uint64_t *bytes,
                         uint64_t *done);
/* Second half, for the same ranges. */
void pv_type1_unmap_finish(struct pv_type1 *type1, uint64_t first, uint64_t last);
/* ... and the answer into the request: its bytes. */
void pv_type1_finish_request(struct pv_type1 *type1, struct vfio_iommu_type1_dma_unmap *request, uint64_t bytes);
void pv_type1_unmap_finish_batch(struct pv_type1 *type1, uint64_t n, const uint64_t *iova, const uint64_t *size);
/* Instead of it, for everything that is marked. */
void pv_type1_unmap_undo(struct pv_type1 *type1);

/* Every mapping into one more table: 0, or the negative errno of the page table with some of them in it. */
int pv_type1_replay(struct pv_type1 *type1, struct pt_table *table);
/* cffi: end */

#endif
