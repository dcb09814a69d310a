/*
 * The bus master: how a device reads and writes memory.
 *
 * A device holds a `struct pv_bus` and knows nothing of what is behind it: the pvIOMMU's requester (iommu.h) is
 * one implementation, a plain table of (iova, size, pointer) another (table_bus.c). Operations are split at page
 * boundaries and, between the pages, into sections of at most PV_SECTION_BYTES: a translation is used only
 * inside the section that made it. An operation stops at the first page that does not translate and reports how
 * many bytes are done and the exact IOVA; no byte of the faulting page or after it is touched.
 *
 * A range may be *remote*: memory that is not in this process and is reached by asking whoever has it. Its bytes go
 * through a buffer, at most PV_SECTION_BYTES at a time, and no section is open while the answer is waited for. Where the
 * far end refuses a piece, it is asked again page by page, so that what is done ends where the refused page begins.
 *
 * Not modelled: PCIe ordering between requests, TLP sizes, relaxed ordering, peer-to-peer.
 */
#ifndef PVFIO_BUS_H
#define PVFIO_BUS_H

#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pv_bus;

/* Host memory behind an IOVA: `len` bytes from `ptr` on, to the end of the translation. */
struct pv_span {
    uint8_t *ptr;
    uint64_t len;
};

/* What `translate` answers for a remote range: the span has a length and no pointer. */
#define PV_REMOTE INT_MIN

struct pv_bus_ops {
    /* Inside a section. 0, PV_REMOTE, or -EFAULT after the fault was logged. */
    int (*translate)(struct pv_bus *bus, uint64_t iova, uint32_t perm, struct pv_span *span);
    void (*enter)(struct pv_bus *bus);
    void (*leave)(struct pv_bus *bus);
    /* An interrupt message. 0, or -EFAULT where nothing accepts it. */
    int (*msi)(struct pv_bus *bus, uint64_t addr, uint32_t data);
    /* The function's ATS enable bit and Smallest Translation Unit. NULL where nothing translates. */
    void (*ats)(struct pv_bus *bus, bool on, uint32_t stu);
    void (*destroy)(struct pv_bus *bus);
    /* Outside sections: reads or writes remote bytes, may wait. 0 or -errno. NULL where nothing is remote. */
    int (*ask)(struct pv_bus *bus, uint64_t iova, void *buf, uint64_t n, int write);
};

struct pv_bus {
    const struct pv_bus_ops *ops;
    _Atomic uint32_t references; /* the creator's, and one of every engine and MSI-X table that holds it */
    /* Not zero: operations end with -ECANCELED at the next section (reset, abort, surprise removal). */
    _Atomic uint32_t cancel;
    /* Not zero: requests go untranslated although ATS is on. The device's engine says so, of the work it does next. */
    _Atomic uint32_t untranslated;
    _Atomic uint32_t remote; /* how many remote ranges there are: while not zero, an operation may wait for somebody */
};

/*
 * Called for every piece of a range, inside a section; not zero ends the walk with that value. Of a range that is
 * written it fills every byte: what a buffer holds goes out whole, and not at all where it ends the walk.
 */
typedef int (*pv_span_fn)(void *arg, uint8_t *ptr, uint64_t len);

/* cffi: begin */
#define PV_DMA_READ 1
#define PV_DMA_WRITE 2
#define PV_SECTION_BYTES 65536

struct pv_bus;

/* How far an operation came. `perm` is the permission that was missing at fault_iova. */
struct pv_dma {
    uint64_t done;
    uint64_t fault_iova;
    uint32_t perm;
    uint32_t backward; /* pv_bus_move ran from the end; `done` counts from the end */
};

struct pv_table_bus_stats {
    uint64_t maps; /* ranges there are now, remote ones among them */
    uint64_t msis;
    uint64_t last_msi_addr;
    uint32_t last_msi_data;
};

/* One of many moves: `n` bytes between `bytes`, which are the device's, and the host's memory at `iova`. */
struct pv_transfer {
    uint64_t iova;
    uint8_t *bytes;
    uint64_t n;
    uint32_t perm;  /* PV_DMA_WRITE: to the host */
    int32_t result; /* 0, -EFAULT or -ECANCELED */
};

/*
 * In their order, and faster than one by one where they are small or go to the device's memory. One that fails keeps no
 * other from moving.
 */
