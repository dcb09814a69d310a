/*
 * Guest RAM and the two physical address spaces it appears in.
 *
 * Guest RAM is one shared memfd. The host sees it at its host physical addresses (HPA), in memfd order; the
 * guest sees it at guest physical addresses (GPA), through a permutation of 2 MiB blocks, with a hole below
 * 4 GiB for MMIO and the MSI window. Both views are mapped once, so a physical address becomes a pointer by
 * arithmetic. DMA buffers are extents of guest frames; a frame is recycled when no pin and no array view
 * of its extent lives.
 *
 * Not modelled: NUMA nodes, ballooning, memory hot-plug, encrypted memory.
 */
#ifndef PVFIO_MEMORY_H
#define PVFIO_MEMORY_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define PV_PAGE_SHIFT 12
#define PV_PAGE_SIZE 4096
#define PV_BLOCK_SIZE 0x200000
#define PV_GPA_HOLE_START 0xc0000000
#define PV_GPA_HOLE_END 0x100000000
#define PV_HPA_HOST_BASE 0x1000000000
#define PV_HPA_RAM_BASE 0x4000000000
#define PV_PHYS_NONE 0xffffffffffffffff
#define PV_SEED_STRAIGHT 0xffffffffffffffff /* no permutation: the guest sees the blocks in memfd order */

#define PV_ALLOC_SCATTERED 1 /* every page from a different place, none next to its neighbour */

/* A physically contiguous piece of an address space and where this process sees it. */
struct pv_window {
    uint64_t start;
    uint64_t size;
    uint8_t *ptr;
};

struct pv_space {
    struct pv_window window[2];
};

struct pv_run {
    uint64_t gpa;
    uint64_t size;
};

struct pv_memory_stats {
    uint64_t frames;      /* guest frames in all */
    uint64_t free_frames; /* guest frames nobody holds */
    uint64_t table_pages; /* guest frames handed out one by one (page tables, hypercall pages) */
    uint64_t host_pages;  /* host-private pages in use */
    uint64_t extents;     /* extents that exist */
    uint64_t pins;        /* pins over all extents */
};

struct pv_memory;

struct pv_memory *pv_memory_create(uint64_t ram_size, uint64_t host_size, uint64_t seed, int *error);
/* Whoever keeps a pointer into it holds a reference; destroy drops one (the creator's, or one of get's). */
struct pv_memory *pv_memory_get(struct pv_memory *memory);
void pv_memory_destroy(struct pv_memory *memory);
int pv_memory_fd(const struct pv_memory *memory);
const struct pv_space *pv_memory_guest_space(const struct pv_memory *memory);
const struct pv_space *pv_memory_host_space(const struct pv_memory *memory);
uint64_t pv_memory_gpa_to_hpa(const struct pv_memory *memory, uint64_t gpa);
void pv_memory_stats(struct pv_memory *memory, struct pv_memory_stats *out);
void *pv_space_at(const struct pv_space *space, uint64_t addr, uint64_t size);

/* An extent holds a reference to the memory until pv_memory_release. */
int64_t pv_memory_alloc(struct pv_memory *memory, uint64_t size, uint64_t align, uint32_t flags, uint64_t *vaddr);
void pv_memory_release(struct pv_memory *memory, int64_t extent);
int64_t pv_memory_pin(struct pv_memory *memory, uint64_t vaddr, uint64_t size);
/* Pins, and *count (may be NULL) runs as pv_memory_runs gives them, the first `max` of them stored: in one step. */
int64_t pv_memory_pin_runs(struct pv_memory *memory, uint64_t vaddr, uint64_t size, struct pv_run *runs, uint64_t max,
                           uint64_t *count);
int pv_memory_unpin(struct pv_memory *memory, int64_t extent);
int64_t pv_memory_runs(struct pv_memory *memory, uint64_t vaddr, uint64_t size, struct pv_run *runs, uint64_t max);

uint64_t pv_memory_guest_page(void *memory);
void pv_memory_guest_page_free(void *memory, uint64_t gpa);
uint64_t pv_memory_host_page(void *memory);
void pv_memory_host_page_free(void *memory, uint64_t hpa);
/* cffi: end */

/* The pointer for [addr, addr + size), or NULL where that is not inside one window. */
static inline uint8_t *pv_space_ptr(const struct pv_space *space, uint64_t addr, uint64_t size)
{
    for (int i = 0; i < 2; i++) {
        const struct pv_window *w = &space->window[i];
        uint64_t offset = addr - w->start;
        if (offset < w->size && size <= w->size - offset)
            return w->ptr + offset;
    }
    return NULL;
}

#endif
