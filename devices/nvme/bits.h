/*
 * Maps of bits in words of 64, gone through a word at a time.
 */
#ifndef PVFIO_NVME_BITS_H
#define PVFIO_NVME_BITS_H

#include <stdint.h>

/* Those of [at, end) in the word of `at`. */
static inline uint64_t nvme_bits_from(uint64_t at, uint64_t end)
{
    uint64_t count = end - at < 64 - at % 64 ? end - at : 64 - at % 64;
    return (count < 64 ? (1ull << count) - 1 : UINT64_MAX) << at % 64;
}

/* Where the next word begins. */
static inline uint64_t nvme_next_word(uint64_t at)
{
    return (at / 64 + 1) * 64;
}

#endif
