/*
 * Waiting for memory that a device writes: a phase bit, a status word, the status bytes of completion records; and for an
 * eventfd.
 *
 * A wait looks, spins a few microseconds (pv_wait_run: 50), then sleeps in steps that grow to 1 ms. Every look is an
 * acquire load: what the device wrote before the word is visible once the word is. The caller's memory stays mapped during
 * the call.
 *
 * Not modelled: UMONITOR/UMWAIT.
 */
#ifndef PVFIO_WAIT_H
#define PVFIO_WAIT_H

#include <stdint.h>

/* cffi: begin */
/* Until (word & mask) == wanted, or, with `differ`, != wanted. `size` is 1, 2, 4 or 8, and addr aligned to it. timeout_ns 0:
   one look. 1: it holds, 0: time is up, -EINVAL. *value is the last word seen. */
int pv_wait_word(const void *addr, uint32_t size, uint64_t mask, uint64_t wanted, int differ, uint64_t timeout_ns,
                 uint64_t *value);
/* Until all of n bytes, `stride` apart, have a bit of mask set. How many do: n, or fewer when time is up. */
uint64_t pv_wait_bytes(const void *first, int64_t stride, uint64_t n, uint8_t mask, uint64_t timeout_ns);
/* Entries that a device writes in order, n of them `stride` apart: how many, from the first on, have (byte & mask) == wanted.
   Waits while that is fewer than `least` (and n). */
uint64_t pv_wait_run(const void *first, int64_t stride, uint64_t n, uint8_t mask, uint8_t wanted, uint64_t least,
                     uint64_t timeout_ns);
/* Until an eventfd that does not block has a count, asleep: the count, which is 0 afterwards; 0: time is up, or a signal
   came. The kernel's timer slack comes on top of the time. */
uint64_t pv_wait_event(int eventfd, uint64_t timeout_ns);
/* cffi: end */

#endif
