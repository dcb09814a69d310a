/*
 * The volatile write cache (see cache.h): a private mapping of the image, and a bit for each 4 KiB that is dirty.
 *
 * A page that was not written here since the last sync is the file's, whatever it holds now. Zeroes go past the cache,
 * into the file. A sync has the cache to itself: reads and writes wait for the disk. Not modelled: a size of its own (a
 * real cache is smaller and writes back when full), reordering inside a sync.
 */
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bits.h"

#define LINE 4096u

struct nvme_cache {
    int fd;
    uint64_t size;
    uint8_t *data;   /* anonymous; a page counts where it was written */
    uint64_t *dirty; /* a bit a line */
    uint64_t words;
    pthread_mutex_t lock;
};

struct nvme_cache *nvme_cache_create(int fd, uint64_t size)
{
    struct nvme_cache *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->fd = fd;
    c->size = size;
    c->words = (size + LINE * 64ull - 1) / (LINE * 64ull);
    c->dirty = calloc(c->words, sizeof(*c->dirty));
    void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!c->dirty || data == MAP_FAILED) {
        if (data != MAP_FAILED)
            munmap(data, size);
        free(c->dirty);
        free(c);
        return NULL;
    }
    c->data = data;
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

void nvme_cache_destroy(struct nvme_cache *c)
{
    if (!c)
        return;
    munmap(c->data, c->size);
    free(c->dirty);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static bool is_dirty(const struct nvme_cache *c, uint64_t line)
{
    return c->dirty[line / 64] >> line % 64 & 1;
}

static uint64_t line_bytes(const struct nvme_cache *c, uint64_t line)
{
    return c->size - line * LINE < LINE ? c->size - line * LINE : LINE;
}

/* What of [offset, offset + n) lies in the line of `offset`. */
static uint64_t in_line(uint64_t offset, uint64_t n)
{
    uint64_t left = LINE - offset % LINE;
    return n < left ? n : left;
}

int nvme_cache_read(struct nvme_cache *c, uint64_t offset, void *data, uint64_t n)
{
    uint8_t *to = data;
    int error = 0;
    pthread_mutex_lock(&c->lock);
    while (n && !error) {
        uint64_t len = in_line(offset, n);
        if (is_dirty(c, offset / LINE))
            memcpy(to, c->data + offset, len);
        else
            error = nvme_file_read(c->fd, offset, to, len);
        to += len;
        offset += len;
        n -= len;
    }
    pthread_mutex_unlock(&c->lock);
    return error;
}

int nvme_cache_write(struct nvme_cache *c, uint64_t offset, const void *data, uint64_t n)
{
    const uint8_t *from = data;
    int error = 0;
    pthread_mutex_lock(&c->lock);
    while (n && !error) {
        uint64_t len = in_line(offset, n), line = offset / LINE;
        if (!is_dirty(c, line) && len < line_bytes(c, line))
            error = nvme_file_read(c->fd, line * LINE, c->data + line * LINE, line_bytes(c, line));
        if (!error) {
            memcpy(c->data + offset, from, len);
            c->dirty[line / 64] |= 1ull << line % 64;
        }
        from += len;
        offset += len;
        n -= len;
    }
    pthread_mutex_unlock(&c->lock);
    return error;
}

/* Lines [first, last) are the file's again; with the lock held. */
static void forget(struct nvme_cache *c, uint64_t first, uint64_t last)
{
    for (uint64_t line = first; line < last; line = nvme_next_word(line)) {
        uint64_t end = nvme_next_word(line) < last ? nvme_next_word(line) : last, word = line / 64;
        uint64_t bits = nvme_bits_from(line, last);
        if (word >= c->words || !(c->dirty[word] & bits))
            continue;
        c->dirty[word] &= ~bits;
        uint64_t from = line * LINE, to = end * LINE < c->size ? end * LINE : c->size;
        if (from < to)
            madvise(c->data + from, to - from, MADV_DONTNEED); /* the memory; failing costs nothing else */
    }
}

static int write_zeroes(struct nvme_cache *c, uint64_t offset, uint64_t n)
{
    static const uint8_t zeroes[LINE];
    int error = 0;
    while (n && !error) {
        uint64_t len = in_line(offset, n);
        error = nvme_cache_write(c, offset, zeroes, len);
        offset += len;
        n -= len;
    }
    return error;
}

int nvme_cache_sync(struct nvme_cache *c)
{
    int error = 0;
    pthread_mutex_lock(&c->lock);
    for (uint64_t word = 0; word < c->words && !error; word++) {
        for (uint64_t bits = c->dirty[word]; bits && !error; bits &= bits - 1) {
            uint64_t line = word * 64 + (uint64_t)__builtin_ctzll(bits);
            error = nvme_file_write(c->fd, line * LINE, c->data + line * LINE, line_bytes(c, line));
        }
    }
    if (!error && fdatasync(c->fd))
        error = -errno;
    if (!error)
        forget(c, 0, c->size / LINE + 1);
    pthread_mutex_unlock(&c->lock);
    return error;
}

int nvme_cache_zero(struct nvme_cache *c, uint64_t offset, uint64_t n, int mode)
{
    uint64_t first = (offset + LINE - 1) / LINE, last = (offset + n) / LINE;
    if (first >= last)
        return write_zeroes(c, offset, n);
    pthread_mutex_lock(&c->lock);
    int error = fallocate(c->fd, mode, (off_t)(first * LINE), (off_t)((last - first) * LINE)) ? -errno : 0;
    if (!error)
        forget(c, first, last);
    pthread_mutex_unlock(&c->lock);
    if (error == -EOPNOTSUPP)
        return write_zeroes(c, offset, n);
    if (!error)
        error = write_zeroes(c, offset, first * LINE - offset);
    return error ? error : write_zeroes(c, last * LINE, offset + n - last * LINE);
}
