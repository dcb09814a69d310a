/*
 * Guest RAM: the memfd, its two views, and single pages for tables (see memory.h).
 */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory_private.h"

uint64_t pv_memory_gpa_to_hpa(const struct pv_memory *m, uint64_t gpa)
{
    uint32_t frame = gpa_frame(m, gpa);
    if (frame == NO_FRAME)
        return PV_PHYS_NONE;
    return PV_HPA_RAM_BASE + frame_offset(m, frame) + gpa % PV_PAGE_SIZE;
}

/* Both views in one reservation, at multiples of a block, so that a block can be a huge page in both. */
static int map_views(struct pv_memory *m, uint64_t host_size)
{
    uint64_t high = m->size - m->low_size;
    uint64_t span = high ? PV_GPA_HOLE_END + high : m->low_size;
    m->reservation_size = span + m->size + PV_BLOCK_SIZE;
    m->reservation = mmap(NULL, m->reservation_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->reservation == MAP_FAILED) {
        m->reservation = NULL;
        return -errno;
    }
    uint8_t *view = (uint8_t *)(((uintptr_t)m->reservation + PV_BLOCK_SIZE - 1) & ~(uintptr_t)(PV_BLOCK_SIZE - 1));
    for (uint64_t offset = 0; offset < m->size; offset += PV_BLOCK_SIZE) {
        uint32_t frame = offset >> PV_PAGE_SHIFT;
        if (mmap(view + frame_gpa(m, frame), PV_BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, m->fd,
                 (off_t)frame_offset(m, frame)) == MAP_FAILED)
            return -errno;
    }
    m->guest.window[0] = (struct pv_window){0, m->low_size, view};
    m->guest.window[1] = (struct pv_window){PV_GPA_HOLE_END, high, view + PV_GPA_HOLE_END};

    uint8_t *ram = mmap(view + span, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, m->fd, 0);
    if (ram == MAP_FAILED)
        return -errno;
    m->host.window[0] = (struct pv_window){PV_HPA_RAM_BASE, m->size, ram};
    uint8_t *priv = mmap(NULL, host_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (priv == MAP_FAILED)
        return -errno;
    m->host.window[1] = (struct pv_window){PV_HPA_HOST_BASE, host_size, priv};
    return 0;
}

/* A seeded Fisher-Yates shuffle over splitmix64; none for PV_SEED_STRAIGHT. */
static void shuffle(uint32_t *block, uint32_t count, uint64_t seed)
{
    for (uint32_t i = 0; i < count; i++)
        block[i] = i;
    if (seed == PV_SEED_STRAIGHT)
        return;
    for (uint32_t i = count - 1; i > 0 && count; i--) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        uint32_t j = (z ^ (z >> 31)) % (i + 1);
        uint32_t t = block[i];
        block[i] = block[j];
        block[j] = t;
    }
}

