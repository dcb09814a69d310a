/*
 * CRC-32C by folding: four 512-bit accumulators, each carried 2048 bits on by carry-less multiplication.
 *
 * The method is V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009), for a
 * reflected CRC: what is left of the data after folding has the same CRC as the data.
 */
#include "crc32c.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLD __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))

/* x^(d + 32) and x^(d - 32) modulo the polynomial, reflected and shifted left by one, for a distance of d bits. */
#define FOLD_2048 0xdcb17aa4, 0xb9e02b86
#define FOLD_512 0x740eef02, 0x9e4addf8
#define FOLD_128 0xf20c0dfe, 0x14cd00bd6

FOLD static inline __m512i constants(uint64_t low, uint64_t high)
{
    return _mm512_broadcast_i32x4(_mm_set_epi64x((int64_t)high, (int64_t)low));
}

/* acc carried on by the distance of k, and the data there. */
FOLD static inline __m512i fold(__m512i acc, __m512i k, __m512i data)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(acc, k, 0x00), _mm512_clmulepi64_epi128(acc, k, 0x11),
                                     data, 0x96);
}

FOLD static inline __m128i fold_lane(__m128i acc, __m128i k, __m128i data)
{
    __m128i low = _mm_clmulepi64_si128(acc, k, 0x00), high = _mm_clmulepi64_si128(acc, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

FOLD static uint32_t crc_of_lanes(__m512i acc)
{
    __m128i k = _mm512_castsi512_si128(constants(FOLD_128));
    __m128i rest = _mm512_extracti32x4_epi32(acc, 0);
    rest = fold_lane(rest, k, _mm512_extracti32x4_epi32(acc, 1));
    rest = fold_lane(rest, k, _mm512_extracti32x4_epi32(acc, 2));
    rest = fold_lane(rest, k, _mm512_extracti32x4_epi32(acc, 3));
    uint64_t crc = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(rest));
    return (uint32_t)_mm_crc32_u64(crc, (uint64_t)_mm_extract_epi64(rest, 1));
}

FOLD uint32_t dsa_crc32c_fold(uint32_t crc, const uint8_t *data, uint64_t n)
{
    __m512i k = constants(FOLD_2048), a[4];
    for (int i = 0; i < 4; i++)
        a[i] = _mm512_loadu_si512(data + 64 * i);
    a[0] = _mm512_xor_si512(a[0], _mm512_castsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (uint64_t at = 256; at < n; at += 256)
        for (int i = 0; i < 4; i++)
            a[i] = fold(a[i], k, _mm512_loadu_si512(data + at + 64 * (uint64_t)i));
    k = constants(FOLD_512);
    return crc_of_lanes(fold(fold(fold(a[0], k, a[1]), k, a[2]), k, a[3]));
}

int dsa_crc32c_can_fold(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("sse4.2");
}
#else
uint32_t dsa_crc32c_fold(uint32_t crc, const uint8_t *data, uint64_t n)
{
    return dsa_crc32c_portable(crc, data, n);
}

int dsa_crc32c_can_fold(void)
{
    return 0;
}
#endif