void pv_bus_transfer(struct pv_bus *bus, struct pv_transfer *transfer, uint32_t count);
/* All: 0, -EFAULT (fault_iova, done), -ECANCELED (done). */
int pv_bus_read(struct pv_bus *bus, uint64_t iova, void *dst, uint64_t n, struct pv_dma *dma);
int pv_bus_write(struct pv_bus *bus, uint64_t iova, const void *src, uint64_t n, struct pv_dma *dma);
int pv_bus_move(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma);
int pv_bus_fill(struct pv_bus *bus, uint64_t dst, const void *pattern8, uint64_t n, struct pv_dma *dma);
/* 1: differs, dma->done is the offset of the first different byte. */
int pv_bus_compare(struct pv_bus *bus, uint64_t a, uint64_t b, uint64_t n, struct pv_dma *dma);
int pv_bus_msi(struct pv_bus *bus, uint64_t addr, uint32_t data);
void pv_bus_cancel(struct pv_bus *bus, int on);
int pv_bus_cancelled(struct pv_bus *bus);
/*
 * The ATS control register of the function (PCIe 4.0 10.5.1.3): enable, and the Smallest Translation Unit as the power of
 * two of 4096 bytes. A change empties the device's translation cache. Not from inside a section.
 */
void pv_bus_ats(struct pv_bus *bus, int on, uint32_t stu);
struct pv_bus *pv_bus_get(struct pv_bus *bus);
/* Drops a reference; the last one frees it. */
void pv_bus_destroy(struct pv_bus *bus);

/* Operations may wait for somebody now: not for a thread that this somebody, or other devices, need. */
int pv_bus_is_remote(struct pv_bus *bus);

/*
 * The plain table. Ranges do not overlap; memory stays the caller's. Interrupts are counted, and ring `eventfd` (-1:
 * none), or what pv_table_bus_vector says.
 */
struct pv_bus *pv_table_bus_create(int eventfd);
/* 0, -EINVAL, -EEXIST (overlap), -ENOMEM. */
int pv_table_bus_map(struct pv_bus *bus, uint64_t iova, uint64_t size, void *ptr, uint32_t perm);
/*
 * Takes out the ranges wholly inside; one that is partly inside: -EINVAL and nothing happens. When it returns, nothing
 * uses their memory. What was asked of a remote one is not waited for.
 */
int pv_table_bus_unmap(struct pv_bus *bus, uint64_t iova, uint64_t size);
/*
 * Reads or writes remote bytes for an engine or another thread; several may call at once. Never called inside a section;
 * may wait, and should end early with -ECANCELED once the bus is cancelled. The range may be unmapped by then: who asks for
 * it inside a section in which it translates has asked before the unmap returned. 0 or -errno.
 */
typedef int (*pv_remote_fn)(void *arg, uint64_t iova, void *buf, uint64_t n, int write);
/*
 * Who is asked for remote ranges; NULL: nobody, and they fault. Returns when no call of the function before is under way
 * any more: end what those wait for first.
 */
void pv_table_bus_remote(struct pv_bus *bus, pv_remote_fn fn, void *arg);
/* As pv_table_bus_map, of a remote range. */
int pv_table_bus_map_remote(struct pv_bus *bus, uint64_t iova, uint64_t size, uint32_t perm);
/*
 * From now on a message into the interrupt window (PV_MSI_START..PV_MSI_END) whose data is i < n rings the eventfd of
 * vector i, and nothing accepts any other. All are without one at first; n = 0: back to the eventfd of the creation.
 */
int pv_table_bus_vectors(struct pv_bus *bus, uint32_t n);
/* A duplicate of the eventfd is kept; -1: none, nothing accepts the message. -EINVAL: no such vector, or no eventfd. */
int pv_table_bus_vector(struct pv_bus *bus, uint32_t i, int fd);
/*
 * One more in the counter of somebody's eventfd, as a vector's message would. Once there were
 * vectors this never waits, whatever the other side does with its eventfd (where the system has asynchronous I/O).
 */
int pv_table_bus_ring(struct pv_bus *bus, int eventfd);
/* Is the descriptor an eventfd's? */
int pv_is_eventfd(int fd);
void pv_table_bus_stats(struct pv_bus *bus, struct pv_table_bus_stats *out);
/* cffi: end */

int pv_bus_walk(struct pv_bus *bus, uint64_t iova, uint64_t n, uint32_t perm, pv_span_fn fn, void *arg,
                struct pv_dma *dma);
/*
 * Two ranges in step, both read, b translated first: fn sees the pieces inside a section; not zero ends the walk with
 * that value, and then fn has added what is done of the piece to dma->done.
 */
typedef int (*pv_pair_fn)(void *arg, uint8_t *a, const uint8_t *b, uint64_t len, struct pv_dma *dma);
int pv_bus_pair_walk(struct pv_bus *bus, uint64_t a, uint64_t b, uint64_t n, pv_pair_fn fn, void *arg,
                     struct pv_dma *dma);
/* One read, two writes; the three ranges do not overlap. */
int pv_bus_dualcast(struct pv_bus *bus, uint64_t dst1, uint64_t dst2, uint64_t src, uint64_t n, struct pv_dma *dma);
/* As pv_bus_move, from the end: for the last part of a move that overlaps. */
int pv_bus_move_backward(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma);
/* As pv_bus_move, forward only, and fn sees each piece after it was copied (copy and CRC in one pass). */
int pv_bus_copy_walk(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, pv_span_fn fn, void *arg,
                     struct pv_dma *dma);

#endif
