/*
 * Bus-master operations over any `struct pv_bus`: split at translations and into sections (see bus.h).
 */
#include "bus.h"

#include <errno.h>
#include <string.h>

#include "iommu.h"
#include "move.h"

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

static inline void begin(struct pv_dma *dma)
{
    *dma = (struct pv_dma){0};
}

static int fault(struct pv_dma *dma, uint64_t iova, uint32_t perm)
{
    dma->fault_iova = iova;
    dma->perm = perm;
    return -EFAULT;
}

/* One translation of at most `n` bytes and of what the section has left. */
static inline int translate(struct section *s, uint64_t iova, uint32_t perm, uint64_t n, struct pv_span *span,
                            struct pv_dma *dma)
{
    if (s->bus->ops->translate(s->bus, iova, perm, span))
        return fault(dma, iova, perm);
    span->len = min64(span->len, min64(n, s->left));
    return 0;
}

/* One of the ranges that an operation goes through in step. */
struct range {
    uint64_t iova;
    uint32_t perm;
};

/* Sees the piece of every range, `len` bytes each, inside a section; not zero ends the walk with that value. */
typedef int (*piece_fn)(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma);

/*
 * The one loop of every forward operation: translates the ranges in their order, each limited to the shortest before
 * it. Always inline: `count` and `fn` are constants at every call.
 */
static inline __attribute__((always_inline)) int walk_ranges(struct pv_bus *bus, const struct range *ranges,
                                                             unsigned count, uint64_t n, piece_fn fn, void *arg,
                                                             struct pv_dma *dma)
{
    struct section s;
    begin(dma);
    if (!n)
        return 0;
    int result = section_open(&s, bus);
    if (result)
        return result;
    for (;;) {
        uint8_t *at[3];
        struct pv_span span = {NULL, n - dma->done};
        for (unsigned i = 0; i < count && !result; i++) {
            result = translate(&s, ranges[i].iova + dma->done, ranges[i].perm, span.len, &span, dma);
            at[i] = span.ptr;
        }
        if (!result)
            result = fn(arg, at, span.len, dma);
        if (result)
            break;
        dma->done += span.len;
        if (dma->done == n)
            break;
        result = section_use(&s, span.len);
        if (result)
            return result;
    }
    section_close(&s);
    return result;
}

struct single {
    pv_span_fn fn;
    void *arg;
};

static inline int single_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    const struct single *single = arg;
    (void)dma;
    return single->fn(single->arg, at[0], len);
}

int pv_bus_walk(struct pv_bus *bus, uint64_t iova, uint64_t n, uint32_t perm, pv_span_fn fn, void *arg,
                struct pv_dma *dma)
{
    const struct range range = {iova, perm};
    struct single single = {fn, arg};
    return walk_ranges(bus, &range, 1, n, single_piece, &single, dma);
}

static int copy_out(void *arg, uint8_t *ptr, uint64_t len)
{
    uint8_t **to = arg;
    pv_move(*to, ptr, len);
    *to += len;
    return 0;
}

static int copy_in(void *arg, uint8_t *ptr, uint64_t len)
{
    const uint8_t **from = arg;
    pv_move(ptr, *from, len);
    *from += len;
    return 0;
}

int pv_bus_read(struct pv_bus *bus, uint64_t iova, void *dst, uint64_t n, struct pv_dma *dma)
{
    return pv_bus_walk(bus, iova, n, PV_DMA_READ, copy_out, &dst, dma);
}

int pv_bus_write(struct pv_bus *bus, uint64_t iova, const void *src, uint64_t n, struct pv_dma *dma)
{
    /* A naturally aligned DWORD to the interrupt window is an interrupt request (Intel VT-d 4.1 3.14). */
    if (n == 4 && iova >= PV_MSI_START && iova <= PV_MSI_END && !(iova & 3)) {
        uint32_t data;
        begin(dma);
        memcpy(&data, src, sizeof(data));
        if (pv_bus_msi(bus, iova, data))
            return fault(dma, iova, PV_DMA_WRITE);
        dma->done = 4;
        return 0;
    }
    return pv_bus_walk(bus, iova, n, PV_DMA_WRITE, copy_in, &src, dma);
}

static inline int copy_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    const struct single *tap = arg;
    (void)dma;
    pv_move(at[1], at[0], len);
    return tap->fn ? tap->fn(tap->arg, at[1], len) : 0;
}

int pv_bus_copy_walk(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, pv_span_fn fn, void *arg,
                     struct pv_dma *dma)
{
    const struct range ranges[] = {{src, PV_DMA_READ}, {dst, PV_DMA_WRITE}};
    struct single tap = {fn, arg};
    return walk_ranges(bus, ranges, 2, n, copy_piece, &tap, dma);
}

/* Bytes of [address, address + n) in the page of its last byte. */
static inline uint64_t tail_in_page(uint64_t address, uint64_t n)
{
    uint64_t in_page = ((address + n - 1) & 4095) + 1;
    return min64(n, in_page);
}

/* A source and a destination, both limited to the shorter. */
static int translate_move(struct section *s, uint64_t dst, struct pv_span *to, uint64_t src, struct pv_span *from,
                          uint64_t n, struct pv_dma *dma)
{
    int result = translate(s, src, PV_DMA_READ, n, from, dma);
    return result ? result : translate(s, dst, PV_DMA_WRITE, from->len, to, dma);
}

