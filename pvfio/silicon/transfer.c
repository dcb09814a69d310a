/*
 * Many moves between memory of a device's and the host's at once (see bus.h): translated together, then moved one right
 * after the other, while the memory of the next one is on its way. The device's memory is written past the caches: it is
 * large, and fetching lines only to overwrite them is half of a write's time.
 *
 * A move of several translations, of a remote range or of more than a section goes alone, as pv_bus_read and pv_bus_write
 * do it, through the caches. Not here: interrupt messages.
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

#define ALONE 1

/* 0: one translation is all it needs. -EFAULT: it has none. */
static int translate_whole(struct section *s, const struct pv_transfer *t, struct piece *p)
{
    struct pv_span span;
    struct pv_dma dma;
    int result = translate(s, t->iova, t->perm, t->n, &span, &dma);
    if (result == -EFAULT)
        return result;
    if (result || span.len < t->n)
        return ALONE;
    bool to_host = t->perm == PV_DMA_WRITE;
    *p = (struct piece){to_host ? span.ptr : t->bytes, to_host ? t->bytes : span.ptr, t->n, to_host};
    s->left -= t->n;
    return 0;
}

static inline bool fits_a_section(const struct pv_transfer *t)
{
    return t->n && t->n <= PV_SECTION_BYTES;
}

/* As many as one section and one translation each allow; how many that were, and whether the next one goes alone. */
static uint32_t in_one_section(struct pv_bus *bus, struct pv_transfer *transfer, uint32_t count, bool *alone)
{
    struct section s;
    struct piece piece[GATHER];
    uint32_t done = 0, pieces = 0;
    if (section_open(&s, bus)) {
        for (; done < count; done++)
            transfer[done].result = -ECANCELED;
        return count;
    }
    for (; done < count && pieces < GATHER && fits_a_section(&transfer[done]) && transfer[done].n <= s.left; done++) {
        int result = translate_whole(&s, &transfer[done], &piece[pieces]);
        *alone = result == ALONE;
        if (*alone)
            break;
        transfer[done].result = result;
        pieces += !result;
    }
    move_pieces(piece, pieces);
    section_close(&s);
    return done;
}

static int move_alone(struct pv_bus *bus, const struct pv_transfer *t)
{
    struct pv_dma dma;
    return t->perm == PV_DMA_WRITE ? pv_bus_write(bus, t->iova, t->bytes, t->n, &dma)
                                   : pv_bus_read(bus, t->iova, t->bytes, t->n, &dma);
}

void pv_bus_transfer(struct pv_bus *bus, struct pv_transfer *transfer, uint32_t count)
{
    for (uint32_t done = 0; done < count;) {
        bool alone = !fits_a_section(&transfer[done]);
        if (!alone)
            done += in_one_section(bus, transfer + done, count - done, &alone);
        if (alone) {
            transfer[done].result = move_alone(bus, &transfer[done]);
            done++;
        }
    }
}
