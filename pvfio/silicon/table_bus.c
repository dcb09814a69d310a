/*
 * The plain bus: a table of (iova, size, pointer), with no page tables and no IOTLB.
 *
 * For devices tested by themselves, and for servers whose client describes its memory as a list of ranges. The table is
 * replaced as a whole and the old one freed once no section uses it, so map and unmap may run beside an engine.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bus.h"
#include "section.h"

struct entry {
    uint64_t iova, last;
    uint8_t *ptr;
    uint32_t perm;
};

struct table {
    uint64_t count;
    struct entry entry[];
};

struct table_bus {
    struct pv_bus bus;
    _Atomic uint64_t section;
    _Atomic(struct table *) table;
    pthread_mutex_t lock; /* of whoever changes the table, and of the counts */
    int eventfd;
    struct pv_table_bus_stats stats;
};

/* The first entry that ends at or after iova. */
static uint64_t position(const struct table *table, uint64_t iova)
{
    uint64_t low = 0, high = table->count;
    while (low < high) {
        uint64_t mid = low + (high - low) / 2;
        if (table->entry[mid].last < iova)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static int table_translate(struct pv_bus *bus, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    struct table_bus *t = (struct table_bus *)bus;
    const struct table *table = atomic_load_explicit(&t->table, memory_order_acquire);
    uint64_t at = position(table, iova);
    if (at == table->count || table->entry[at].iova > iova || perm & ~table->entry[at].perm)
        return -EFAULT;
    const struct entry *e = &table->entry[at];
    *span = (struct pv_span){e->ptr + (iova - e->iova), e->last - iova + 1};
    return 0;
}

static void table_enter(struct pv_bus *bus)
{
    pv_section_enter(&((struct table_bus *)bus)->section);
}

static void table_leave(struct pv_bus *bus)
{
    pv_section_leave(&((struct table_bus *)bus)->section);
}

static int table_msi(struct pv_bus *bus, uint64_t addr, uint32_t data)
{
    struct table_bus *t = (struct table_bus *)bus;
    uint64_t one = 1;
    pthread_mutex_lock(&t->lock);
    t->stats.msis++;
    t->stats.last_msi_addr = addr;
    t->stats.last_msi_data = data;
    pthread_mutex_unlock(&t->lock);
    if (t->eventfd >= 0 && write(t->eventfd, &one, sizeof(one)) != sizeof(one))
        return -EFAULT;
    return 0;
}

static void table_destroy(struct pv_bus *bus)
{
    struct table_bus *t = (struct table_bus *)bus;
    free(atomic_load(&t->table));
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const struct pv_bus_ops table_ops = {table_translate, table_enter, table_leave, table_msi, NULL, table_destroy};

struct pv_bus *pv_table_bus_create(int eventfd)
{
    struct table_bus *t = calloc(1, sizeof(*t));
    struct table *empty = calloc(1, sizeof(*empty));
    if (!t || !empty) {
        free(t);
        free(empty);
        return NULL;
    }
    t->bus.ops = &table_ops;
    atomic_init(&t->bus.references, 1);
    atomic_init(&t->table, empty);
    pthread_mutex_init(&t->lock, NULL);
    t->eventfd = eventfd;
    return &t->bus;
}

static void replace(struct table_bus *t, struct table *table)
{
    struct table *old = atomic_exchange(&t->table, table);
    pv_section_wait(&t->section);
    free(old);
}

int pv_table_bus_map(struct pv_bus *bus, uint64_t iova, uint64_t size, void *ptr, uint32_t perm)
{
    struct table_bus *t = (struct table_bus *)bus;
    uint64_t last = iova + size - 1;
    if (!size || last < iova || !perm || perm & ~(PV_DMA_READ | PV_DMA_WRITE))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    const struct table *old = atomic_load(&t->table);
    uint64_t at = position(old, iova);
    int error = at < old->count && old->entry[at].iova <= last ? -EEXIST : 0;
    struct table *more = error ? NULL : malloc(sizeof(*more) + (old->count + 1) * sizeof(struct entry));
    if (more) {
        more->count = old->count + 1;
        memcpy(more->entry, old->entry, at * sizeof(struct entry));
        more->entry[at] = (struct entry){iova, last, ptr, perm};
        memcpy(more->entry + at + 1, old->entry + at, (old->count - at) * sizeof(struct entry));
        replace(t, more);
    } else if (!error) {
        error = -ENOMEM;
    }
    pthread_mutex_unlock(&t->lock);
    return error;
}

/* Entries wholly inside the range go; an entry partly inside it: -EINVAL and nothing happens. */
int pv_table_bus_unmap(struct pv_bus *bus, uint64_t iova, uint64_t size)
{
    struct table_bus *t = (struct table_bus *)bus;
    uint64_t last = iova + size - 1;
    if (!size || last < iova)
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    const struct table *old = atomic_load(&t->table);
    uint64_t from = position(old, iova), to = from;
    int error = 0;
    while (to < old->count && old->entry[to].iova <= last) {
        if (old->entry[to].iova < iova || old->entry[to].last > last)
            error = -EINVAL;
        to++;
    }
    struct table *less = error ? NULL : malloc(sizeof(*less) + old->count * sizeof(struct entry));
    if (less) {
        less->count = old->count - (to - from);
        memcpy(less->entry, old->entry, from * sizeof(struct entry));
        memcpy(less->entry + from, old->entry + to, (old->count - to) * sizeof(struct entry));
        replace(t, less);
    } else if (!error) {
        error = -ENOMEM;
    }
    pthread_mutex_unlock(&t->lock);
    return error;
}

void pv_table_bus_stats(struct pv_bus *bus, struct pv_table_bus_stats *out)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->lock);
    *out = t->stats;
    pthread_mutex_unlock(&t->lock);
}
