/*
 * Many blocks of one buffer at a time: contents that a seed decides, and CRC-32C. For pvfio fio's verification, whose
 * blocks are too many for Python to touch one by one. Shares nothing with any device.
 */
#ifndef PVFIO_WORKLOADS_FIO_BLOCKS_H
#define PVFIO_WORKLOADS_FIO_BLOCKS_H

#include <stdint.h>

/* cffi: begin */
/* Fills block i, length[i] bytes at base + start[i], with pseudorandom bytes of seed[i] (splitmix64). */
void pv_fio_fill(uint8_t *base, const uint64_t *start, const uint64_t *length, const uint64_t *seed, uint64_t count);
/* The CRC-32C register after block i, begun with all ones and not inverted at the end, into crc[i]. */
void pv_fio_crc32c(const uint8_t *base, const uint64_t *start, const uint64_t *length, uint64_t count, uint32_t *crc);
/*
 * `count` copies of `size` bytes between memory + offset[i] and buffers + (i % slots) * size, to memory or from it: the
 * loop a drive without a driver, an IOMMU and a queue would be.
 */
void pv_fio_copy_loop(uint8_t *memory, uint8_t *buffers, const uint64_t *offset, uint64_t count, uint64_t size,
                      uint64_t slots, int to_memory);
/* cffi: end */

#endif
