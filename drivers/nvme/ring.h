/*
 * The driver's side of a submission queue and its completion queue (NVMe Base 2.0c 3.3.1): filling many entries, and taking
 * many completions, in one call each.
 *
 * The memory of both queues is shared with a controller that is not to be trusted: what it writes is read once and
 * checked. Everything else is the driver's alone, and one thread's at a time.
 *
 * Not here: what commands mean, data pointers other than one address, shadow doorbells.
 */
#ifndef PVFIO_DRIVERS_NVME_RING_H
#define PVFIO_DRIVERS_NVME_RING_H

#include <stdint.h>

#include "silicon/mmio.h"

/* cffi: begin */
struct pv_nvme_ring {
    uint64_t *sq; /* `entries` of 64 bytes */
    uint32_t *cq; /* `cq_entries` of 16 bytes */
    uint32_t entries, cq_entries;
    uint64_t sq_doorbell;
    uint32_t depth;   /* identifiers: 0 to depth - 1 */
    uint16_t *free;   /* depth: the first `room` can be given out */
    int64_t *since;   /* depth: when each was submitted, 0: not in flight */
    uint32_t tail, head, phase;
    uint32_t told; /* the tail that the controller knows of */
    uint32_t room, outstanding;
    uint32_t unacknowledged; /* completions taken of which the controller was not told */
    uint32_t most_unacknowledged;
};

/*
 * The next `n` commands, in flight since `now` (not 0), and their identifiers: each is `entry`, but for the identifier, the
 * address (PRP1 or the SGL's) and the LBA (CDW10 and 11). Then the doorbell; mmio NULL: it is not rung. 0, -EAGAIN: there is
 * not so much room, nothing happened; or what became of the doorbell, -ENOTTY without one: the commands are there, and the
 * controller was not told.
 */
int pv_nvme_post(struct pv_nvme_ring *ring, struct pv_mmio *mmio, const uint8_t *entry, uint32_t n, const uint64_t *lbas,
                 const uint64_t *addresses, int64_t now, int64_t *cids);
#define PV_NVME_UNTOLD 0x10000
/* As pv_nvme_post of one command, in numbers. Its identifier, or that and PV_NVME_UNTOLD; -EAGAIN. */
int pv_nvme_post_one(struct pv_nvme_ring *ring, struct pv_mmio *mmio, const uint8_t *entry, uint64_t lba, uint64_t address,
                     int64_t now);
/* The next command is `entry`, but for the identifier. That, or -EAGAIN. The doorbell is not rung. */
int pv_nvme_put(struct pv_nvme_ring *ring, const uint8_t *entry, int64_t now);

/* Beside what was reaped: it is time to tell the controller of it (the head doorbell). */
#define PV_NVME_TELL 0x100000000
/*
 * Takes at most `most` completions, and those up to the end of the queue's memory; waits up to `wait_ns` while there are
 * fewer than `least`. How many, in bits 15:0, with their identifiers and statuses; in bits 31:16 how many of these are no
 * success; PV_NVME_TELL. -EPROTO: the next one is of no command in flight, the controller is not to be trusted.
 * `release`: the identifiers can be given out again at once.
 */
int64_t pv_nvme_reap(struct pv_nvme_ring *ring, uint32_t most, uint32_t least, uint64_t wait_ns, int release, int64_t *cids,
                     uint16_t *status);
/* As pv_nvme_reap of one with `release`: identifier, from bit 16 on its status, PV_NVME_TELL; -EAGAIN: there is none. */
int64_t pv_nvme_reap_one(struct pv_nvme_ring *ring, uint64_t wait_ns);
/* Identifiers that pv_nvme_reap returned can be given out again. 0, or -EINVAL: they cannot be, and none is. */
int pv_nvme_release(struct pv_nvme_ring *ring, const int64_t *cids, uint32_t n);
/* cffi: end */

#endif
