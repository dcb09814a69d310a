/*
 * Guest RAM: the memfd and its two views, the frame allocator, and extents (see memory.h).
 *
 * Frames are handed out by a buddy allocator over frame numbers; a contiguous extent lives in the guest view, so
 * its vaddr is arithmetic on its GPA. Other extents get an address range of their own. Frames that were used before
 * are zeroed when they are handed out again.
 */
#include "memory.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_ORDER 18 /* 1 GiB: the GPA hole begins at a multiple of it, so no block spans the hole */
#define NO_FRAME UINT32_MAX
#define NOT_FREE 0xff

struct extent {
    uint64_t vaddr;
    uint64_t size;
    uint64_t gpa;     /* contiguous extents */
    uint64_t *pages;  /* others: GPA of every page */
    uint64_t pins;
    bool used;        /* this slot is an extent */
    bool held;        /* an array still views it */
};

struct pv_memory {
    _Atomic uint32_t references;
    pthread_mutex_t lock;
    int fd;
    uint64_t size;
    uint64_t low_size;    /* bytes below the hole */
    struct pv_space guest, host;
    void *reservation;    /* of the guest view */
    uint64_t reservation_size;
    uint32_t *block_hpa;  /* 2 MiB block number by GPA order -> by HPA order */

    uint32_t frames;
    uint32_t free_frames;
    uint32_t *next, *prev; /* free lists, by the first frame of a free block */
    uint8_t *order;        /* order of the free block that begins here, or NOT_FREE */
    uint8_t *used_before;
    uint32_t *owner;       /* extent slot + 1 of a contiguous extent's frame */
    uint32_t head[MAX_ORDER + 1];

    struct extent *extents;
    uint32_t extent_slots, extent_free_hint;
    uint32_t *apart;       /* slots of extents outside the guest view, by vaddr */
    uint32_t apart_count, apart_room;

    uint32_t host_frames, host_next, host_free_head;
    uint32_t *host_free;   /* linked list of freed host pages */
    uint64_t table_pages, host_pages, extent_count, pins;
};

static uint64_t frame_gpa(const struct pv_memory *m, uint32_t frame)
{
    uint64_t offset = (uint64_t)frame << PV_PAGE_SHIFT;
    return offset < m->low_size ? offset : PV_GPA_HOLE_END + (offset - m->low_size);
}

/* The memfd-order number of a GPA's frame, or NO_FRAME outside RAM. */
static uint32_t gpa_frame(const struct pv_memory *m, uint64_t gpa)
{
    if (gpa < m->low_size)
        return gpa >> PV_PAGE_SHIFT;
    uint64_t high = gpa - PV_GPA_HOLE_END;
    if (gpa >= PV_GPA_HOLE_END && high < m->size - m->low_size)
        return (m->low_size + high) >> PV_PAGE_SHIFT;
    return NO_FRAME;
}

static uint64_t frame_offset(const struct pv_memory *m, uint32_t frame)
{
    uint64_t offset = (uint64_t)frame << PV_PAGE_SHIFT;
    return (uint64_t)m->block_hpa[offset / PV_BLOCK_SIZE] * PV_BLOCK_SIZE + offset % PV_BLOCK_SIZE;
}

uint64_t pv_memory_gpa_to_hpa(const struct pv_memory *m, uint64_t gpa)
{
    uint32_t frame = gpa_frame(m, gpa);
    if (frame == NO_FRAME)
        return PV_PHYS_NONE;
    return PV_HPA_RAM_BASE + frame_offset(m, frame) + gpa % PV_PAGE_SIZE;
}

static void list_push(struct pv_memory *m, uint32_t frame, unsigned order)
{
    m->order[frame] = order;
    m->prev[frame] = NO_FRAME;
    m->next[frame] = m->head[order];
    if (m->head[order] != NO_FRAME)
        m->prev[m->head[order]] = frame;
    m->head[order] = frame;
}

