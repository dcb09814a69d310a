/*
 * Memory of somebody else's file, which its owner may truncate: an access beyond the end is a SIGBUS, and must not end us.
 *
 * Ranges are registered. A fault in one replaces the range, from the page that faulted to its end (what follows a truncation
 * is gone as well, and so a client cannot make one mapping many), by private zero pages, and the range counts as
 * poisoned from then on. Every other SIGBUS goes where it would have gone. The handler and the list of ranges are
 * the only state of the process's own that pvfio has; the handler is installed with the first range.
 *
 * Not covered: system calls that are given such memory (they fail with EFAULT), and a thread that blocks SIGBUS (the kernel
 * ends the process).
 */
#ifndef PVFIO_GUARD_H
#define PVFIO_GUARD_H

#include <stdint.h>

/* cffi: begin */
#define PV_GUARDS 65536

/*
 * Guards [addr, addr + size), whose pages are of `page` bytes: both are multiples of it. Not registered twice. `eventfd`
 * (-1: none) rings when the range is poisoned; it stays the caller's, open until pv_guard_remove. A number for the
 * range, or -EINVAL, -ENOMEM, -ENOSPC.
 */
int pv_guard_add(void *addr, uint64_t size, uint64_t page, int writable, int eventfd);
/* Before the range is unmapped. When it returns, no handler looks at the range any more. */
void pv_guard_remove(int guard);
/* Not zero: part of the range is zero pages that no file is behind. */
int pv_guard_poisoned(int guard);
/* cffi: end */

#endif
