/*
 * MSI-X: table, pending bits, sending (see msix.h).
 */
#include "msix.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#define ENTRY_BYTES 16
#define MAX_VECTORS 2048
#define VECTOR_MASKED 1u /* Vector Control bit 0 (PCI 3.0 6.8.2.9) */

struct entry {
    uint32_t word[4]; /* address low, address high, data, vector control */
};

struct pv_msix {
    _Atomic uint32_t references;
    struct pv_bus *bus;
    pthread_mutex_t lock;
    uint32_t vectors;
    int enable, function_mask;
    uint64_t *pending;
    struct entry entry[];
};

static void reset_entries(struct pv_msix *x)
{
    for (uint32_t i = 0; i < x->vectors; i++)
        x->entry[i] = (struct entry){{0, 0, 0, VECTOR_MASKED}};
    for (uint32_t i = 0; i < (x->vectors + 63) / 64; i++)
        x->pending[i] = 0;
    x->enable = x->function_mask = 0;
}

struct pv_msix *pv_msix_create(struct pv_bus *bus, uint32_t vectors)
{
    if (!vectors || vectors > MAX_VECTORS)
        return NULL;
    struct pv_msix *x = calloc(1, sizeof(*x) + vectors * sizeof(struct entry));
    uint64_t *pending = calloc((vectors + 63) / 64, sizeof(*pending));
    if (!x || !pending) {
        free(x);
        free(pending);
        return NULL;
    }
    atomic_init(&x->references, 1);
    x->bus = pv_bus_get(bus);
    x->vectors = vectors;
    x->pending = pending;
    pthread_mutex_init(&x->lock, NULL);
    reset_entries(x);
    return x;
}

struct pv_msix *pv_msix_get(struct pv_msix *x)
{
    atomic_fetch_add(&x->references, 1);
    return x;
}

void pv_msix_destroy(struct pv_msix *x)
{
    if (!x || atomic_fetch_sub(&x->references, 1) > 1)
        return;
    pv_bus_destroy(x->bus);
    pthread_mutex_destroy(&x->lock);
    free(x->pending);
    free(x);
}

static int masked(const struct pv_msix *x, uint32_t vector)
{
    return x->function_mask || x->entry[vector].word[3] & VECTOR_MASKED;
}

static int send(struct pv_msix *x, uint32_t vector)
{
    const uint32_t *word = x->entry[vector].word;
    return pv_bus_msi(x->bus, (uint64_t)word[1] << 32 | word[0], word[2]) ? -EFAULT : 0;
}

static void send_pending(struct pv_msix *x, uint32_t vector)
{
    uint64_t bit = 1ull << vector % 64;
    if (x->enable && x->pending[vector / 64] & bit && !masked(x, vector)) {
        x->pending[vector / 64] &= ~bit;
        send(x, vector);
    }
}

void pv_msix_control(struct pv_msix *x, int enable, int function_mask)
{
    pthread_mutex_lock(&x->lock);
    x->enable = enable;
    x->function_mask = function_mask;
    for (uint32_t i = 0; i < x->vectors; i++)
        send_pending(x, i);
    pthread_mutex_unlock(&x->lock);
}

static int check(uint64_t offset, uint32_t size, uint64_t bytes)
{
    if ((size != 4 && size != 8) || offset % size || offset >= bytes)
        return -EINVAL;
    return 0;
}

int pv_msix_table_read(struct pv_msix *x, uint64_t offset, uint32_t size, uint64_t *value)
{
    if (check(offset, size, (uint64_t)x->vectors * ENTRY_BYTES))
        return -EINVAL;
    pthread_mutex_lock(&x->lock);
    const uint32_t *word = &x->entry[offset / ENTRY_BYTES].word[offset % ENTRY_BYTES / 4];
    *value = size == 8 ? (uint64_t)word[1] << 32 | word[0] : word[0];
    pthread_mutex_unlock(&x->lock);
    return 0;
}

int pv_msix_table_write(struct pv_msix *x, uint64_t offset, uint32_t size, uint64_t value)
{
    if (check(offset, size, (uint64_t)x->vectors * ENTRY_BYTES))
        return -EINVAL;
    uint32_t vector = offset / ENTRY_BYTES, at = offset % ENTRY_BYTES / 4;
    pthread_mutex_lock(&x->lock);
    struct entry *e = &x->entry[vector];
    e->word[at] = (uint32_t)value;
    if (size == 8)
        e->word[at + 1] = value >> 32;
    e->word[0] &= ~3u; /* message addresses are DWORD aligned */
    e->word[3] &= VECTOR_MASKED;
    send_pending(x, vector);
    pthread_mutex_unlock(&x->lock);
    return 0;
}

int pv_msix_pba_read(struct pv_msix *x, uint64_t offset, uint32_t size, uint64_t *value)
{
    if (check(offset, size, (x->vectors + 63) / 64 * 8))
        return -EINVAL;
    pthread_mutex_lock(&x->lock);
    uint64_t word = x->pending[offset / 8];
    pthread_mutex_unlock(&x->lock);
    *value = size == 8 ? word : (uint32_t)(word >> offset % 8 * 8);
    return 0;
}

int pv_msix_fire(struct pv_msix *x, uint32_t vector)
{
    if (vector >= x->vectors)
        return -EINVAL;
    int result;
    pthread_mutex_lock(&x->lock);
    if (!x->enable) {
        result = -ENOENT;
    } else if (masked(x, vector)) {
        x->pending[vector / 64] |= 1ull << vector % 64;
        result = 1;
    } else {
        result = send(x, vector);
    }
    pthread_mutex_unlock(&x->lock);
    return result;
}

void pv_msix_reset(struct pv_msix *x)
{
    pthread_mutex_lock(&x->lock);
    reset_entries(x);
    pthread_mutex_unlock(&x->lock);
}
