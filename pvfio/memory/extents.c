/*
 * Extents: the memory of DMA buffers, found by process address, pinned, and recycled when nobody holds it.
 *
 * A contiguous extent lives in the guest view, so its vaddr is arithmetic on its GPA; the others have an address range of
 * their own, found by binary search.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memory_private.h"

void pv_extent_unmap(struct extent *e)
{
    if (e->pages) {
        munmap((void *)(uintptr_t)e->vaddr, e->size);
        free(e->pages);
    }
}

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
        uint32_t frame = pv_frames_take_block(m, order);
        pv_frames_zero(m, frame, 1u << order);
        for (uint32_t i = 0; i < (1u << order); i++, done++)
            /* Backwards, so that no page is followed by its neighbour. */
            pages[scattered ? count - 1 - done : done] = frame_gpa(m, frame + i);
    }
    return true;
}

static void give_pages(struct pv_memory *m, const uint64_t *pages, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        pv_frames_free_block(m, gpa_frame(m, pages[i]), 0);
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
    uint32_t frame = flags & PV_ALLOC_SCATTERED ? NO_FRAME : pv_frames_take_run(m, count, align >> PV_PAGE_SHIFT);
    if (frame != NO_FRAME) {
        pv_frames_zero(m, frame, count);
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
        pv_extent_unmap(e);
    } else {
        uint32_t frame = gpa_frame(m, e->gpa);
        memset(m->owner + frame, 0, count * sizeof(*m->owner));
        pv_frames_free(m, frame, count);
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

/* The runs of [vaddr, vaddr + size), which the extent holds: how many, the first `max` of them stored. */
static uint64_t extent_runs(const struct extent *e, uint64_t vaddr, uint64_t size, struct pv_run *runs, uint64_t max)
{
    uint64_t count = 0, offset = vaddr - e->vaddr, end = offset + size, last = 0;
    if (!e->pages) {
        if (max)
            runs[0] = (struct pv_run){e->gpa + offset, size};
        return 1;
    }
    while (offset < end) {
        uint64_t gpa = e->pages[offset >> PV_PAGE_SHIFT] + offset % PV_PAGE_SIZE;
        uint64_t n = PV_PAGE_SIZE - offset % PV_PAGE_SIZE;
        n = n < end - offset ? n : end - offset;
        if (count && last == gpa) {
            if (count <= max)
                runs[count - 1].size += n;
        } else {
            if (count < max)
                runs[count] = (struct pv_run){gpa, n};
            count++;
        }
        last = gpa + n;
        offset += n;
    }
    return count;
}

int64_t pv_memory_pin_runs(struct pv_memory *m, uint64_t vaddr, uint64_t size, struct pv_run *runs, uint64_t max,
                           uint64_t *count)
{
    pthread_mutex_lock(&m->lock);
    int64_t slot = find_extent(m, vaddr, size);
    if (slot >= 0) {
        struct extent *e = &m->extents[slot];
        if (e->held || e->pins) {
            e->pins++;
            m->pins++;
            if (count)
                *count = extent_runs(e, vaddr, size, runs, max);
        } else {
            slot = -EFAULT;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return slot;
}

int64_t pv_memory_pin(struct pv_memory *m, uint64_t vaddr, uint64_t size)
{
    return pv_memory_pin_runs(m, vaddr, size, NULL, 0, NULL);
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
    pthread_mutex_lock(&m->lock);
    int64_t count = find_extent(m, vaddr, size);
    if (count >= 0)
        count = (int64_t)extent_runs(&m->extents[count], vaddr, size, runs, max);
    pthread_mutex_unlock(&m->lock);
    return count;
}
