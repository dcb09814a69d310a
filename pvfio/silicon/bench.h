/*
 * Timing loops over translation alone: no Python between two calls, no data moved, the clock read once a series.
 */
#ifndef PVFIO_SILICON_BENCH_H
#define PVFIO_SILICON_BENCH_H

#include "bus.h"

/* cffi: begin */
/* `calls` translations of `count` IOVAs, `stride` apart, in turn; `section` of them in one section. */
struct pv_bench {
    uint64_t iova;
    uint64_t stride;
    uint64_t calls;
    uint32_t count;
    uint32_t section;
    uint32_t perm;
};

/* 0 and the nanoseconds; -EINVAL for a count or a section of 0, -EFAULT where an IOVA does not translate. */
int pv_bench_translate(struct pv_bus *bus, const struct pv_bench *bench, uint64_t *ns);
/* The same on every bus at once, each in a thread of its own: nanoseconds from the start of all to the end of the last,
 * and of processor time, which all threads together took. */
int pv_bench_translate_all(struct pv_bus *const *buses, uint32_t count, const struct pv_bench *bench, uint64_t *ns,
                           uint64_t *cpu_ns);
/* cffi: end */

#endif