static int memory_init(struct pv_memory *m, uint64_t host_size, uint64_t seed)
{
    uint32_t blocks = m->size / PV_BLOCK_SIZE;
    m->frames = m->size >> PV_PAGE_SHIFT;
    m->host_frames = host_size >> PV_PAGE_SHIFT;
    m->block_hpa = calloc(blocks, sizeof(*m->block_hpa));
    m->next = calloc(m->frames, sizeof(*m->next));
    m->prev = calloc(m->frames, sizeof(*m->prev));
    m->order = malloc(m->frames);
    m->used_before = calloc(m->frames, 1);
    m->huge = calloc(blocks, 1);
    m->owner = calloc(m->frames, sizeof(*m->owner));
    m->host_free = calloc(m->host_frames, sizeof(*m->host_free));
    if (!m->block_hpa || !m->next || !m->prev || !m->order || !m->used_before || !m->huge || !m->owner || !m->host_free)
        return -ENOMEM;
    memset(m->order, NOT_FREE, m->frames);
    for (unsigned i = 0; i <= MAX_ORDER; i++)
        m->head[i] = NO_FRAME;
    m->host_free_head = NO_FRAME;
    shuffle(m->block_hpa, blocks, seed);
    m->fd = memfd_create("pvfio-guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (m->fd < 0 || ftruncate(m->fd, (off_t)m->size) ||
        fcntl(m->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return -errno;
    int error = map_views(m, host_size);
    if (!error)
        pv_frames_free(m, 1, m->frames - 1); /* GPA 0 stays nobody's, so that a zero address is never valid by chance */
    return error;
}

struct pv_memory *pv_memory_create(uint64_t ram_size, uint64_t host_size, uint64_t seed, int *error)
{
    if (!ram_size || ram_size % PV_BLOCK_SIZE || ram_size >> 44 || !host_size || host_size % PV_PAGE_SIZE ||
        host_size > PV_HPA_RAM_BASE - PV_HPA_HOST_BASE) {
        *error = -EINVAL;
        return NULL;
    }
    struct pv_memory *m = calloc(1, sizeof(*m));
    if (!m) {
        *error = -ENOMEM;
        return NULL;
    }
    atomic_init(&m->references, 1);
    m->fd = -1;
    m->size = ram_size;
    m->low_size = ram_size < PV_GPA_HOLE_START ? ram_size : PV_GPA_HOLE_START;
    pthread_mutex_init(&m->lock, NULL);
    *error = memory_init(m, host_size, seed);
    if (*error) {
        pv_memory_destroy(m);
        return NULL;
    }
    return m;
}

struct pv_memory *pv_memory_get(struct pv_memory *m)
{
    atomic_fetch_add(&m->references, 1);
    return m;
}

void pv_memory_destroy(struct pv_memory *m)
{
    if (!m || atomic_fetch_sub(&m->references, 1) > 1)
        return;
    for (uint32_t i = 0; i < m->extent_slots; i++)
        if (m->extents[i].used)
            pv_extent_unmap(&m->extents[i]);
    if (m->reservation)
        munmap(m->reservation, m->reservation_size);
    if (m->host.window[1].ptr)
        munmap(m->host.window[1].ptr, m->host.window[1].size);
    if (m->fd >= 0)
        close(m->fd);
    free(m->block_hpa);
    free(m->next);
    free(m->prev);
    free(m->order);
    free(m->used_before);
    free(m->huge);
    free(m->owner);
    free(m->extents);
    free(m->apart);
    free(m->host_free);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

int pv_memory_fd(const struct pv_memory *m)
{
    return m->fd;
}

const struct pv_space *pv_memory_guest_space(const struct pv_memory *m)
{
    return &m->guest;
}

const struct pv_space *pv_memory_host_space(const struct pv_memory *m)
{
    return &m->host;
}

void *pv_space_at(const struct pv_space *space, uint64_t addr, uint64_t size)
{
    return pv_space_ptr(space, addr, size);
}

void pv_memory_stats(struct pv_memory *m, struct pv_memory_stats *out)
{
    pthread_mutex_lock(&m->lock);
    *out = (struct pv_memory_stats){.frames = m->frames,
                                    .free_frames = m->free_frames,
                                    .table_pages = m->table_pages,
                                    .host_pages = m->host_pages,
                                    .extents = m->extent_count,
                                    .pins = m->pins};
    pthread_mutex_unlock(&m->lock);
}

/* Single pages for tables */

#define SMALL_TABLES 1024
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

/*
 * Where tables are many, a walk misses the processor's TLB at every level: a block with tables in it becomes a huge page,
 * if the system has one. Machines with few tables are not made to hold whole blocks.
 */
static void make_huge(struct pv_memory *m, uint32_t frame)
{
    uint32_t block = frame / (PV_BLOCK_SIZE / PV_PAGE_SIZE);
    if (m->table_pages < SMALL_TABLES || m->huge[block])
        return;
    m->huge[block] = 1;
    uint8_t *start = m->guest.window[0].ptr + frame_gpa(m, block * (PV_BLOCK_SIZE / PV_PAGE_SIZE));
    *(volatile uint8_t *)start; /* a block nobody ever touched is refused */
    madvise(start, PV_BLOCK_SIZE, MADV_COLLAPSE);
}

uint64_t pv_memory_guest_page(void *memory)
{
    struct pv_memory *m = memory;
    pthread_mutex_lock(&m->lock);
    uint32_t frame = pv_frames_take_block(m, 0);
    if (frame != NO_FRAME) {
        make_huge(m, frame);
        pv_frames_zero(m, frame, 1);
        m->table_pages++;
    }
    pthread_mutex_unlock(&m->lock);
    return frame == NO_FRAME ? PV_PHYS_NONE : frame_gpa(m, frame);
}

void pv_memory_guest_page_free(void *memory, uint64_t gpa)
{
    struct pv_memory *m = memory;
    uint32_t frame = gpa_frame(m, gpa);
    if (frame == NO_FRAME)
        return;
    pthread_mutex_lock(&m->lock);
    pv_frames_free_block(m, frame, 0);
    m->table_pages--;
    pthread_mutex_unlock(&m->lock);
}

uint64_t pv_memory_host_page(void *memory)
{
    struct pv_memory *m = memory;
    uint64_t hpa = PV_PHYS_NONE;
    pthread_mutex_lock(&m->lock);
    if (m->host_free_head != NO_FRAME) {
        uint32_t frame = m->host_free_head;
        m->host_free_head = m->host_free[frame];
        memset(m->host.window[1].ptr + ((uint64_t)frame << PV_PAGE_SHIFT), 0, PV_PAGE_SIZE);
        hpa = PV_HPA_HOST_BASE + ((uint64_t)frame << PV_PAGE_SHIFT);
    } else if (m->host_next < m->host_frames) {
        hpa = PV_HPA_HOST_BASE + ((uint64_t)m->host_next++ << PV_PAGE_SHIFT);
    }
    m->host_pages += hpa != PV_PHYS_NONE;
    pthread_mutex_unlock(&m->lock);
    return hpa;
}

void pv_memory_host_page_free(void *memory, uint64_t hpa)
{
    struct pv_memory *m = memory;
    uint64_t frame = (hpa - PV_HPA_HOST_BASE) >> PV_PAGE_SHIFT;
    if (frame >= m->host_frames)
        return;
    pthread_mutex_lock(&m->lock);
    m->host_free[frame] = m->host_free_head;
    m->host_free_head = frame;
    m->host_pages--;
    pthread_mutex_unlock(&m->lock);
}