static void list_remove(struct pv_memory *m, uint32_t frame)
{
    unsigned order = m->order[frame];
    if (m->prev[frame] == NO_FRAME)
        m->head[order] = m->next[frame];
    else
        m->next[m->prev[frame]] = m->next[frame];
    if (m->next[frame] != NO_FRAME)
        m->prev[m->next[frame]] = m->prev[frame];
    m->order[frame] = NOT_FREE;
}

static void free_block(struct pv_memory *m, uint32_t frame, unsigned order)
{
    m->free_frames += 1u << order;
    while (order < MAX_ORDER) {
        uint64_t buddy = frame ^ (1u << order);
        if (buddy + (1u << order) > m->frames || m->order[buddy] != order)
            break;
        list_remove(m, buddy);
        frame &= ~(1u << order);
        order++;
    }
    list_push(m, frame, order);
}

static void free_range(struct pv_memory *m, uint32_t frame, uint32_t count)
{
    while (count) {
        unsigned order = frame ? (unsigned)__builtin_ctz(frame) : MAX_ORDER;
        if (order > MAX_ORDER)
            order = MAX_ORDER;
        while ((1u << order) > count)
            order--;
        free_block(m, frame, order);
        frame += 1u << order;
        count -= 1u << order;
    }
}

static uint32_t take_block(struct pv_memory *m, unsigned order)
{
    unsigned from = order;
    while (from <= MAX_ORDER && m->head[from] == NO_FRAME)
        from++;
    if (from > MAX_ORDER)
        return NO_FRAME;
    uint32_t frame = m->head[from];
    list_remove(m, frame);
    while (from > order) {
        from--;
        list_push(m, frame + (1u << from), from);
    }
    m->free_frames -= 1u << order;
    return frame;
}

static void zero_used(struct pv_memory *m, uint32_t frame, uint32_t count)
{
    for (uint32_t f = frame; f < frame + count; f++) {
        if (m->used_before[f])
            memset(m->guest.window[0].ptr + frame_gpa(m, f), 0, PV_PAGE_SIZE);
        m->used_before[f] = 1;
    }
}

static unsigned order_of(uint64_t count)
{
    return count <= 1 ? 0 : 64 - __builtin_clzll(count - 1);
}

/* A contiguous run, or NO_FRAME. */
static uint32_t take_run(struct pv_memory *m, uint64_t count, uint64_t align)
{
    unsigned order = order_of(count > align ? count : align);
    if (order > MAX_ORDER)
        return NO_FRAME;
    uint32_t frame = take_block(m, order);
    if (frame != NO_FRAME)
        free_range(m, frame + count, (1u << order) - count);
    return frame;
}

