/*
 * What a namespace's blocks are kept in: memory, or an image file.
 *
 * An image is read and written through the page cache by offset, never mapped: a file that somebody cuts short is an
 * error of one command, not of the process. With a volatile cache, writes stay in memory of ours (cache.c) until a sync
 * stores them: a kill is then a power failure.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cache.h"
#include "nvme_private.h"

#define ALIGNMENT 4096u
#define HUGE_PAGE ((uint64_t)2 << 20)
#define HUGE_UP_TO ((uint64_t)4 << 30) /* more is likelier to be a sparse one */

static struct pv_nvme_backing *make(uint64_t size)
{
    struct pv_nvme_backing *b = calloc(1, sizeof(*b));
    if (!b)
        return NULL;
    atomic_init(&b->references, 1);
    b->fd = -1;
    b->size = size;
    return b;
}

/*
 * Memory that nobody wrote takes none. Up to a size it comes in huge pages: random blocks of many small pages would miss
 * the processor's TLB every time. A fork does not copy it, nor see it.
 */
static uint8_t *map_memory(uint64_t size)
{
    uint64_t slack = size <= HUGE_UP_TO ? HUGE_PAGE : 0;
    uint8_t *raw = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    uint64_t lead = slack ? -(uintptr_t)raw & (HUGE_PAGE - 1) : 0;
    if (lead)
        munmap(raw, lead);
    if (slack > lead)
        munmap(raw + lead + size, slack - lead);
    if (slack)
        madvise(raw + lead, size, MADV_HUGEPAGE);
    madvise(raw + lead, size, MADV_DONTFORK);
    return raw + lead;
}

struct pv_nvme_backing *pv_nvme_memory(uint64_t size)
{
    if (!size || size % ALIGNMENT) {
        errno = EINVAL;
        return NULL;
    }
    struct pv_nvme_backing *b = make(size);
    if (!b)
        return NULL;
    b->base = map_memory(size);
    if (!b->base) {
        free(b);
        return NULL;
    }
    return b;
}

struct pv_nvme_backing *pv_nvme_file(int fd, uint64_t size, int read_only, int volatile_cache)
{
    if (!size || size % 512) {
        errno = EINVAL;
        return NULL;
    }
    struct pv_nvme_backing *b = make(size);
    if (!b)
        return NULL;
    b->read_only = read_only;
    b->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (b->fd >= 0 && volatile_cache)
        b->cache = nvme_cache_create(b->fd, size);
    if (b->fd < 0 || (volatile_cache && !b->cache)) {
        pv_nvme_backing_put(b);
        return NULL;
    }
    return b;
}

struct pv_nvme_backing *pv_nvme_backing_get(struct pv_nvme_backing *b)
{
    atomic_fetch_add(&b->references, 1);
    return b;
}

void pv_nvme_backing_put(struct pv_nvme_backing *b)
{
    if (!b || atomic_fetch_sub(&b->references, 1) > 1)
        return;
    if (b->base)
        munmap(b->base, b->size);
    nvme_cache_destroy(b->cache);
    if (b->fd >= 0)
        close(b->fd);
    free(b);
}

static bool inside(const struct pv_nvme_backing *b, uint64_t offset, uint64_t n)
{
    return offset <= b->size && n <= b->size - offset;
}

int nvme_file_read(int fd, uint64_t offset, void *data, uint64_t n)
{
    uint8_t *to = data;
    while (n) {
        ssize_t got = pread(fd, to, n, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO; /* somebody cut the file short */
        to += got;
        offset += (uint64_t)got;
        n -= (uint64_t)got;
    }
    return 0;
}

int nvme_file_write(int fd, uint64_t offset, const void *data, uint64_t n)
{
    const uint8_t *from = data;
    while (n) {
        ssize_t put = pwrite(fd, from, n, (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? -errno : -EIO;
        from += put;
        offset += (uint64_t)put;
        n -= (uint64_t)put;
    }
    return 0;
}

int pv_nvme_backing_read(struct pv_nvme_backing *b, uint64_t offset, void *data, uint64_t n)
{
    if (!inside(b, offset, n))
        return -EINVAL;
    if (b->base) {
        memcpy(data, b->base + offset, n);
        return 0;
    }
    return b->cache ? nvme_cache_read(b->cache, offset, data, n) : nvme_file_read(b->fd, offset, data, n);
}

int pv_nvme_backing_write(struct pv_nvme_backing *b, uint64_t offset, const void *data, uint64_t n)
{
    if (!inside(b, offset, n))
        return -EINVAL;
    if (b->read_only)
        return -EROFS;
    if (b->base) {
        memcpy(b->base + offset, data, n);
        return 0;
    }
    return b->cache ? nvme_cache_write(b->cache, offset, data, n) : nvme_file_write(b->fd, offset, data, n);
}

int pv_nvme_backing_sync(struct pv_nvme_backing *b)
{
    if (b->fd < 0 || b->read_only)
        return 0;
    if (b->cache)
        return nvme_cache_sync(b->cache);
    return fdatasync(b->fd) ? -errno : 0;
}

/* By writing, where the file system cannot. */
static int write_zeroes(struct pv_nvme_backing *b, uint64_t offset, uint64_t n)
{
    static const uint8_t zeroes[65536];
    while (n) {
        uint64_t len = n < sizeof(zeroes) ? n : sizeof(zeroes);
        int error = pv_nvme_backing_write(b, offset, zeroes, len);
        if (error)
            return error;
        offset += len;
        n -= len;
    }
    return 0;
}

static int zero_memory(struct pv_nvme_backing *b, uint64_t offset, uint64_t n, int discard)
{
    const uint64_t mask = ~(uint64_t)(ALIGNMENT - 1);
    uint64_t first = (offset + ALIGNMENT - 1) & mask, last = (offset + n) & mask;
    if (!discard || first >= last || madvise(b->base + first, last - first, MADV_DONTNEED)) {
        memset(b->base + offset, 0, n);
        return 0;
    }
    memset(b->base + offset, 0, first - offset);
    memset(b->base + last, 0, offset + n - last);
    return 0;
}

int pv_nvme_backing_zero(struct pv_nvme_backing *b, uint64_t offset, uint64_t n, int discard)
{
    if (!inside(b, offset, n))
        return -EINVAL;
    if (b->read_only)
        return -EROFS;
    if (!n)
        return 0;
    if (b->base)
        return zero_memory(b, offset, n, discard);
    int mode = FALLOC_FL_KEEP_SIZE | (discard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
    if (b->cache)
        return nvme_cache_zero(b->cache, offset, n, mode);
    if (!fallocate(b->fd, mode, (off_t)offset, (off_t)n))
        return 0;
    return errno == EOPNOTSUPP ? write_zeroes(b, offset, n) : -errno;
}

uint8_t *pv_nvme_backing_memory(struct pv_nvme_backing *b)
{
    return b->base;
}

uint64_t pv_nvme_backing_used(struct pv_nvme_backing *b)
{
    struct stat st;
    if (b->fd >= 0 && !fstat(b->fd, &st))
        return (uint64_t)st.st_blocks * 512 < b->size ? (uint64_t)st.st_blocks * 512 : b->size;
    return b->size;
}
