/*
 * The plain bus: a table of (iova, size, pointer), with no page tables and no IOTLB.
 *
 * For devices tested by themselves, and for servers whose client describes its memory as a list of ranges. Map and unmap
 * may run beside engines, and cost the same however many ranges there are.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "bus.h"
#include "iommu.h"
#include "range_table.h"
#include "ring.h"
#include "section.h"

#define MAX_VECTORS 2048 /* PCI 3.0 6.8.2.3 */

struct table_bus {
    struct pv_bus bus;
    _Atomic uint64_t section; /* one for all who use the bus: they take turns */
    struct range_table table;
    uint64_t changes; /* of the table, as the open section read it */
    struct hit {
        uint64_t changes;
        struct range_entry entry;
    } hit[2]; /* the last one to be read, and to be written; whose section is open uses them */
    pthread_mutex_t lock; /* of whoever changes the table */

    pthread_mutex_t ask_lock;
    pthread_cond_t asked;
    pv_remote_fn ask;
    void *ask_arg;
    uint32_t asking; /* calls of `ask` under way */

    pthread_mutex_t msi_lock;
    int eventfd;
    int *vector; /* NULL: messages ring `eventfd` */
    uint32_t vectors;
    struct pv_bell *bell; /* once there are vectors, whose eventfds are others' */
    struct pv_table_bus_stats stats;
};

static __attribute__((noinline)) int translate_miss(struct table_bus *t, struct hit *hit, uint64_t iova, uint32_t perm,
                                                    struct pv_span *span)
{
    const struct range_entry *e = range_find(&t->table, iova);
    if (!e || e->last < iova || perm & ~e->perm)
        return -EFAULT;
    *span = (struct pv_span){e->ptr, e->last - iova + 1};
    if (!e->ptr)
        return PV_REMOTE;
    span->ptr += iova - e->iova;
    *hit = (struct hit){t->changes, *e};
    return 0;
}

static int table_translate(struct pv_bus *bus, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    struct table_bus *t = (struct table_bus *)bus;
    struct hit *hit = &t->hit[perm == PV_DMA_WRITE];
    const struct range_entry *e = &hit->entry;
    if (hit->changes != t->changes || iova < e->iova || iova > e->last || perm & ~e->perm)
        return translate_miss(t, hit, iova, perm, span);
    *span = (struct pv_span){e->ptr + (iova - e->iova), e->last - iova + 1};
    return 0;
}

static void table_enter(struct pv_bus *bus)
{
    struct table_bus *t = (struct table_bus *)bus;
    pv_section_enter(&t->section);
    t->changes = atomic_load(&t->table.changes);
}

static void table_leave(struct pv_bus *bus)
{
    pv_section_leave(&((struct table_bus *)bus)->section);
}

static int table_ask(struct pv_bus *bus, uint64_t iova, void *buf, uint64_t n, int write)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->ask_lock);
    pv_remote_fn ask = t->ask;
    void *arg = t->ask_arg;
    t->asking++;
    pthread_mutex_unlock(&t->ask_lock);
    int result = ask ? ask(arg, iova, buf, n, write) : -ENOTCONN;
    pthread_mutex_lock(&t->ask_lock);
    if (!--t->asking)
        pthread_cond_broadcast(&t->asked);
    pthread_mutex_unlock(&t->ask_lock);
    return result;
}

static int ring(struct table_bus *t, int eventfd)
{
    return t->bell ? pv_bell_ring(t->bell, eventfd) : pv_ring(eventfd);
}

static int send(struct table_bus *t, uint64_t addr, uint32_t data)
{
    if (!t->vector)
        return t->eventfd >= 0 ? pv_ring(t->eventfd) : 0;
    if (addr < PV_MSI_START || addr > PV_MSI_END || data >= t->vectors || t->vector[data] < 0)
        return -EFAULT;
    return ring(t, t->vector[data]);
}

static int table_msi(struct pv_bus *bus, uint64_t addr, uint32_t data)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->msi_lock);
    t->stats.msis++;
    t->stats.last_msi_addr = addr;
    t->stats.last_msi_data = data;
    int result = send(t, addr, data);
    pthread_mutex_unlock(&t->msi_lock);
    return result;
}

int pv_table_bus_ring(struct pv_bus *bus, int eventfd)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->msi_lock);
    int result = ring(t, eventfd);
    pthread_mutex_unlock(&t->msi_lock);
    return result;
}

static void close_vectors(int *vector, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (vector[i] >= 0)
            close(vector[i]);
    free(vector);
}

static void table_destroy(struct pv_bus *bus)
{
    struct table_bus *t = (struct table_bus *)bus;
    range_table_free(&t->table);
    close_vectors(t->vector, t->vectors);
    pv_bell_destroy(t->bell);
    pthread_mutex_destroy(&t->lock);
    pthread_mutex_destroy(&t->ask_lock);
    pthread_cond_destroy(&t->asked);
    pthread_mutex_destroy(&t->msi_lock);
    free(t);
}

