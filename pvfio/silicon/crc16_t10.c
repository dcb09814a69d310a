/*
 * CRC-16/T10-DIF: folded 64 or 256 bytes at a time with carry-less multiplications down to 16 bytes, which tables
 * finish; eight bytes at a time with tables alone where the processor has no such instruction.
 *
 * The method is V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel,
 * 2009.
 */
#include "crc16_t10.h"

#include <stdbool.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* A table is linear: an entry is the sum of the constants of its index's bits. */
#define ENTRY(i, a, b, c, d, e, f, g, h)                                                                  \
    (((i) & 1 ? a : 0) ^ ((i) & 2 ? b : 0) ^ ((i) & 4 ? c : 0) ^ ((i) & 8 ? d : 0) ^ ((i) & 16 ? e : 0) ^ \
     ((i) & 32 ? f : 0) ^ ((i) & 64 ? g : 0) ^ ((i) & 128 ? h : 0))
#define ENTRIES4(i, ...) \
    ENTRY(i, __VA_ARGS__), ENTRY((i) + 1, __VA_ARGS__), ENTRY((i) + 2, __VA_ARGS__), ENTRY((i) + 3, __VA_ARGS__)
#define ENTRIES16(i, ...)                                                                      \
    ENTRIES4(i, __VA_ARGS__), ENTRIES4((i) + 4, __VA_ARGS__), ENTRIES4((i) + 8, __VA_ARGS__), \
        ENTRIES4((i) + 12, __VA_ARGS__)
#define ENTRIES64(i, ...)                                                                          \
    ENTRIES16(i, __VA_ARGS__), ENTRIES16((i) + 16, __VA_ARGS__), ENTRIES16((i) + 32, __VA_ARGS__), \
        ENTRIES16((i) + 48, __VA_ARGS__)
#define TABLE(...)                                                                                   \
    {ENTRIES64(0, __VA_ARGS__), ENTRIES64(64, __VA_ARGS__), ENTRIES64(128, __VA_ARGS__),             \
     ENTRIES64(192, __VA_ARGS__)}

/* Row k: a byte times x^(16 + 8k) modulo the polynomial; its constants are x^(16 + 8k) to x^(23 + 8k). */
static const uint16_t table[8][256] = {
    TABLE(0x8bb7, 0x9cd9, 0xb205, 0xefbd, 0x54cd, 0xa99a, 0xd883, 0x3ab1),
    TABLE(0x7562, 0xeac4, 0x5e3f, 0xbc7e, 0xf34b, 0x6d21, 0xda42, 0x3f33),
    TABLE(0x7e66, 0xfccc, 0x722f, 0xe45e, 0x430b, 0x8616, 0x879b, 0x8481),
    TABLE(0x82b5, 0x8edd, 0x960d, 0xa7ad, 0xc4ed, 0x026d, 0x04da, 0x09b4),
    TABLE(0x1368, 0x26d0, 0x4da0, 0x9b40, 0xbd37, 0xf1d9, 0x6805, 0xd00a),
    TABLE(0x2ba3, 0x5746, 0xae8c, 0xd6af, 0x26e9, 0x4dd2, 0x9ba4, 0xbcff),
    TABLE(0xf249, 0x6f25, 0xde4a, 0x3723, 0x6e46, 0xdc8c, 0x32af, 0x655e),
    TABLE(0xcabc, 0x1ecf, 0x3d9e, 0x7b3c, 0xf678, 0x6747, 0xce8e, 0x16ab),
};

uint16_t pv_crc16_t10_portable(uint16_t crc, const uint8_t *data, uint64_t n)
{
    for (; n >= 8; data += 8, n -= 8)
        crc = table[7][data[0] ^ crc >> 8] ^ table[6][data[1] ^ (crc & 0xff)] ^ table[5][data[2]] ^
              table[4][data[3]] ^ table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
    for (; n; data++, n--)
        crc = (uint16_t)(crc << 8) ^ table[0][data[0] ^ crc >> 8];
    return crc;
}

#if defined(__x86_64__)
#define HARDWARE __attribute__((target("ssse3,pclmul")))
#define WIDE __attribute__((target("avx512f,avx512bw,vpclmulqdq,ssse3,pclmul")))
#define BY_16 0x1faa, 0xa010 /* d = 128 */

