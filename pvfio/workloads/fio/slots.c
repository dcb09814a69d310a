/* I/Os in flight and completed: see slots.h. */
#include "slots.h"

#include <errno.h>

int pv_fio_begin(struct pv_fio_slots *slots, const int64_t *slot, uint32_t n, const uint8_t *direction,
                 const uint64_t *offset, const uint64_t *length, int64_t start, int64_t submitted)
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t at = (uint64_t)slot[i];
        if (at >= slots->depth)
            return -EINVAL;
        slots->start[at] = start;
        slots->submitted[at] = submitted;
        slots->direction[at] = direction[i];
        slots->offset[at] = offset[i];
        slots->length[at] = (int64_t)length[i];
    }
    return 0;
}

int64_t pv_fio_note(const struct pv_fio_slots *slots, struct pv_fio_record *record, uint32_t used, const int64_t *slot,
                    uint32_t n, int64_t now)
{
    if (used > record->capacity)
        return -EINVAL;
    if (n > record->capacity - used)
        n = record->capacity - used;
    for (uint32_t i = 0, to = used; i < n; i++, to++) {
        uint64_t at = (uint64_t)slot[i];
        if (at >= slots->depth)
            return -EINVAL;
        record->when[to] = now;
        record->direction[to] = slots->direction[at];
        record->length[to] = slots->length[at];
        record->slat[to] = slots->submitted[at] - slots->start[at];
        record->clat[to] = now - slots->submitted[at];
    }
    return n;
}