int pv_bus_move_backward(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma)
{
    struct section s;
    struct pv_span to, from;
    begin(dma);
    if (!n)
        return 0;
    int result = section_open(&s, bus);
    if (result)
        return result;
    dma->backward = 1;
    for (;;) {
        uint64_t left = n - dma->done;
        uint64_t len = min64(min64(tail_in_page(src, left), tail_in_page(dst, left)), s.left);
        uint64_t at = left - len;
        while (!(result = translate_move(&s, dst + at, &to, src + at, &from, len, dma)) && to.len < len) {
            at += to.len; /* a translation ends inside the page: what is behind it goes first */
            len -= to.len;
        }
        if (result) {
            dma->fault_iova += len - 1; /* the first byte it could not reach, coming from the end */
            break;
        }
        memmove(to.ptr, from.ptr, len);
        dma->done += len;
        if (dma->done == n)
            break;
        result = section_use(&s, len);
        if (result)
            return result;
    }
    section_close(&s);
    return result;
}

int pv_bus_move(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma)
{
    if (dst > src && dst - src < n)
        return pv_bus_move_backward(bus, dst, src, n, dma);
    return pv_bus_copy_walk(bus, dst, src, n, NULL, NULL, dma);
}

struct fill {
    uint8_t pattern[16]; /* the 8 bytes twice, so that every rotation is one load */
    unsigned phase;
    int uniform;
};

static int fill_span(void *arg, uint8_t *ptr, uint64_t len)
{
    struct fill *f = arg;
    if (f->uniform) {
        memset(ptr, f->pattern[0], len);
        return 0;
    }
    uint64_t word;
    memcpy(&word, f->pattern + f->phase, 8);
    pv_fill_words(ptr, word, len);
    f->phase = (f->phase + len) % 8;
    return 0;
}

int pv_bus_fill(struct pv_bus *bus, uint64_t dst, const void *pattern8, uint64_t n, struct pv_dma *dma)
{
    struct fill f = {.phase = 0};
    memcpy(f.pattern, pattern8, 8);
    memcpy(f.pattern + 8, pattern8, 8);
    f.uniform = !memcmp(f.pattern, f.pattern + 1, 8);
    return pv_bus_walk(bus, dst, n, PV_DMA_WRITE, fill_span, &f, dma);
}

static uint64_t first_difference(const uint8_t *a, const uint8_t *b, uint64_t n)
{
    uint64_t i = 0;
    for (; i + 8 <= n && !memcmp(a + i, b + i, 8); i += 8)
        ;
    while (i < n && a[i] == b[i])
        i++;
    return i;
}

static inline int compare_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    (void)arg;
    if (!memcmp(at[0], at[1], len))
        return 0;
    uint64_t same = first_difference(at[0], at[1], len);
    if (same == len) /* somebody wrote meanwhile, and they are equal now */
        return 0;
    dma->done += same;
    return 1;
}

int pv_bus_compare(struct pv_bus *bus, uint64_t a, uint64_t b, uint64_t n, struct pv_dma *dma)
{
    const struct range ranges[] = {{a, PV_DMA_READ}, {b, PV_DMA_READ}};
    return walk_ranges(bus, ranges, 2, n, compare_piece, NULL, dma);
}

struct pair {
    pv_pair_fn fn;
    void *arg;
};

static inline int pair_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    const struct pair *pair = arg;
    return pair->fn(pair->arg, at[1], at[0], len, dma);
}

int pv_bus_pair_walk(struct pv_bus *bus, uint64_t a, uint64_t b, uint64_t n, pv_pair_fn fn, void *arg,
                     struct pv_dma *dma)
{
    const struct range ranges[] = {{b, PV_DMA_READ}, {a, PV_DMA_READ}};
    struct pair pair = {fn, arg};
    return walk_ranges(bus, ranges, 2, n, pair_piece, &pair, dma);
}

static inline int dualcast_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    (void)arg;
    (void)dma;
    pv_move_twice(at[1], at[2], at[0], len);
    return 0;
}

int pv_bus_dualcast(struct pv_bus *bus, uint64_t dst1, uint64_t dst2, uint64_t src, uint64_t n, struct pv_dma *dma)
{
    const struct range ranges[] = {{src, PV_DMA_READ}, {dst1, PV_DMA_WRITE}, {dst2, PV_DMA_WRITE}};
    return walk_ranges(bus, ranges, 3, n, dualcast_piece, NULL, dma);
}

int pv_bus_msi(struct pv_bus *bus, uint64_t addr, uint32_t data)
{
    if (atomic_load_explicit(&bus->cancel, memory_order_acquire))
        return -ECANCELED;
    return bus->ops->msi(bus, addr, data);
}

void pv_bus_cancel(struct pv_bus *bus, int on)
{
    atomic_store(&bus->cancel, on ? 1u : 0u);
}

void pv_bus_ats(struct pv_bus *bus, int on, uint32_t stu)
{
    if (bus->ops->ats)
        bus->ops->ats(bus, on != 0, stu);
}

struct pv_bus *pv_bus_get(struct pv_bus *bus)
{
    atomic_fetch_add(&bus->references, 1);
    return bus;
}

void pv_bus_destroy(struct pv_bus *bus)
{
    if (bus && atomic_fetch_sub(&bus->references, 1) == 1)
        bus->ops->destroy(bus);
}
