/*
 * Mapping files that somebody else sent (see mapped.py, which decides what to map).
 */
#ifndef PVFIO_MAPPED_H
#define PVFIO_MAPPED_H

#include <stdint.h>

/* cffi: begin */
#define PV_MAP_WRITE 1
#define PV_MAP_GUARD 2

struct pv_mapped {
    uint8_t *ptr;
    uint64_t size;
    int guard; /* -1: none */
};

/*
 * The size of the pages a file consists of. -ENODEV for what is no memory: no regular file, or one of a file system whose
 * pages may come from a network or from another program (FUSE), so that a fault may take for ever. -EBADF.
 */
int64_t pv_file_page_size(int fd);
/*
 * Maps [offset, offset + size) of a file, all multiples of `page`, for reading or for both; it may reach beyond the end of
 * the file. `eventfd` as for pv_guard_add. 0 or -errno.
 */
int pv_mapped_create(struct pv_mapped *mapped, int fd, uint64_t offset, uint64_t size, uint64_t page, uint32_t flags,
                      int eventfd);
void pv_mapped_destroy(struct pv_mapped *mapped);
/* cffi: end */

#endif
