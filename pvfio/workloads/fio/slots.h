/*
 * What a job of pvfio fio has in flight, and what of it completed: written down by the batch, since every I/O passes here.
 */
#ifndef PVFIO_WORKLOADS_FIO_SLOTS_H
#define PVFIO_WORKLOADS_FIO_SLOTS_H

#include <stdint.h>

/* cffi: begin */
/* An I/O in each of `depth` slots. Times are nanoseconds. */
struct pv_fio_slots {
    uint32_t depth;
    int64_t *start, *submitted, *length;
    uint64_t *offset;
    uint8_t *direction;
};

/* Completions, `capacity` at most. */
struct pv_fio_record {
    uint32_t capacity;
    int64_t *when, *direction, *length, *slat, *clat;
};

/* Puts I/O i into slot[i]: its submission began at `start` and ended at `submitted`. 0, or -EINVAL: there is no such slot. */
int pv_fio_begin(struct pv_fio_slots *slots, const int64_t *slot, uint32_t n, const uint8_t *direction,
                 const uint64_t *offset, const uint64_t *length, int64_t start, int64_t submitted);
/*
 * Notes that the I/Os of these slots completed `now`, behind `used` others. How many it noted: as many as there is room for.
 * -EINVAL: there is no such slot.
 */
int64_t pv_fio_note(const struct pv_fio_slots *slots, struct pv_fio_record *record, uint32_t used, const int64_t *slot,
                    uint32_t n, int64_t now);
/* cffi: end */

#endif
