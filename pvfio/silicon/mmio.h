/*
 * Stores and loads that reach a device without passing through Python: doorbells and 64-byte submissions.
 *
 * A device (or a backend that maps real BARs) gives a `struct pv_mmio` per BAR; a driver's Region holds the pointer.
 */
#ifndef PVFIO_MMIO_H
#define PVFIO_MMIO_H

#include <stddef.h>
#include <stdint.h>

struct pv_mmio_ops {
    /* 0, or -EINVAL for an access the BAR does not take. */
    int (*load)(void *device, uint64_t offset, uint32_t size, uint64_t *value);
    int (*store)(void *device, uint64_t offset, uint32_t size, uint64_t value);
    /* One 64-byte write. posted: 0 always (a full queue drops it). nonposted (enqcmd): 0 accepted, -EAGAIN retry. */
    int (*submit)(void *device, uint64_t offset, const void *src64, int nonposted);
    /* After a series of submissions or a store: tell the engine. May be NULL. */
    void (*kick)(void *device);
};

/* cffi: begin */
struct pv_mmio_ops;

struct pv_mmio {
    const struct pv_mmio_ops *ops;
    void *device;
    uint64_t size;
};

/* All: 0 or -errno; EINVAL for a bad size or alignment or an offset outside the BAR, ENOTTY where the BAR cannot do it. */
int pv_mmio_load(struct pv_mmio *mmio, uint64_t offset, uint32_t size, uint64_t *value);
int pv_mmio_store(struct pv_mmio *mmio, uint64_t offset, uint32_t size, uint64_t value);
/* n submissions of 64 bytes, to consecutive 64-byte slots from offset on, wrapping inside its 4 KiB page. */
int pv_mmio_movdir64b(struct pv_mmio *mmio, uint64_t offset, const void *src, uint64_t n);
/* 0 accepted, -EAGAIN: the queue says retry. */
int pv_mmio_enqcmd(struct pv_mmio *mmio, uint64_t offset, const void *src64);

/* A part of a BAR that is mapped, `size` bytes from `offset` on. */
struct pv_mmio_area {
    uint64_t offset;
    uint64_t size;
    uint8_t *ptr;
};

/*
 * A BAR of `size` bytes of which these areas are mapped: accesses are loads and stores of their own size, a 64-byte submission
 * is one store where the processor can (MOVDIR64B), else eight; nothing is told to anybody. EINVAL outside the areas,
 * ENOTTY for enqcmd: plain memory does not answer. Areas do not overlap and stay mapped until pv_mapped_bar_destroy. NULL: no memory, or an area that is outside the BAR or whose pointer is
 * not aligned as its offset is (64 bytes).
 */
struct pv_mmio *pv_mapped_bar_create(uint64_t size, const struct pv_mmio_area *areas, uint32_t count);
void pv_mapped_bar_destroy(struct pv_mmio *mmio);
/* cffi: end */

#endif
