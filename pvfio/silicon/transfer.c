/*
 * Many moves between memory of a device's and the host's at once (see bus.h): translated together, then moved one right
 * after the other, while the memory of the next one is on its way. The device's memory is written past the caches: it is
 * large, and fetching lines only to overwrite them is half of a write's time.
 *
 * A section ends wherever it is full, within a move too. What is remote goes alone, as pv_bus_read and pv_bus_write do it.
 * Not here: interrupt messages.
 */
#include <string.h>

#include "bus_private.h"
#include "move.h"

#define LINE 64
#define GATHER 16
/* Of what the next move reads; the processor itself follows one that runs. */
#define AHEAD 1024

/* What a transfer is once it is translated. */
struct piece {
    uint8_t *to;
    const uint8_t *from;
    uint64_t n;
    bool to_host;
};

/*
 * Of the device's memory, which may be in no cache; the host's is mostly near. Always inline: a call of a function that
 * only prefetches is one that compilers leave out.
 */
static inline __attribute__((always_inline)) void ask_for(const struct piece *p)
{
    for (uint64_t at = 0; p->to_host && at < AHEAD && at < p->n; at += LINE)
        __builtin_prefetch(p->from + at, 0, 1);
}

/* Towards the host the library's copy: the lines to be written are near. */
static void move_pieces(const struct piece *piece, uint32_t count)
{
    bool past = false;
    for (uint32_t i = 0; i < count; i++) {
        const struct piece *p = &piece[i];
        if (i + 1 < count)
            ask_for(p + 1);
        if (p->to_host)
            memcpy(p->to, p->from, p->n);
        else
            pv_move_past(p->to, p->from, p->n);
        past |= !p->to_host;
    }
    if (past)
        pv_moved_past();
}

/* The next move that is not done yet, and how much of it is. */
struct place {
    uint32_t index;
    uint64_t offset;
};

/* One translation of what is left of a move: 0, PV_REMOTE or -EFAULT. */
static int translate_next(struct section *s, const struct pv_transfer *t, uint64_t offset, struct piece *p)
{
    struct pv_span span;
    struct pv_dma dma;
    int result = translate(s, t->iova + offset, t->perm, t->n - offset, &span, &dma);
    if (result)
        return result;
    uint8_t *bytes = t->bytes + offset;
    bool to_host = t->perm == PV_DMA_WRITE;
    *p = (struct piece){to_host ? span.ptr : bytes, to_host ? bytes : span.ptr, span.len, to_host};
    s->left -= span.len;
    return 0;
}

static inline void end(struct pv_transfer *transfer, struct place *at, int result)
{
    transfer[at->index++].result = result;
    at->offset = 0;
}

/* As far as one section goes; whether what comes next is remote. */
static bool in_one_section(struct pv_bus *bus, struct pv_transfer *transfer, uint32_t count, struct place *at)
{
    struct section s;
    struct piece piece[GATHER];
    uint32_t pieces = 0;
    int result = 0;
    if (section_open(&s, bus)) {
        while (at->index < count)
            end(transfer, at, -ECANCELED);
        return false;
    }
    while (at->index < count && pieces < GATHER && s.left) {
        const struct pv_transfer *t = &transfer[at->index];
        result = t->n ? translate_next(&s, t, at->offset, &piece[pieces]) : 0;
        if (result == PV_REMOTE)
            break;
        if (!result && t->n)
            at->offset += piece[pieces++].n;
        if (result || at->offset == t->n)
            end(transfer, at, result);
    }
    move_pieces(piece, pieces);
    section_close(&s);
    return result == PV_REMOTE;
}

/* What is left of a move, outside sections. */
static int move_remote(struct pv_bus *bus, const struct pv_transfer *t, uint64_t offset)
{
    struct pv_dma dma;
    uint64_t iova = t->iova + offset, n = t->n - offset;
    return t->perm == PV_DMA_WRITE ? pv_bus_write(bus, iova, t->bytes + offset, n, &dma)
                                   : pv_bus_read(bus, iova, t->bytes + offset, n, &dma);
}

void pv_bus_transfer(struct pv_bus *bus, struct pv_transfer *transfer, uint32_t count)
{
    struct place at = {0, 0};
    while (at.index < count)
        if (in_one_section(bus, transfer, count, &at))
            end(transfer, &at, move_remote(bus, &transfer[at.index], at.offset));
}
