/*
 * The frame allocator: a buddy allocator over frame numbers (memfd order), blocks of up to 1 GiB.
 */
#include <string.h>

#include "memory_private.h"

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

void pv_frames_free_block(struct pv_memory *m, uint32_t frame, unsigned order)
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

void pv_frames_free(struct pv_memory *m, uint32_t frame, uint32_t count)
{
    while (count) {
        unsigned order = frame ? (unsigned)__builtin_ctz(frame) : MAX_ORDER;
        if (order > MAX_ORDER)
            order = MAX_ORDER;
        while ((1u << order) > count)
            order--;
        pv_frames_free_block(m, frame, order);
        frame += 1u << order;
        count -= 1u << order;
    }
}

uint32_t pv_frames_take_block(struct pv_memory *m, unsigned order)
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

void pv_frames_zero(struct pv_memory *m, uint32_t frame, uint32_t count)
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

uint32_t pv_frames_take_run(struct pv_memory *m, uint64_t count, uint64_t align)
{
    unsigned order = order_of(count > align ? count : align);
    if (order > MAX_ORDER)
        return NO_FRAME;
    uint32_t frame = pv_frames_take_block(m, order);
    if (frame != NO_FRAME)
        pv_frames_free(m, frame + count, (1u << order) - count);
    return frame;
}