static int map_views(struct pv_memory *m, uint64_t host_size)
{
    uint64_t high = m->size - m->low_size;
    uint64_t span = high ? PV_GPA_HOLE_END + high : m->low_size;
    m->reservation_size = span + PV_BLOCK_SIZE;
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

    uint8_t *ram = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (ram == MAP_FAILED)
        return -errno;
    m->host.window[0] = (struct pv_window){PV_HPA_RAM_BASE, m->size, ram};
    uint8_t *priv = mmap(NULL, host_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (priv == MAP_FAILED)
        return -errno;
    m->host.window[1] = (struct pv_window){PV_HPA_HOST_BASE, host_size, priv};
    return 0;
}

/* A seeded Fisher-Yates shuffle over splitmix64. */
static void shuffle(uint32_t *block, uint32_t count, uint64_t seed)
{
    for (uint32_t i = 0; i < count; i++)
        block[i] = i;
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
    m->owner = calloc(m->frames, sizeof(*m->owner));
    m->host_free = calloc(m->host_frames, sizeof(*m->host_free));
    if (!m->block_hpa || !m->next || !m->prev || !m->order || !m->used_before || !m->owner || !m->host_free)
        return -ENOMEM;
    memset(m->order, NOT_FREE, m->frames);
    for (unsigned i = 0; i <= MAX_ORDER; i++)
        m->head[i] = NO_FRAME;
    m->host_free_head = NO_FRAME;
    shuffle(m->block_hpa, blocks, seed);
    m->fd = memfd_create("pvfio-guest-ram", MFD_CLOEXEC);
    if (m->fd < 0 || ftruncate(m->fd, (off_t)m->size))
        return -errno;
    int error = map_views(m, host_size);
    if (!error)
        free_range(m, 1, m->frames - 1); /* GPA 0 stays nobody's, so that a zero address is never valid by chance */
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

static void forget_extent_range(struct extent *e)
{
    if (e->pages) {
        munmap((void *)(uintptr_t)e->vaddr, e->size);
        free(e->pages);
    }
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
            forget_extent_range(&m->extents[i]);
    if (m->reservation)
        munmap(m->reservation, m->reservation_size);
    for (int i = 0; i < 2; i++)
        if (m->host.window[i].ptr)
            munmap(m->host.window[i].ptr, m->host.window[i].size);
    if (m->fd >= 0)
        close(m->fd);
    free(m->block_hpa);
    free(m->next);
    free(m->prev);
    free(m->order);
    free(m->used_before);
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

/* Extents */

static struct extent *new_extent(struct pv_memory *m, uint32_t *slot)
{
    for (uint32_t i = m->extent_free_hint; i < m->extent_slots; i++) {
        if (!m->extents[i].used) {
            m->extent_free_hint = i + 1;
            *slot = i;
            return &m->extents[i];
        }
    }
    uint32_t room = m->extent_slots ? m->extent_slots * 2 : 64;
    struct extent *more = realloc(m->extents, room * sizeof(*more));
    if (!more)
        return NULL;
    memset(more + m->extent_slots, 0, (room - m->extent_slots) * sizeof(*more));
    *slot = m->extent_slots;
    m->extents = more;
    m->extent_slots = room;
    m->extent_free_hint = *slot + 1;
    return &more[*slot];
}

static uint32_t apart_position(const struct pv_memory *m, uint64_t vaddr)
{
    uint32_t low = 0, high = m->apart_count;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (m->extents[m->apart[mid]].vaddr <= vaddr)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static int apart_insert(struct pv_memory *m, uint32_t slot)
{
    if (m->apart_count == m->apart_room) {
        uint32_t room = m->apart_room ? m->apart_room * 2 : 16;
        uint32_t *more = realloc(m->apart, room * sizeof(*more));
        if (!more)
            return -ENOMEM;
        m->apart = more;
        m->apart_room = room;
    }
    uint32_t at = apart_position(m, m->extents[slot].vaddr);
    memmove(m->apart + at + 1, m->apart + at, (m->apart_count - at) * sizeof(*m->apart));
    m->apart[at] = slot;
    m->apart_count++;
    return 0;
}

/* Takes frames for an extent that is not contiguous; pages[] gets their GPAs. False: nothing was taken. */
static bool take_pages(struct pv_memory *m, uint64_t *pages, uint64_t count, bool scattered)
{
    if (m->free_frames < count)
        return false;
    for (uint64_t done = 0; done < count;) {
        unsigned order = scattered ? 0 : MAX_ORDER;
        while (order && ((1ull << order) > count - done || m->head[order] == NO_FRAME))
            order--;
        uint32_t frame = take_block(m, order);
        zero_used(m, frame, 1u << order);
        for (uint32_t i = 0; i < (1u << order); i++, done++)
            /* Backwards, so that no page is followed by its neighbour. */
            pages[scattered ? count - 1 - done : done] = frame_gpa(m, frame + i);
    }
    return true;
}

static void give_pages(struct pv_memory *m, const uint64_t *pages, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        free_block(m, gpa_frame(m, pages[i]), 0);
}

/* An address range of its own for pages[]: one mapping for each piece that is contiguous in the memfd. */
static int map_apart(struct pv_memory *m, const uint64_t *pages, uint64_t count, uint64_t *vaddr)
{
    uint64_t size = count << PV_PAGE_SHIFT;
    uint8_t *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return -ENOMEM;
    for (uint64_t i = 0, n; i < count; i += n) {
        uint64_t offset = frame_offset(m, gpa_frame(m, pages[i]));
        n = 1;
        while (i + n < count && frame_offset(m, gpa_frame(m, pages[i + n])) == offset + (n << PV_PAGE_SHIFT))
            n++;
        if (mmap(at + (i << PV_PAGE_SHIFT), n << PV_PAGE_SHIFT, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, m->fd,
                 (off_t)offset) == MAP_FAILED) {
            munmap(at, size);
            return -ENOMEM;
        }
    }
    *vaddr = (uint64_t)(uintptr_t)at;
    return 0;
}

static int alloc_apart(struct pv_memory *m, struct extent *e, uint32_t slot, uint64_t count, bool scattered)
{
    uint64_t *pages = malloc(count * sizeof(*pages));
    if (!pages)
        return -ENOMEM;
    if (!take_pages(m, pages, count, scattered)) {
        free(pages);
        return -ENOMEM;
    }
    int error = map_apart(m, pages, count, &e->vaddr);
    e->size = count << PV_PAGE_SHIFT;
    e->pages = pages;
    if (!error) {
        error = apart_insert(m, slot);
        if (!error)
            return 0;
        munmap((void *)(uintptr_t)e->vaddr, e->size);
    }
    give_pages(m, pages, count);
    free(pages);
    e->pages = NULL;
    return error;
}

int64_t pv_memory_alloc(struct pv_memory *m, uint64_t size, uint64_t align, uint32_t flags, uint64_t *vaddr)
{
    if (!size || size > m->size || align & (align - 1) || align > ((uint64_t)PV_PAGE_SIZE << MAX_ORDER))
        return size > m->size ? -ENOMEM : -EINVAL;
    uint64_t count = (size + PV_PAGE_SIZE - 1) >> PV_PAGE_SHIFT;
    uint32_t slot;
    int error = 0;
    pthread_mutex_lock(&m->lock);
    struct extent *e = new_extent(m, &slot);
    if (!e) {
        pthread_mutex_unlock(&m->lock);
        return -ENOMEM;
    }
    *e = (struct extent){.held = true};
    uint32_t frame = flags & PV_ALLOC_SCATTERED ? NO_FRAME : take_run(m, count, align >> PV_PAGE_SHIFT);
    if (frame != NO_FRAME) {
        zero_used(m, frame, count);
        for (uint32_t f = frame; f < frame + count; f++)
            m->owner[f] = slot + 1;
        e->gpa = frame_gpa(m, frame);
        e->vaddr = (uint64_t)(uintptr_t)(m->guest.window[0].ptr + e->gpa);
        e->size = count << PV_PAGE_SHIFT;
    } else if (align > PV_PAGE_SIZE && !(flags & PV_ALLOC_SCATTERED)) {
        error = -ENOMEM; /* pieces could not keep the alignment */
    } else {
        error = alloc_apart(m, e, slot, count, flags & PV_ALLOC_SCATTERED);
    }
    if (error) {
        if (slot < m->extent_free_hint)
            m->extent_free_hint = slot;
    } else {
        e->used = true;
        m->extent_count++;
        pv_memory_get(m);
        *vaddr = e->vaddr;
    }
    pthread_mutex_unlock(&m->lock);
    return error ? error : (int64_t)slot;
}

static void recycle(struct pv_memory *m, uint32_t slot)
{
    struct extent *e = &m->extents[slot];
    uint64_t count = e->size >> PV_PAGE_SHIFT;
    if (e->pages) {
        uint32_t at = apart_position(m, e->vaddr) - 1;
        memmove(m->apart + at, m->apart + at + 1, (m->apart_count - at - 1) * sizeof(*m->apart));
        m->apart_count--;
        give_pages(m, e->pages, count);
        forget_extent_range(e);
    } else {
        uint32_t frame = gpa_frame(m, e->gpa);
        memset(m->owner + frame, 0, count * sizeof(*m->owner));
        free_range(m, frame, count);
    }
    *e = (struct extent){0};
    m->extent_count--;
    if (slot < m->extent_free_hint)
        m->extent_free_hint = slot;
}

static struct extent *extent_at(struct pv_memory *m, int64_t slot)
{
    if (slot < 0 || slot >= m->extent_slots || !m->extents[slot].used)
        return NULL;
    return &m->extents[slot];
}

void pv_memory_release(struct pv_memory *m, int64_t slot)
{
    pthread_mutex_lock(&m->lock);
    struct extent *e = extent_at(m, slot);
    bool held = e && e->held;
    if (held) {
        e->held = false;
        if (!e->pins)
            recycle(m, slot);
    }
    pthread_mutex_unlock(&m->lock);
    if (held)
        pv_memory_destroy(m);
}

/* The extent that holds all of [vaddr, vaddr + size), or -EFAULT. */
static int64_t find_extent(const struct pv_memory *m, uint64_t vaddr, uint64_t size)
{
    uint64_t offset = vaddr - (uint64_t)(uintptr_t)m->guest.window[0].ptr;
    uint32_t frame = gpa_frame(m, offset);
    int64_t slot = -1;
    if (frame != NO_FRAME) {
        slot = (int64_t)m->owner[frame] - 1;
    } else {
        uint32_t at = apart_position(m, vaddr);
        if (at)
            slot = m->apart[at - 1];
    }
    if (slot < 0)
        return -EFAULT;
    const struct extent *e = &m->extents[slot];
    uint64_t into = vaddr - e->vaddr;
    return into < e->size && size <= e->size - into ? slot : -EFAULT;
}

int64_t pv_memory_pin(struct pv_memory *m, uint64_t vaddr, uint64_t size)
{
    pthread_mutex_lock(&m->lock);
    int64_t slot = find_extent(m, vaddr, size);
    if (slot >= 0) {
        if (m->extents[slot].held || m->extents[slot].pins) {
            m->extents[slot].pins++;
            m->pins++;
        } else {
            slot = -EFAULT;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return slot;
}

int pv_memory_unpin(struct pv_memory *m, int64_t slot)
{
    int error = -EINVAL;
    pthread_mutex_lock(&m->lock);
    struct extent *e = extent_at(m, slot);
    if (e && e->pins) {
        error = 0;
        m->pins--;
        if (!--e->pins && !e->held)
            recycle(m, slot);
    }
    pthread_mutex_unlock(&m->lock);
    return error;
}

int64_t pv_memory_runs(struct pv_memory *m, uint64_t vaddr, uint64_t size, struct pv_run *runs, uint64_t max)
{
    int64_t count = 0;
    pthread_mutex_lock(&m->lock);
    int64_t slot = find_extent(m, vaddr, size);
    if (slot < 0) {
        count = slot;
    } else if (!m->extents[slot].pages) {
        if (max)
            runs[0] = (struct pv_run){m->extents[slot].gpa + (vaddr - m->extents[slot].vaddr), size};
        count = 1;
    } else {
        const struct extent *e = &m->extents[slot];
        uint64_t offset = vaddr - e->vaddr, end = offset + size, last = 0;
        while (offset < end) {
            uint64_t gpa = e->pages[offset >> PV_PAGE_SHIFT] + offset % PV_PAGE_SIZE;
            uint64_t n = PV_PAGE_SIZE - offset % PV_PAGE_SIZE;
            n = n < end - offset ? n : end - offset;
            if (count && last == gpa) {
                if ((uint64_t)count <= max)
                    runs[count - 1].size += n;
            } else {
                if ((uint64_t)count < max)
                    runs[count] = (struct pv_run){gpa, n};
                count++;
            }
            last = gpa + n;
            offset += n;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return count;
}

/* Single pages for tables */

uint64_t pv_memory_guest_page(void *memory)
{
    struct pv_memory *m = memory;
    pthread_mutex_lock(&m->lock);
    uint32_t frame = take_block(m, 0);
    if (frame != NO_FRAME) {
        zero_used(m, frame, 1);
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
    free_block(m, frame, 0);
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
