/*
 * Moving bytes inside the machine as fast as its memory allows: where the processor has 512-bit vectors, the lines
 * about to be written are asked for ahead, which a plain memcpy leaves to the store buffer, or never fetched at all.
 *
 * Not here: translation, sections, overlap from behind (memmove serves that).
 */
#ifndef PVFIO_MOVE_H
#define PVFIO_MOVE_H

#include <stdint.h>

/* As memmove. */
void pv_move(uint8_t *dst, const uint8_t *src, uint64_t n);
/*
 * As memcpy, past the caches where they can be: for memory that is large and not read again soon. Nobody else sees
 * the bytes in order before pv_moved_past.
 */
void pv_move_past(uint8_t *dst, const uint8_t *src, uint64_t n);
void pv_moved_past(void);
/* One read, two writes. No range overlaps another. */
void pv_move_twice(uint8_t *dst1, uint8_t *dst2, const uint8_t *src, uint64_t n);
/* The eight bytes of `word`, again and again; the last time perhaps not all of them. */
void pv_fill_words(uint8_t *dst, uint64_t word, uint64_t n);

#endif