static const struct pv_bus_ops table_ops = {
    .translate = table_translate,
    .enter = table_enter,
    .leave = table_leave,
    .msi = table_msi,
    .destroy = table_destroy,
    .ask = table_ask,
};

struct pv_bus *pv_table_bus_create(int eventfd)
{
    struct table_bus *t = calloc(1, sizeof(*t));
    if (!t || range_table_init(&t->table, &t->section)) {
        free(t);
        return NULL;
    }
    t->bus.ops = &table_ops;
    atomic_init(&t->bus.references, 1);
    pthread_mutex_init(&t->lock, NULL);
    pthread_mutex_init(&t->ask_lock, NULL);
    pthread_cond_init(&t->asked, NULL);
    pthread_mutex_init(&t->msi_lock, NULL);
    t->eventfd = eventfd;
    return &t->bus;
}

static int map(struct table_bus *t, uint64_t iova, uint64_t size, uint8_t *ptr, uint32_t perm)
{
    struct range_entry entry = {iova, iova + size - 1, ptr, perm};
    if (!size || entry.last < iova || !perm || perm & ~(PV_DMA_READ | PV_DMA_WRITE))
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    /* Before an engine can meet it: whoever looks may wait once too often for nothing, never the other way. */
    atomic_fetch_add(&t->bus.remote, !ptr);
    int error = range_table_add(&t->table, &entry);
    atomic_store(&t->bus.remote, (uint32_t)t->table.remote);
    pthread_mutex_unlock(&t->lock);
    return error;
}

int pv_table_bus_map(struct pv_bus *bus, uint64_t iova, uint64_t size, void *ptr, uint32_t perm)
{
    return ptr ? map((struct table_bus *)bus, iova, size, ptr, perm) : -EINVAL;
}

int pv_table_bus_map_remote(struct pv_bus *bus, uint64_t iova, uint64_t size, uint32_t perm)
{
    return map((struct table_bus *)bus, iova, size, NULL, perm);
}

int pv_table_bus_unmap(struct pv_bus *bus, uint64_t iova, uint64_t size)
{
    struct table_bus *t = (struct table_bus *)bus;
    uint64_t last = iova + size - 1;
    if (!size || last < iova)
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    int error = range_table_remove(&t->table, iova, last);
    atomic_store(&t->bus.remote, (uint32_t)t->table.remote);
    pthread_mutex_unlock(&t->lock);
    return error;
}

int pv_bus_is_remote(struct pv_bus *bus)
{
    return atomic_load(&bus->remote) != 0;
}

void pv_table_bus_remote(struct pv_bus *bus, pv_remote_fn fn, void *arg)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->ask_lock);
    t->ask = fn;
    t->ask_arg = arg;
    while (t->asking)
        pthread_cond_wait(&t->asked, &t->ask_lock);
    pthread_mutex_unlock(&t->ask_lock);
}

int pv_table_bus_vectors(struct pv_bus *bus, uint32_t n)
{
    struct table_bus *t = (struct table_bus *)bus;
    if (n > MAX_VECTORS)
        return -EINVAL;
    int *vector = n ? malloc(n * sizeof(*vector)) : NULL;
    if (n && !vector)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        vector[i] = -1;
    pthread_mutex_lock(&t->msi_lock);
    int *old = t->vector;
    uint32_t count = t->vectors;
    t->vector = vector;
    t->vectors = n;
    if (n && !t->bell)
        t->bell = pv_bell_create();
    pthread_mutex_unlock(&t->msi_lock);
    close_vectors(old, count);
    return 0;
}

int pv_table_bus_vector(struct pv_bus *bus, uint32_t i, int fd)
{
    struct table_bus *t = (struct table_bus *)bus;
    /* An eventfd of our own: whoever gave this one may close it, and its number may come back as another file. */
    int own = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd >= 0 && own < 0)
        return -errno;
    pthread_mutex_lock(&t->msi_lock);
    bool accepted = i < t->vectors && (own < 0 || pv_is_eventfd(own));
    int old = own;
    if (accepted) {
        old = t->vector[i];
        t->vector[i] = own;
    }
    pthread_mutex_unlock(&t->msi_lock);
    if (old >= 0)
        close(old);
    return accepted ? 0 : -EINVAL;
}

void pv_table_bus_stats(struct pv_bus *bus, struct pv_table_bus_stats *out)
{
    struct table_bus *t = (struct table_bus *)bus;
    pthread_mutex_lock(&t->msi_lock);
    *out = t->stats;
    pthread_mutex_unlock(&t->msi_lock);
    pthread_mutex_lock(&t->lock);
    out->maps = t->table.count;
    pthread_mutex_unlock(&t->lock);
}
