/*
 * A DMA domain's mappings: the part of the DMA API that runs for every map and unmap.
 *
 * A map pins the memory, takes IOVAs, and writes the table; an unmap clears the entries, and then either the caller flushes
 * and ends the mapping (strict), or the range waits in its VP's flush queue until a flush of the whole domain (lazy).
 * Pins go with the mapping: at the end of a strict unmap, but at once in a lazy one, whose memory is its owner's again
 * before the flush, as it is on Linux.
 *
 * An IOVA range has its entry in the allocator (iova.h) with the pinned extent as cookie. A PCI device gets IOVAs below
 * 4 GiB while there are any, as Linux's dma-iommu does.
 *
 * Not modelled: locking (one task at a time), timers and hypercalls (Python's).
 */
#ifndef PVFIO_DMA_MAP_H
#define PVFIO_DMA_MAP_H

#include <stdint.h>

#include "../memory/memory.h"

/* cffi: begin */
#define PV_DMA_QUEUE 256 /* entries of a VP's flush queue */
#define PV_DMA_QUEUE_FIRST 1 /* nothing was queued before */
#define PV_DMA_QUEUE_FULL 2  /* the VP's queue is full now */
#define PV_DMA_NO_PIN -1

struct pt_table;
struct pv_iova;
struct pv_laps;
struct pv_dma;

struct pv_dma_stats {
    uint64_t queued; /* ranges in flush queues */
    uint64_t below_4g; /* whether IOVAs below 4 GiB are still tried first */
};

/* Borrows all three, which must outlive it. NULL for lack of memory. */
struct pv_dma *pv_dma_create(struct pv_memory *memory, struct pt_table *table, struct pv_iova *iova, uint32_t vps);
void pv_dma_destroy(struct pv_dma *dma);
/* Takes the time of every step from now on; NULL: no more. */
void pv_dma_set_laps(struct pv_dma *dma, struct pv_laps *laps);

/* Map process memory of one extent, or runs of guest memory (the first one may begin, and the last may end, inside a page;
 * `cookie` goes with the mapping). The DMA address, no byte of its pages above limit, or: -EINVAL size 0, -EFAULT not
 * DMA memory, -ENOMEM no IOVAs, no table page, or what the table says. When pv_dma_failed then says that ranges are to be
 * flushed, they are. */
int64_t pv_dma_map(struct pv_dma *dma, uint32_t vp, uint64_t vaddr, uint64_t size, uint32_t perm, uint64_t limit);
int64_t pv_dma_map_runs(struct pv_dma *dma, uint32_t vp, const struct pv_run *runs, uint64_t count, uint32_t perm,
                        uint64_t limit, int64_t cookie);
/* One run at gpa, as above. */
int64_t pv_dma_map_phys(struct pv_dma *dma, uint32_t vp, uint64_t gpa, uint64_t size, uint32_t perm, uint64_t limit);
/* The IOVA and bytes of what the last map had mapped before it failed, once: to be flushed and then ended (pv_dma_end).
 * 0: nothing. */
uint64_t pv_dma_failed(struct pv_dma *dma, uint64_t *iova);

/* Clears the entries of a mapping; the range is "ended". 0, or -EINVAL where no live mapping has these pages. */
int pv_dma_unmap(struct pv_dma *dma, uint64_t addr, uint64_t size);
/* After the flush: unpins the memory and frees the IOVAs. 0, or -EINVAL where no ended range begins in that page. */
int pv_dma_end(struct pv_dma *dma, uint32_t vp, uint64_t addr);
/* Instead of it: unpins, and leaves the IOVAs to the VP's queue. PV_DMA_QUEUE_* flags, or -EINVAL, or -ENOSPC: no room. */
int pv_dma_queue(struct pv_dma *dma, uint32_t vp, uint64_t addr);
/* Both, with room looked for first: nothing is done at -EINVAL and -ENOSPC. */
int pv_dma_unmap_lazy(struct pv_dma *dma, uint32_t vp, uint64_t addr, uint64_t size);
/* After a flush of the whole domain: frees every queued range, into its VP's magazines. How many. */
uint64_t pv_dma_drain(struct pv_dma *dma);
void pv_dma_get_stats(const struct pv_dma *dma, struct pv_dma_stats *out);

/* The GPA of process memory that is one piece of one extent and lies below limit, for devices without an IOMMU. Or: -EINVAL
 * size 0, -EFAULT not DMA memory, -EIO in pieces or out of reach. */
int64_t pv_dma_direct(struct pv_memory *memory, uint64_t vaddr, uint64_t size, uint64_t limit);
/* cffi: end */

#endif
