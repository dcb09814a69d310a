/*
 * The mappings of dma_map.h.
 */
#include "dma_map.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "../pagetable/pagetable.h"
#include "iova.h"
#include "laps.h"

#define PAGE_MASK ((uint64_t)PV_PAGE_SIZE - 1)
#define LAST_PFN_32BIT 0xfffffull
#define RUNS 16

struct queue {
    uint32_t count;
    uint64_t pfns[PV_DMA_QUEUE];
};

struct pv_dma {
    struct pv_memory *memory;
    struct pt_table *table;
    struct pv_iova *iova;
    struct queue *queues;
    struct pv_laps *laps;
    uint32_t vps;
    bool below_4g;
    uint64_t queued;
    uint64_t failed_iova, failed_size;
};

struct pv_dma *pv_dma_create(struct pv_memory *memory, struct pt_table *table, struct pv_iova *iova, uint32_t vps)
{
    struct pv_dma *dma = calloc(1, sizeof(*dma));
    if (!dma)
        return NULL;
    *dma = (struct pv_dma){.memory = memory, .table = table, .iova = iova, .vps = vps, .below_4g = true};
    dma->queues = calloc(vps, sizeof(*dma->queues));
    if (!dma->queues) {
        free(dma);
        return NULL;
    }
    return dma;
}

void pv_dma_destroy(struct pv_dma *dma)
{
    if (dma)
        free(dma->queues);
    free(dma);
}

void pv_dma_set_laps(struct pv_dma *dma, struct pv_laps *laps)
{
    dma->laps = laps;
}

static uint64_t alloc_pages(struct pv_dma *dma, uint32_t vp, uint64_t pages, uint64_t limit)
{
    if (limit < PAGE_MASK)
        return PV_IOVA_NONE;
    uint64_t last = (limit - PAGE_MASK) >> PV_PAGE_SHIFT;
    if (dma->below_4g && last > LAST_PFN_32BIT) {
        uint64_t pfn = pv_iova_alloc(dma->iova, vp, pages, LAST_PFN_32BIT, 0);
        if (pfn != PV_IOVA_NONE)
            return pfn;
        dma->below_4g = false;
    }
    return pv_iova_alloc(dma->iova, vp, pages, last, 1);
}

/* Takes back what was mapped before a run was refused; a device may have used it already, so it wants a flush. */
static void undo(struct pv_dma *dma, uint32_t vp, uint64_t pfn, uint64_t mapped)
{
    struct pv_iova_range *range = pv_iova_find(dma->iova, pfn);
    uint64_t gone;
    range->cookie = PV_DMA_NO_PIN;
    if (!mapped) {
        pv_iova_free(dma->iova, vp, pfn);
        return;
    }
    pt_unmap_range(dma->table, pfn << PV_PAGE_SHIFT, mapped, &gone);
    range->ended = 1;
    dma->failed_iova = pfn << PV_PAGE_SHIFT;
    dma->failed_size = mapped;
}

int64_t pv_dma_map_runs(struct pv_dma *dma, uint32_t vp, const struct pv_run *runs, uint64_t count, uint32_t perm,
                        uint64_t limit, int64_t cookie)
{
    uint64_t pages = 0;
    pv_laps_begin(dma->laps);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t offset = runs[i].gpa & PAGE_MASK, size = runs[i].size;
        bool inner = (i && offset) || (i + 1 < count && ((offset + size) & PAGE_MASK));
        if (!size || inner || size > UINT64_MAX / 2 || (pages += (offset + size + PAGE_MASK) >> PV_PAGE_SHIFT) >> 32)
            return -EINVAL;
    }
    if (!pages || vp >= dma->vps)
        return -EINVAL;
    pv_lap(dma->laps, PV_LAP_CHECK);
    uint64_t pfn = alloc_pages(dma, vp, pages, limit);
    if (pfn == PV_IOVA_NONE)
        return -ENOMEM;
    pv_lap(dma->laps, PV_LAP_IOVA);
    uint64_t mapped = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t offset = runs[i].gpa & PAGE_MASK, size = (offset + runs[i].size + PAGE_MASK) & ~PAGE_MASK;
        int error = pt_map_range(dma->table, (pfn << PV_PAGE_SHIFT) + mapped, runs[i].gpa - offset, size, perm);
        if (error) {
            undo(dma, vp, pfn, mapped);
            return error;
        }
        mapped += size;
    }
    pv_lap(dma->laps, PV_LAP_TABLE);
    pv_iova_find(dma->iova, pfn)->cookie = cookie;
    pv_lap(dma->laps, PV_LAP_IOVA);
    return (int64_t)((pfn << PV_PAGE_SHIFT) + (runs[0].gpa & PAGE_MASK));
}

int64_t pv_dma_map_phys(struct pv_dma *dma, uint32_t vp, uint64_t gpa, uint64_t size, uint32_t perm, uint64_t limit)
{
    struct pv_run run = {.gpa = gpa, .size = size};
    return pv_dma_map_runs(dma, vp, &run, 1, perm, limit, PV_DMA_NO_PIN);
}