HARDWARE static inline __m128i reversed(__m128i value)
{
    return _mm_shuffle_epi8(value, _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

/* Sixteen bytes of the message, the first one highest. */
HARDWARE static inline __m128i load(const uint8_t *data)
{
    return reversed(_mm_loadu_si128((const __m128i *)(const void *)data));
}

/* value times x^d; `powers` holds x^(d + 64) above x^d, both modulo the polynomial. */
HARDWARE static inline __m128i fold(__m128i value, __m128i powers)
{
    return _mm_xor_si128(_mm_clmulepi64_si128(value, powers, 0x11), _mm_clmulepi64_si128(value, powers, 0x00));
}

/* What is left of the first 64 bytes and all 64 after them: sixteen bytes with the same CRC. */
HARDWARE static __m128i fold_64(uint16_t crc, const uint8_t *data, uint64_t n)
{
    const __m128i by64 = _mm_set_epi64x(0xdd31, 0x1069); /* d = 512 */
    const __m128i by16 = _mm_set_epi64x(BY_16);
    __m128i lane[4], value;
    for (int i = 0; i < 4; i++)
        lane[i] = load(data + 16 * i);
    lane[0] = _mm_xor_si128(lane[0], _mm_set_epi64x((long long)((uint64_t)crc << 48), 0));
    for (uint64_t at = 64; at < n; at += 64)
        for (int i = 0; i < 4; i++)
            lane[i] = _mm_xor_si128(fold(lane[i], by64), load(data + at + 16 * i));
    value = lane[0];
    for (int i = 1; i < 4; i++)
        value = _mm_xor_si128(fold(value, by16), lane[i]);
    return value;
}

WIDE static inline __m512i load_wide(const uint8_t *data)
{
    const __m128i order = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_shuffle_epi8(_mm512_loadu_si512(data), _mm512_broadcast_i32x4(order));
}

/* As `fold`, four times side by side, and `next` added. */
WIDE static inline __m512i fold_wide(__m512i value, __m512i powers, __m512i next)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, powers, 0x11),
                                     _mm512_clmulepi64_epi128(value, powers, 0x00), next, 0x96);
}

/* As `fold_64`, with 256 bytes. */
WIDE static __m128i fold_256(uint16_t crc, const uint8_t *data, uint64_t n)
{
    const __m512i by256 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x9f16, 0x22c6)); /* d = 2048 */
    const __m512i by64 = _mm512_broadcast_i32x4(_mm_set_epi64x(0xdd31, 0x1069));
    const __m128i by16 = _mm_set_epi64x(BY_16);
    __m512i lane[4];
    for (int i = 0; i < 4; i++)
        lane[i] = load_wide(data + 64 * i);
    lane[0] = _mm512_xor_si512(
        lane[0], _mm512_zextsi128_si512(_mm_set_epi64x((long long)((uint64_t)crc << 48), 0)));
    for (uint64_t at = 256; at < n; at += 256)
        for (int i = 0; i < 4; i++)
            lane[i] = fold_wide(lane[i], by256, load_wide(data + at + 64 * i));
    for (int i = 1; i < 4; i++)
        lane[i] = fold_wide(lane[i - 1], by64, lane[i]);
    __m128i value = _mm512_extracti32x4_epi32(lane[3], 0);
    value = _mm_xor_si128(fold(value, by16), _mm512_extracti32x4_epi32(lane[3], 1));
    value = _mm_xor_si128(fold(value, by16), _mm512_extracti32x4_epi32(lane[3], 2));
    return _mm_xor_si128(fold(value, by16), _mm512_extracti32x4_epi32(lane[3], 3));
}

/* n is at least 64. */
HARDWARE static uint16_t crc16_hardware(uint16_t crc, const uint8_t *data, uint64_t n, bool wide)
{
    const __m128i by16 = _mm_set_epi64x(BY_16);
    uint64_t folded = n & ~(wide ? (uint64_t)255 : (uint64_t)63);
    uint8_t rest[16];
    __m128i value = wide ? fold_256(crc, data, folded) : fold_64(crc, data, folded);
    for (data += folded, n -= folded; n >= 16; data += 16, n -= 16)
        value = _mm_xor_si128(fold(value, by16), load(data));
    _mm_storeu_si128((__m128i *)(void *)rest, reversed(value));
    return pv_crc16_t10_portable(pv_crc16_t10_portable(0, rest, sizeof(rest)), data, n);
}

static bool can_be_wide(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul");
}
#endif

uint16_t pv_crc16_t10_narrow(uint16_t crc, const uint8_t *data, uint64_t n)
{
#if defined(__x86_64__)
    if (n >= 64 && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("pclmul"))
        return crc16_hardware(crc, data, n, false);
#endif
    return pv_crc16_t10_portable(crc, data, n);
}

uint16_t pv_crc16_t10(uint16_t crc, const uint8_t *data, uint64_t n)
{
#if defined(__x86_64__)
    if (n >= 256 && can_be_wide())
        return crc16_hardware(crc, data, n, true);
#endif
    return pv_crc16_t10_narrow(crc, data, n);
}
