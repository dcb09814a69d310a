/* Filling, checksumming and copying many blocks (see blocks.h). */
#include "blocks.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

static inline uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

void pv_fio_fill(uint8_t *base, const uint64_t *start, const uint64_t *length, const uint64_t *seed, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        uint8_t *to = base + start[i];
        uint64_t state = seed[i], at = 0;
        for (; at + 8 <= length[i]; at += 8) {
            uint64_t value = splitmix64(&state);
            memcpy(to + at, &value, 8);
        }
        if (at < length[i]) {
            uint64_t value = splitmix64(&state);
            memcpy(to + at, &value, length[i] - at);
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_instruction(const uint8_t *data, uint64_t n)
{
    uint64_t crc = UINT32_MAX, at = 0;
    for (; at + 8 <= n; at += 8) {
        uint64_t value;
        memcpy(&value, data + at, 8);
        crc = _mm_crc32_u64(crc, value);
    }
    for (; at < n; at++)
        crc = _mm_crc32_u8((uint32_t)crc, data[at]);
    return (uint32_t)crc;
}
#endif

static uint32_t crc_bits(const uint8_t *data, uint64_t n)
{
    uint32_t crc = UINT32_MAX;
    for (uint64_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
    }
    return crc;
}

static uint32_t crc32c(const uint8_t *data, uint64_t n)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return crc_instruction(data, n);
#endif
    return crc_bits(data, n);
}

void pv_fio_crc32c(const uint8_t *base, const uint64_t *start, const uint64_t *length, uint64_t count, uint32_t *crc)
{
    for (uint64_t i = 0; i < count; i++)
        crc[i] = crc32c(base + start[i], length[i]);
}

void pv_fio_copy_loop(uint8_t *memory, uint8_t *buffers, const uint64_t *offset, uint64_t count, uint64_t size,
                      uint64_t slots, int to_memory)
{
    uint64_t slot = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint8_t *buffer = buffers + slot * size;
        if (to_memory)
            memcpy(memory + offset[i], buffer, size);
        else
            memcpy(buffer, memory + offset[i], size);
        __asm__ volatile("" : : "r"(buffer), "r"(memory) : "memory");
        slot = slot + 1 == slots ? 0 : slot + 1;
    }
}