int64_t pv_dma_map(struct pv_dma *dma, uint32_t vp, uint64_t vaddr, uint64_t size, uint32_t perm, uint64_t limit)
{
    uint64_t offset = vaddr & PAGE_MASK;
    if (!size || size > UINT64_MAX / 2)
        return -EINVAL;
    uint64_t start = vaddr - offset, whole = (offset + size + PAGE_MASK) & ~PAGE_MASK;
    struct pv_run few[RUNS], *runs = few;
    pv_laps_begin(dma->laps);
    int64_t count = pv_memory_runs(dma->memory, start, whole, few, RUNS);
    if (count < 0)
        return count;
    if (count > RUNS) {
        runs = malloc((size_t)count * sizeof(*runs));
        if (!runs)
            return -ENOMEM;
        count = pv_memory_runs(dma->memory, start, whole, runs, (uint64_t)count);
    }
    int64_t pin = pv_memory_pin(dma->memory, start, whole);
    pv_lap(dma->laps, PV_LAP_PIN);
    int64_t address = pin < 0 ? pin : pv_dma_map_runs(dma, vp, runs, (uint64_t)count, perm, limit, pin);
    if (runs != few)
        free(runs);
    if (address >= 0)
        return address + (int64_t)offset;
    if (pin >= 0)
        pv_memory_unpin(dma->memory, pin);
    return address;
}

uint64_t pv_dma_failed(struct pv_dma *dma, uint64_t *iova)
{
    uint64_t size = dma->failed_size;
    *iova = dma->failed_iova;
    dma->failed_size = 0;
    return size;
}

static struct pv_iova_range *live_range(struct pv_dma *dma, uint64_t addr, uint64_t size)
{
    struct pv_iova_range *range = pv_iova_find(dma->iova, addr >> PV_PAGE_SHIFT);
    uint64_t offset = addr & PAGE_MASK;
    if (!range || range->ended || !size || size > UINT64_MAX / 2)
        return NULL;
    return (offset + size + PAGE_MASK) >> PV_PAGE_SHIFT == range->pages ? range : NULL;
}

static void clear(struct pv_dma *dma, struct pv_iova_range *range)
{
    uint64_t gone;
    pv_lap(dma->laps, PV_LAP_CHECK);
    pt_unmap_range(dma->table, range->pfn << PV_PAGE_SHIFT, (uint64_t)range->pages << PV_PAGE_SHIFT, &gone);
    range->ended = 1;
    pv_lap(dma->laps, PV_LAP_TABLE);
}

static void unpin(struct pv_dma *dma, struct pv_iova_range *range)
{
    if (range->cookie >= 0)
        pv_memory_unpin(dma->memory, range->cookie);
    range->cookie = PV_DMA_NO_PIN;
    pv_lap(dma->laps, PV_LAP_PIN);
}

static int push(struct pv_dma *dma, struct queue *queue, uint64_t pfn)
{
    queue->pfns[queue->count++] = pfn;
    int flags = dma->queued++ ? 0 : PV_DMA_QUEUE_FIRST;
    pv_lap(dma->laps, PV_LAP_IOVA);
    return queue->count == PV_DMA_QUEUE ? flags | PV_DMA_QUEUE_FULL : flags;
}

int pv_dma_unmap(struct pv_dma *dma, uint64_t addr, uint64_t size)
{
    pv_laps_begin(dma->laps);
    struct pv_iova_range *range = live_range(dma, addr, size);
    if (!range)
        return -EINVAL;
    clear(dma, range);
    return 0;
}

int pv_dma_end(struct pv_dma *dma, uint32_t vp, uint64_t addr)
{
    pv_laps_begin(dma->laps);
    struct pv_iova_range *range = pv_iova_find(dma->iova, addr >> PV_PAGE_SHIFT);
    if (!range || !range->ended)
        return -EINVAL;
    pv_lap(dma->laps, PV_LAP_IOVA);
    unpin(dma, range);
    int error = pv_iova_free(dma->iova, vp, range->pfn);
    pv_lap(dma->laps, PV_LAP_IOVA);
    return error;
}

int pv_dma_queue(struct pv_dma *dma, uint32_t vp, uint64_t addr)
{
    struct pv_iova_range *range = pv_iova_find(dma->iova, addr >> PV_PAGE_SHIFT);
    if (!range || !range->ended || vp >= dma->vps)
        return -EINVAL;
    struct queue *queue = &dma->queues[vp];
    if (queue->count == PV_DMA_QUEUE)
        return -ENOSPC;
    unpin(dma, range);
    return push(dma, queue, range->pfn);
}

int pv_dma_unmap_lazy(struct pv_dma *dma, uint32_t vp, uint64_t addr, uint64_t size)
{
    pv_laps_begin(dma->laps);
    struct pv_iova_range *range = live_range(dma, addr, size);
    if (!range || vp >= dma->vps)
        return -EINVAL;
    struct queue *queue = &dma->queues[vp];
    if (queue->count == PV_DMA_QUEUE)
        return -ENOSPC;
    clear(dma, range);
    unpin(dma, range);
    return push(dma, queue, range->pfn);
}

uint64_t pv_dma_drain(struct pv_dma *dma)
{
    uint64_t freed = dma->queued;
    for (uint32_t vp = 0; freed && vp < dma->vps; vp++) {
        struct queue *queue = &dma->queues[vp];
        for (uint32_t i = 0; i < queue->count; i++)
            pv_iova_free(dma->iova, vp, queue->pfns[i]);
        queue->count = 0;
    }
    dma->queued = 0;
    return freed;
}

void pv_dma_get_stats(const struct pv_dma *dma, struct pv_dma_stats *out)
{
    *out = (struct pv_dma_stats){.queued = dma->queued, .below_4g = dma->below_4g};
}

int64_t pv_dma_direct(struct pv_memory *memory, uint64_t vaddr, uint64_t size, uint64_t limit)
{
    uint64_t offset = vaddr & PAGE_MASK;
    struct pv_run run;
    if (!size || size > UINT64_MAX / 2)
        return -EINVAL;
    int64_t count = pv_memory_runs(memory, vaddr - offset, (offset + size + PAGE_MASK) & ~PAGE_MASK, &run, 1);
    if (count < 0)
        return count;
    return count > 1 || run.gpa + offset + size - 1 > limit ? -EIO : (int64_t)(run.gpa + offset);
}
