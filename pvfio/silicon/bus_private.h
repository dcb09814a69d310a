/*
 * What the files of the bus-master operations share: sections, translations, the ranges an operation goes through.
 */
#ifndef PVFIO_BUS_PRIVATE_H
#define PVFIO_BUS_PRIVATE_H

#include <errno.h>

#include "bus.h"

#define MAX_RANGES 3

/* An open section and how much of it is used up. */
struct section {
    struct pv_bus *bus;
    uint64_t left;
};

static inline int section_open(struct section *s, struct pv_bus *bus)
{
    s->bus = bus;
    s->left = PV_SECTION_BYTES;
    if (atomic_load_explicit(&bus->cancel, memory_order_acquire))
        return -ECANCELED;
    bus->ops->enter(bus);
    return 0;
}

static inline void section_close(struct section *s)
{
    s->bus->ops->leave(s->bus);
}

/* Accounts `n` bytes; a used-up section is closed and another opened. Translations from before are void then. */
static inline int section_use(struct section *s, uint64_t n)
{
    if (n < s->left) {
        s->left -= n;
        return 0;
    }
    section_close(s);
    return section_open(s, s->bus);
}

static inline uint64_t min64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline int fault(struct pv_dma *dma, uint64_t iova, uint32_t perm)
{
    dma->fault_iova = iova;
    dma->perm = perm;
    return -EFAULT;
}

/* One translation of at most `n` bytes and of what the section has left. 0, PV_REMOTE or -EFAULT. */
static inline int translate(struct section *s, uint64_t iova, uint32_t perm, uint64_t n, struct pv_span *span,
                            struct pv_dma *dma)
{
    int result = s->bus->ops->translate(s->bus, iova, perm, span);
    if (__builtin_expect(result && result != PV_REMOTE, 0))
        return fault(dma, iova, perm);
    span->len = min64(span->len, min64(n, s->left));
    return result;
}

/* One of the ranges that an operation goes through in step. */
struct range {
    uint64_t iova;
    uint32_t perm;
};

/* Sees the piece of every range, `len` bytes each, inside a section; not zero ends the walk with that value. */
typedef int (*piece_fn)(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma);

/* The ranges of an operation and what it does with their pieces: `fn`, and once they are written `after`, or NULL. */
struct walk {
    struct pv_bus *bus;
    const struct range *ranges;
    unsigned count;
    uint64_t n;
    piece_fn fn, after;
    void *arg;
};

/*
 * Outside sections: the next piece of a walk, some of whose ranges are remote. Adds to dma->done; 0 without doing so where
 * the ranges changed meanwhile.
 */
int pv_bus_ask_piece(const struct walk *walk, struct pv_dma *dma);

#endif
