/*
 * Bus-master operations over any `struct pv_bus`: split at translations and into sections (see bus.h).
 */
#include "bus.h"

#include <errno.h>
#include <string.h>

#include "bus_private.h"
#include "iommu.h"
#include "move.h"

static inline void begin(struct pv_dma *dma)
{
    *dma = (struct pv_dma){0};
}

/*
 * The one loop of every forward operation: translates the ranges in their order, each limited to the shortest before
 * it. Always inline: `count`, `fn` and `after` are constants at every call.
 */
static inline __attribute__((always_inline)) int walk_ranges(struct pv_bus *bus, const struct range *ranges,
                                                             unsigned count, uint64_t n, piece_fn fn,
                                                             piece_fn after, void *arg, struct pv_dma *dma)
{
    struct section s;
    begin(dma);
    if (!n)
        return 0;
    int result = section_open(&s, bus);
    if (result)
        return result;
    for (;;) {
        uint8_t *at[MAX_RANGES];
        struct pv_span span = {NULL, n - dma->done};
        for (unsigned i = 0; i < count && !result; i++) {
            result = translate(&s, ranges[i].iova + dma->done, ranges[i].perm, span.len, &span, dma);
            at[i] = span.ptr;
        }
        if (!result)
            result = fn(arg, at, span.len, dma);
        if (!result && after)
            result = after(arg, at, span.len, dma);
        if (__builtin_expect(result == PV_REMOTE, 0)) {
            const struct walk walk = {bus, ranges, count, n, fn, after, arg};
            section_close(&s);
            result = pv_bus_ask_piece(&walk, dma);
            if (result || dma->done == n || (result = section_open(&s, bus)))
                return result;
            continue;
        }
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
    return walk_ranges(bus, &range, 1, n, single_piece, NULL, &single, dma);
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
    (void)arg;
    (void)dma;
    pv_move(at[1], at[0], len);
    return 0;
}

static inline int copied_piece(void *arg, uint8_t *const *at, uint64_t len, struct pv_dma *dma)
{
    const struct single *tap = arg;
    (void)dma;
    return tap->fn ? tap->fn(tap->arg, at[1], len) : 0;
}

int pv_bus_copy_walk(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, pv_span_fn fn, void *arg,
                     struct pv_dma *dma)
{
    const struct range ranges[] = {{src, PV_DMA_READ}, {dst, PV_DMA_WRITE}};
    struct single tap = {fn, arg};
    return walk_ranges(bus, ranges, 2, n, copy_piece, copied_piece, &tap, dma);
}

/* Bytes of [address, address + n) in the page of its last byte. */
static inline uint64_t tail_in_page(uint64_t address, uint64_t n)
{
    uint64_t in_page = ((address + n - 1) & 4095) + 1;
    return min64(n, in_page);
}

/* The last piece of a move: [at, at + len) of it, without a pointer where it is remote. */
struct tail {
    uint64_t at, len;
    struct pv_span to, from;
};

/* A source and a destination, both limited to the shorter. */
static int translate_tail(struct section *s, uint64_t dst, uint64_t src, struct tail *t, struct pv_dma *dma)
{
    int result = translate(s, src + t->at, PV_DMA_READ, t->len, &t->from, dma);
    if (!result || result == PV_REMOTE)
        result = translate(s, dst + t->at, PV_DMA_WRITE, t->from.len, &t->to, dma);
    return result == PV_REMOTE ? 0 : result;
}

static int find_tail(struct section *s, uint64_t dst, uint64_t src, uint64_t left, struct tail *t, struct pv_dma *dma)
{
    int result;
    t->len = min64(min64(tail_in_page(src, left), tail_in_page(dst, left)), s->left);
    t->at = left - t->len;
    while (!(result = translate_tail(s, dst, src, t, dma)) && t->to.len < t->len) {
        t->at += t->to.len; /* a translation ends inside the page: what is behind it goes first */
        t->len -= t->to.len;
    }
    if (result)
        dma->fault_iova += t->len - 1; /* the first byte it could not reach, coming from the end */
    return result;
}

/* Outside sections, at most a page: all of it is read before any of it is written. */
static int move_apart(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma)
{
    uint8_t bytes[4096], *to = bytes;
    const uint8_t *from = bytes;
    struct pv_dma part;
    int result = pv_bus_walk(bus, src, n, PV_DMA_READ, copy_out, &to, &part);
    if (result == -EFAULT)
        return fault(dma, src + n - 1, PV_DMA_READ);
    if (!result)
        result = pv_bus_walk(bus, dst, n, PV_DMA_WRITE, copy_in, &from, &part);
    if (result == -EFAULT)
        return fault(dma, dst + n - 1, PV_DMA_WRITE);
    dma->done += result ? 0 : n;
    return result;
}

int pv_bus_move_backward(struct pv_bus *bus, uint64_t dst, uint64_t src, uint64_t n, struct pv_dma *dma)
{
    struct section s;
    begin(dma);
    if (!n)
        return 0;
    int result = section_open(&s, bus);
    if (result)
        return result;
    dma->backward = 1;
    for (;;) {
        struct tail t;
        result = find_tail(&s, dst, src, n - dma->done, &t, dma);
        if (result)
            break;
        if (!t.from.ptr || !t.to.ptr) {
            section_close(&s);
            result = move_apart(bus, dst + t.at, src + t.at, t.len, dma);
            if (result || dma->done == n || (result = section_open(&s, bus)))
                return result;
            continue;
        }
        memmove(t.to.ptr, t.from.ptr, t.len);
        dma->done += t.len;
        if (dma->done == n)
            break;
        result = section_use(&s, t.len);
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
    return walk_ranges(bus, ranges, 2, n, compare_piece, NULL, NULL, dma);
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
    return walk_ranges(bus, ranges, 2, n, pair_piece, NULL, &pair, dma);
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
    return walk_ranges(bus, ranges, 3, n, dualcast_piece, NULL, NULL, dma);
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

int pv_bus_cancelled(struct pv_bus *bus)
{
    return atomic_load(&bus->cancel) != 0;
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
