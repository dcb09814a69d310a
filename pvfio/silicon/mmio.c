/*
 * Checked entry to a BAR's C path (see mmio.h).
 */
#include "mmio.h"

#include <errno.h>

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
