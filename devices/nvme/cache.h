/*
 * A volatile write cache: what was written and not synced lives in this process's memory alone (NVMe Base 5.27.1.4).
 *
 * The page cache of the system survives a kill; this does not, so killing the process is a power failure.
 */
#ifndef PVFIO_NVME_CACHE_H
#define PVFIO_NVME_CACHE_H

#include <stdint.h>

struct nvme_cache;

struct nvme_cache *nvme_cache_create(int fd, uint64_t size);
void nvme_cache_destroy(struct nvme_cache *cache);
/* All 0 or -errno; offsets are inside the size. From any thread. */
int nvme_cache_read(struct nvme_cache *cache, uint64_t offset, void *data, uint64_t n);
int nvme_cache_write(struct nvme_cache *cache, uint64_t offset, const void *data, uint64_t n);
int nvme_cache_sync(struct nvme_cache *cache);
/* `mode` is fallocate's. */
int nvme_cache_zero(struct nvme_cache *cache, uint64_t offset, uint64_t n, int mode);

/* backing.c: whole transfers of a file. */
int nvme_file_read(int fd, uint64_t offset, void *data, uint64_t n);
int nvme_file_write(int fd, uint64_t offset, const void *data, uint64_t n);

#endif
