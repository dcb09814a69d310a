/*
 * Moving bytes inside the machine as fast as its memory allows: where the processor has 512-bit vectors, the lines
 * about to be written are asked for ahead, which a plain memcpy leaves to the store buffer.
 *
 * Not here: translation, sections, overlap from behind (memmove serves that).
 */
#ifndef PVFIO_MOVE_H
#define PVFIO_MOVE_H

#include <stdint.h>

/* As memmove. */
void pv_move(uint8_t *dst, const uint8_t *src, uint64_t n);
/* One read, two writes. No range overlaps another. */
void pv_move_twice(uint8_t *dst1, uint8_t *dst2, const uint8_t *src, uint64_t n);
/* The eight bytes of `word`, again and again; the last time perhaps not all of them. */
void pv_fill_words(uint8_t *dst, uint64_t word, uint64_t n);

#endif
