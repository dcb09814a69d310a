/*
 * Pieces of bus-master operations whose memory is reached by asking (see bus.h).
 *
 * Bytes that are read are fetched first; then local ranges are translated and the operation sees the piece inside a
 * section, as any other; what it wrote goes out afterwards. Where two ranges are written and the far end refuses one, the
 * other has the piece.
 */
#include <stdbool.h>
#include <stdlib.h>

#include "bus_private.h"

#define PAGE 4096u
#define ALIGN 64u

struct piece {
    const struct walk *walk;
    uint64_t offset, len;
    bool remote[MAX_RANGES];
    unsigned remotes;
    uint8_t *at[MAX_RANGES];
};

static uint64_t iova_of(const struct piece *p, unsigned i)
{
    return p->walk->ranges[i].iova + p->offset;
}

static bool goes_out(const struct piece *p, unsigned i)
{
    return p->remote[i] && p->walk->ranges[i].perm & PV_DMA_WRITE;
}

/* Which ranges are remote, and how far the piece goes: as far as the shortest translation. */
static int look(struct piece *p, struct pv_dma *dma)
{
    struct section s;
    struct pv_span span = {NULL, p->walk->n - p->offset};
    int result = section_open(&s, p->walk->bus);
    if (result)
        return result;
    for (unsigned i = 0; i < p->walk->count; i++) {
        result = translate(&s, iova_of(p, i), p->walk->ranges[i].perm, span.len, &span, dma);
        if (result && result != PV_REMOTE)
            break;
        p->remote[i] = result == PV_REMOTE;
        p->remotes += p->remote[i];
        result = 0;
    }
    section_close(&s);
    p->len = span.len;
    return result;
}

static int ask(struct pv_bus *bus, uint64_t iova, uint8_t *bytes, uint64_t n, bool write)
{
    if (atomic_load_explicit(&bus->cancel, memory_order_acquire))
        return -ECANCELED;
    return bus->ops->ask(bus, iova, bytes, n, write);
}

/* How much of range `i` came or went; where that is less, `*error` says why. A refusal is tracked down to its page. */
static uint64_t exchange(const struct piece *p, unsigned i, bool write, int *error)
{
    struct pv_bus *bus = p->walk->bus;
    uint64_t iova = iova_of(p, i), page = PAGE - iova % PAGE, done = 0;
    *error = ask(bus, iova, p->at[i], p->len, write);
    if (*error != -EFAULT || p->len <= page)
        return *error ? 0 : p->len;
    while (done < p->len) {
        uint64_t len = min64(p->len - done, PAGE - (iova + done) % PAGE);
        *error = ask(bus, iova + done, p->at[i] + done, len, write);
        if (*error)
            break;
        done += len;
    }
    return done;
}

static int refused(const struct piece *p, unsigned i, uint64_t done, int error, struct pv_dma *dma)
{
    return error == -ECANCELED ? error : fault(dma, iova_of(p, i) + done, p->walk->ranges[i].perm);
}

/* A part that came is a piece of its own; what did not come is met again after it. */
static int fetch(struct piece *p, struct pv_dma *dma)
{
    for (unsigned i = 0; i < p->walk->count; i++) {
        int error;
        if (!p->remote[i] || goes_out(p, i))
            continue;
        p->len = exchange(p, i, false, &error);
        if (!p->len)
            return refused(p, i, 0, error, dma);
    }
    return 0;
}

static int store(struct piece *p, struct pv_dma *dma)
{
    int result = 0;
    for (unsigned i = 0; i < p->walk->count && !result; i++) {
        int error;
        if (!goes_out(p, i))
            continue;
        uint64_t gone = exchange(p, i, true, &error);
        if (gone < p->len)
            result = refused(p, i, gone, error, dma);
        p->len = gone;
    }
    return result;
}

/* Inside a section: local ranges are where they are now. PV_REMOTE: one of them is remote meanwhile. */
static int find_local(struct piece *p, struct section *s, struct pv_dma *dma)
{
    for (unsigned i = 0; i < p->walk->count; i++) {
        struct pv_span span;
        if (p->remote[i])
            continue;
        int result = translate(s, iova_of(p, i), p->walk->ranges[i].perm, p->len, &span, dma);
        if (result)
            return result;
        p->at[i] = span.ptr;
        p->len = span.len;
    }
    return 0;
}

static int after(struct piece *p, struct pv_dma *dma)
{
    return p->walk->after && p->len ? p->walk->after(p->walk->arg, p->at, p->len, dma) : 0;
}

static int carry_out(struct piece *p, struct pv_dma *dma)
{
    struct section s;
    bool out = false;
    for (unsigned i = 0; i < p->walk->count; i++)
        out |= goes_out(p, i);
    int result = section_open(&s, p->walk->bus);
    if (result)
        return result;
    result = find_local(p, &s, dma);
    if (!result)
        result = p->walk->fn(p->walk->arg, p->at, p->len, dma);
    if (!result && !out)
        result = after(p, dma);
    section_close(&s);
    if (result)
        return result == PV_REMOTE ? 0 : result;
    int stored = out ? store(p, dma) : 0;
    result = out ? after(p, dma) : 0;
    if (!result)
        dma->done += p->len;
    return result ? result : stored;
}

int pv_bus_ask_piece(const struct walk *walk, struct pv_dma *dma)
{
    struct piece p = {.walk = walk, .offset = dma->done};
    int result = look(&p, dma);
    if (result || !p.remotes)
        return result;
    uint64_t stride = (p.len + ALIGN - 1) / ALIGN * ALIGN;
    uint8_t *bytes = calloc(p.remotes, stride), *next = bytes;
    for (unsigned i = 0; bytes && i < walk->count; i++) {
        p.at[i] = next;
        next += p.remote[i] ? stride : 0;
    }
    if (!bytes)
        return fault(dma, iova_of(&p, 0), walk->ranges[0].perm);
    result = fetch(&p, dma);
    if (!result)
        result = carry_out(&p, dma);
    free(bytes);
    return result;
}
