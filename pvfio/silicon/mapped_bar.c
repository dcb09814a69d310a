/*
 * A BAR that is mapped into this process (see mmio.h).
 */
#include <cpuid.h>
#include <errno.h>
#include <immintrin.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "mmio.h"

struct mapped_bar {
    struct pv_mmio mmio;
    bool whole; /* 64 bytes in one store */
    uint32_t count;
    struct pv_mmio_area area[];
};

static uint8_t *at(const struct mapped_bar *bar, uint64_t offset, uint64_t size)
{
    for (uint32_t i = 0; i < bar->count; i++) {
        const struct pv_mmio_area *area = &bar->area[i];
        uint64_t inside = offset - area->offset;
        if (inside < area->size && size <= area->size - inside)
            return area->ptr + inside;
    }
    return NULL;
}

static int load(void *device, uint64_t offset, uint32_t size, uint64_t *value)
{
    const uint8_t *ptr = at(device, offset, size);
    if (!ptr)
        return -EINVAL;
    if (size == 1)
        *value = *(const volatile uint8_t *)ptr;
    else if (size == 2)
        *value = *(const volatile uint16_t *)ptr;
    else if (size == 4)
        *value = *(const volatile uint32_t *)ptr;
    else
        *value = *(const volatile uint64_t *)ptr;
    return 0;
}

static int store(void *device, uint64_t offset, uint32_t size, uint64_t value)
{
    uint8_t *ptr = at(device, offset, size);
    if (!ptr)
        return -EINVAL;
    __atomic_thread_fence(__ATOMIC_RELEASE); /* what a doorbell tells of is in memory before it */
    if (size == 1)
        *(volatile uint8_t *)ptr = (uint8_t)value;
    else if (size == 2)
        *(volatile uint16_t *)ptr = (uint16_t)value;
    else if (size == 4)
        *(volatile uint32_t *)ptr = (uint32_t)value;
    else
        *(volatile uint64_t *)ptr = value;
    return 0;
}

__attribute__((target("movdir64b"))) static void store_whole(void *ptr, const void *src64)
{
    _mm_sfence(); /* a direct store is not ordered after other stores */
    _movdir64b(ptr, src64);
}

static int submit(void *device, uint64_t offset, const void *src64, int nonposted)
{
    const struct mapped_bar *bar = device;
    uint8_t *ptr = at(bar, offset, 64);
    if (nonposted)
        return -ENOTTY;
    if (!ptr)
        return -EINVAL;
    if (bar->whole) {
        store_whole(ptr, src64);
        return 0;
    }
    uint64_t word[8];
    memcpy(word, src64, sizeof(word));
    __atomic_thread_fence(__ATOMIC_RELEASE);
    for (int i = 0; i < 8; i++)
        ((volatile uint64_t *)ptr)[i] = word[i];
    return 0;
}

static const struct pv_mmio_ops mapped_ops = {.load = load, .store = store, .submit = submit};

static bool has_movdir64b(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && c >> 28 & 1;
}

struct pv_mmio *pv_mapped_bar_create(uint64_t size, const struct pv_mmio_area *areas, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (areas[i].offset > size || areas[i].size > size - areas[i].offset ||
            ((uintptr_t)areas[i].ptr - areas[i].offset) % 64)
            return NULL;
    struct mapped_bar *bar = malloc(sizeof(*bar) + count * sizeof(*areas));
    if (!bar)
        return NULL;
    bar->mmio = (struct pv_mmio){&mapped_ops, bar, size};
    bar->whole = has_movdir64b();
    bar->count = count;
    memcpy(bar->area, areas, count * sizeof(*areas));
    return &bar->mmio;
}

void pv_mapped_bar_destroy(struct pv_mmio *mmio)
{
    if (mmio)
        free(mmio->device);
}
