/*
 * Plain C loops over ordinary memory: what a processor needs for the same work as a DSA descriptor, without an IOMMU, a
 * device or a record in between.
 */
#ifndef PVFIO_WORKLOADS_BENCH_LOOPS_H
#define PVFIO_WORKLOADS_BENCH_LOOPS_H

#include <stdint.h>

/* cffi: begin */
#define PV_LOOP_COPY 0     /* memcpy of a to b */
#define PV_LOOP_FILL 1     /* memset of b */
#define PV_LOOP_FILL8 2    /* 8-byte stores to b */
#define PV_LOOP_CRC 3      /* CRC-32C of a: one CRC32 instruction after the other */
#define PV_LOOP_COMPARE 4  /* memcmp of a and b */
#define PV_LOOP_DUALCAST 5 /* memcpy of a to b and to c */
#define PV_LOOP_COPY_CRC 6 /* memcpy of a to b, then the CRC of b */

/*
 * `count` operations of `size` bytes (a multiple of 8) each, on buffers side by side in a, b and c; after `distinct`
 * buffers it begins again with the first. Returns a value that depends on every one of them: the exclusive-or of the
 * CRCs, how many comparisons found a difference, else 0.
 */
uint64_t pv_bench_loop(int what, const uint8_t *a, uint8_t *b, uint8_t *c, uint64_t size, uint64_t distinct,
                       uint64_t count);
/* Whether the CRC loops have the CRC32 instruction; without, they take a bit at a time. */
int pv_bench_hardware_crc(void);
/* cffi: end */

#endif
