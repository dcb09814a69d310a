/*
 * Moving bytes inside the machine (see move.h).
 */
#include "move.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,prfchw")))
#define LINE 64
#define BLOCK (4 * LINE)
#define AHEAD (8 * LINE) /* as far as the ten or so lines a core can have on their way */
#define WIDE_FROM 1024   /* shorter moves end before a prefetch arrives */

static inline int wide(uint64_t n)
{
    return n >= WIDE_FROM && __builtin_cpu_supports("avx512f");
}

/* Asks for the block AHEAD, as far as it is one of these `n` bytes: nobody wants lines of the next page taken away. */
static inline __attribute__((always_inline)) void own_ahead(uint8_t *dst, uint64_t at, uint64_t n)
{
    if (at + AHEAD + BLOCK > n)
        return;
    for (unsigned i = 0; i < BLOCK; i += LINE)
        __builtin_prefetch(dst + at + AHEAD + i, 1, 3);
}

WIDE static inline __attribute__((always_inline)) void move_block(uint8_t *dst, const __m512i v[4])
{
    for (unsigned i = 0; i < 4; i++)
        _mm512_storeu_si512(dst + i * LINE, v[i]);
}

WIDE static inline __attribute__((always_inline)) void load_block(__m512i v[4], const uint8_t *src)
{
    for (unsigned i = 0; i < 4; i++)
        v[i] = _mm512_loadu_si512(src + i * LINE);
}

WIDE static uint64_t move_wide(uint8_t *dst, const uint8_t *src, uint64_t n)
{
    uint64_t at = 0;
    __m512i v[4];
    for (; at + BLOCK <= n; at += BLOCK) {
        own_ahead(dst, at, n);
        load_block(v, src + at);
        move_block(dst + at, v);
    }
    return at;
}

WIDE static uint64_t move_twice_wide(uint8_t *dst1, uint8_t *dst2, const uint8_t *src, uint64_t n)
{
    uint64_t at = 0;
    __m512i v[4];
    for (; at + BLOCK <= n; at += BLOCK) {
        own_ahead(dst1, at, n);
        own_ahead(dst2, at, n);
        load_block(v, src + at);
        move_block(dst1 + at, v);
        move_block(dst2 + at, v);
    }
    return at;
}

WIDE static uint64_t move_past_wide(uint8_t *dst, const uint8_t *src, uint64_t n)
{
    uint64_t at = 0;
    __m512i v[4];
    for (; at + BLOCK <= n; at += BLOCK) {
        load_block(v, src + at);
        for (unsigned i = 0; i < 4; i++)
            _mm512_stream_si512((__m512i *)(void *)(dst + at + i * LINE), v[i]);
    }
    return at;
}

WIDE static uint64_t fill_wide(uint8_t *dst, uint64_t word, uint64_t n)
{
    uint64_t at = 0;
    __m512i w = _mm512_set1_epi64((long long)word);
    const __m512i v[4] = {w, w, w, w};
    for (; at + BLOCK <= n; at += BLOCK) {
        own_ahead(dst, at, n);
        move_block(dst + at, v);
    }
    return at;
}

static inline int past(const uint8_t *dst)
{
    return !((uintptr_t)dst % LINE) && __builtin_cpu_supports("avx512f");
}

void pv_moved_past(void)
{
    _mm_sfence();
}
#else
static inline int wide(uint64_t n)
{
    (void)n;
    return 0;
}

static inline int past(const uint8_t *dst)
{
    (void)dst;
    return 0;
}

void pv_moved_past(void)
{
}

#define move_wide(dst, src, n) 0
#define move_past_wide(dst, src, n) 0
#define move_twice_wide(dst1, dst2, src, n) 0
#define fill_wide(dst, word, n) 0
#endif

void pv_move(uint8_t *dst, const uint8_t *src, uint64_t n)
{
    uint64_t distance = (uint64_t)(uintptr_t)dst - (uint64_t)(uintptr_t)src;
    uint64_t done = wide(n) && distance >= n ? move_wide(dst, src, n) : 0;
    if (done < n)
        memmove(dst + done, src + done, n - done);
}

void pv_move_past(uint8_t *dst, const uint8_t *src, uint64_t n)
{
    uint64_t done = past(dst) ? move_past_wide(dst, src, n) : 0;
    if (done < n)
        memcpy(dst + done, src + done, n - done);
}

#define TWICE_BYTES 16384 /* small enough that the second copy finds them in a cache */

void pv_move_twice(uint8_t *dst1, uint8_t *dst2, const uint8_t *src, uint64_t n)
{
    uint64_t at = wide(n) ? move_twice_wide(dst1, dst2, src, n) : 0;
    while (at < n) {
        uint64_t len = n - at < TWICE_BYTES ? n - at : TWICE_BYTES;
        memmove(dst1 + at, src + at, len);
        memmove(dst2 + at, src + at, len);
        at += len;
    }
}

void pv_fill_words(uint8_t *dst, uint64_t word, uint64_t n)
{
    uint64_t at = wide(n) ? fill_wide(dst, word, n) : 0, block[16]; /* copied whole: compilers make wide stores of it */
    for (int i = 0; i < 16; i++)
        block[i] = word;
    for (; at + sizeof(block) <= n; at += sizeof(block))
        memcpy(dst + at, block, sizeof(block));
    for (; at + 8 <= n; at += 8)
        memcpy(dst + at, &word, 8);
    memcpy(dst + at, &word, n - at);
}
