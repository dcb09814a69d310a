/*
 * Checked entry to a BAR's C path (see mmio.h).
 */
#include "mmio.h"

#include <errno.h>
#include <string.h>

static int check(const struct pv_mmio *mmio, uint64_t offset, uint64_t size)
{
    if (offset >= mmio->size || size > mmio->size - offset || offset & (size - 1))
        return -EINVAL;
    return 0;
}

static int is_access_size(uint32_t size)
{
    return size == 1 || size == 2 || size == 4 || size == 8;
}

int pv_mmio_load(struct pv_mmio *mmio, uint64_t offset, uint32_t size, uint64_t *value)
{
    if (!is_access_size(size) || check(mmio, offset, size))
        return -EINVAL;
    return mmio->ops->load ? mmio->ops->load(mmio->device, offset, size, value) : -ENOTTY;
}

int pv_mmio_store(struct pv_mmio *mmio, uint64_t offset, uint32_t size, uint64_t value)
{
    if (!is_access_size(size) || check(mmio, offset, size))
        return -EINVAL;
    if (!mmio->ops->store)
        return -ENOTTY;
    int error = mmio->ops->store(mmio->device, offset, size, value);
    if (!error && mmio->ops->kick)
        mmio->ops->kick(mmio->device);
    return error;
}

int pv_mmio_movdir64b(struct pv_mmio *mmio, uint64_t offset, const void *src, uint64_t n)
{
    if (check(mmio, offset, 64))
        return -EINVAL;
    if (!mmio->ops->submit)
        return -ENOTTY;
    uint64_t page = offset & ~(uint64_t)4095, slot = offset & 4095;
    int error = 0;
    for (uint64_t i = 0; i < n && !error; i++) {
        error = mmio->ops->submit(mmio->device, page + slot, (const uint8_t *)src + i * 64, 0);
        slot = (slot + 64) & 4095;
    }
    if (mmio->ops->kick)
        mmio->ops->kick(mmio->device);
    return error;
}

int pv_mmio_enqcmd(struct pv_mmio *mmio, uint64_t offset, const void *src64)
{
    if (check(mmio, offset, 64))
        return -EINVAL;
    if (!mmio->ops->submit)
        return -ENOTTY;
    int error = mmio->ops->submit(mmio->device, offset, src64, 1);
    if (!error && mmio->ops->kick)
        mmio->ops->kick(mmio->device);
    return error;
}

int64_t pv_mmio_post(struct pv_mmio *mmio, const struct pv_mmio_queue *queue, uint32_t at, const uint8_t *entry, uint16_t id,
                     uint64_t first, uint64_t second)
{
    uint64_t words[8];
    memcpy(words, entry, sizeof(words));
    words[0] = (words[0] & ~0xFFFF0000ull) | (uint64_t)id << 16;
    words[queue->word[0] & 7] = first;
    words[queue->word[1] & 7] = second;
    memcpy(queue->entries + (uint64_t)at * 8, words, sizeof(words));
    uint32_t tail = at + 1 < queue->size ? at + 1 : 0;
    int error = mmio ? pv_mmio_store(mmio, queue->doorbell, 4, tail) : -ENOTTY;
    return error ? error : (int64_t)tail;
}
