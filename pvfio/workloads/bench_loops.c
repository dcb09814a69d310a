/*
 * The loops of the benchmark (see bench_loops.h). They share nothing with any device.
 */
#include "bench_loops.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

#define FILL_PATTERN 0x0123456789abcdefull

/* The compiler must assume that memory was used: no pass may be merged with another or left out. */
static inline void used(const void *memory)
{
    __asm__ volatile("" : : "r"(memory) : "memory");
}

static inline uint64_t load64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof(value));
    return value;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_instruction(const uint8_t *data, uint64_t n)
{
    uint64_t crc = UINT32_MAX;
    for (uint64_t i = 0; i < n; i += 8)
        crc = _mm_crc32_u64(crc, load64(data + i));
    return ~(uint32_t)crc;
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
    return ~crc;
}

int pv_bench_hardware_crc(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") != 0;
#else
    return 0;
#endif
}

static uint32_t crc32c(const uint8_t *data, uint64_t n)
{
#if defined(__x86_64__)
    if (pv_bench_hardware_crc())
        return crc_instruction(data, n);
#endif
    return crc_bits(data, n);
}

static void fill8(uint8_t *to, uint64_t n)
{
    const uint64_t pattern = FILL_PATTERN;
    for (uint64_t i = 0; i < n; i += 8)
        memcpy(to + i, &pattern, 8);
}

static uint64_t once(int what, const uint8_t *a, uint8_t *b, uint8_t *c, uint64_t size)
{
    uint64_t value = 0;
    switch (what) {
    case PV_LOOP_COPY:
        memcpy(b, a, size);
        break;
    case PV_LOOP_FILL:
        memset(b, (int)(FILL_PATTERN & 0xff), size);
        break;
    case PV_LOOP_FILL8:
        fill8(b, size);
        break;
    case PV_LOOP_CRC:
        value = crc32c(a, size);
        break;
    case PV_LOOP_COMPARE:
        value = memcmp(a, b, size) != 0;
        break;
    case PV_LOOP_DUALCAST:
        memcpy(b, a, size);
        memcpy(c, a, size);
        break;
    case PV_LOOP_COPY_CRC:
        memcpy(b, a, size);
        value = crc32c(b, size);
        break;
    }
    used(b);
    used(c);
    return value;
}

uint64_t pv_bench_loop(int what, const uint8_t *a, uint8_t *b, uint8_t *c, uint64_t size, uint64_t distinct,
                       uint64_t count)
{
    uint64_t result = 0, at = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t value = once(what, a + at, b + at, c + at, size);
        result = what == PV_LOOP_COMPARE ? result + value : result ^ value;
        at = at + size == distinct * size ? 0 : at + size;
    }
    return result;
}
