/*
 * Doorbells: in BAR 0, in a page that a client maps, in shadow buffers (Base 3.1.3.12 and 3.1.3.13, 5.8).
 *
 * A value that cannot be is reported once and changes nothing: a submission queue tail beyond the queue or past entries
 * that were not fetched yet, a completion queue head that passes what was completed. With shadow buffers, a store to BAR
 * 0 only says that the I/O queues' values are to be looked at there. They begin as what the doorbells are: a driver
 * compares with the old value there, and need not clear what another queue, or another life of this one, left.
 *
 * A page that a client maps may change at any time: each value is read once, and checked after that.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nvme_private.h"

#define PAGE 4096u
#define COMPLAIN_NS 1000000

/* A file for others to map: as if it were the BAR from its start on, but the doorbells alone are in it. */
static int make_file(uint64_t size)
{
    int fd = memfd_create("pvfio-nvme-doorbells", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (!ftruncate(fd, (off_t)size) && !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return fd;
    close(fd);
    return -1;
}

static void *map(uint64_t size, int fd)
{
    void *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd,
                      fd < 0 ? 0 : NVME_REG_DBS);
    return page == MAP_FAILED ? NULL : page;
}

static void drop(void *page, uint64_t size, int fd)
{
    if (page)
        munmap(page, size);
    if (fd >= 0)
        close(fd);
}

bool nvme_make_doorbells(struct pv_nvme *nvme)
{
    bool shared = nvme->config.poll_doorbells;
    uint64_t size = (((uint64_t)2 * PV_NVME_QUEUES * 4 << nvme->config.dstrd) + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    int fd = shared ? make_file(NVME_REG_DBS + size) : -1;
    void *page = shared && fd < 0 ? NULL : map(size, fd), *old = (void *)nvme->doorbell;
    int old_fd = nvme->doorbell_fd;
    if (!page) {
        drop(NULL, 0, fd);
        return false;
    }
    if (nvme->engine)
        pv_engine_pause(nvme->engine);
    nvme->doorbell = page;
    nvme->doorbell_bytes = size;
    nvme->doorbell_fd = fd;
    memset(nvme->heard, 0, sizeof(nvme->heard));
    if (nvme->engine)
        pv_engine_unpause(nvme->engine);
    drop(old, size, old_fd);
    return true;
}

void nvme_drop_doorbells(struct pv_nvme *nvme)
{
    drop((void *)nvme->doorbell, nvme->doorbell_bytes, nvme->doorbell_fd);
}

int pv_nvme_renew_doorbells(struct pv_nvme *nvme)
{
    return nvme_make_doorbells(nvme) ? 0 : -ENOMEM;
}

int pv_nvme_doorbell_fd(struct pv_nvme *nvme)
{
    return nvme->doorbell_fd;
}

static unsigned stride_shift(const struct pv_nvme *nvme)
{
    return 2 + nvme->config.dstrd;
}

static int store(void *device, uint64_t offset, uint32_t size, uint64_t value)
{
    struct pv_nvme *nvme = device;
    uint64_t at = offset - NVME_REG_DBS, index = at >> stride_shift(nvme);
    if (offset < NVME_REG_DBS || size != 4 || at >= nvme->doorbell_bytes)
        return -EINVAL;
    if (!atomic_load_explicit(&nvme->decode, memory_order_relaxed))
        return 0;
    if (at & ((4ull << nvme->config.dstrd) - 1) || index >= 2 * PV_NVME_QUEUES) {
        nvme_event(nvme, PV_NVME_EVENT_DOORBELL);
        return 0;
    }
    atomic_store_explicit(&nvme->doorbell[at / 4], (uint32_t)value, memory_order_relaxed);
    uint64_t queue = index / 2;
    atomic_fetch_or(&nvme->rung[2 * (index & 1) + queue / 64], 1ull << queue % 64);
    return 0;
}

static int load(void *device, uint64_t offset, uint32_t size, uint64_t *value)
{
    const struct pv_nvme *nvme = device;
    if (offset < NVME_REG_DBS || offset - NVME_REG_DBS >= nvme->doorbell_bytes || size > 8)
        return -EINVAL;
    *value = 0; /* doorbells are not for reading */
    return 0;
}

static void kick(void *device)
{
    pv_engine_kick(((struct pv_nvme *)device)->engine);
}

const struct pv_mmio_ops nvme_mmio_ops = {.load = load, .store = store, .kick = kick};

static bool is_live(const struct pv_nvme *nvme, uint32_t index)
{
    return index & 1 ? nvme->cq[index / 2].live : nvme->sq[index / 2].live;
}

/* The admin queues have no shadow (Base 5.8). */
static bool is_shadowed(const struct pv_nvme *nvme, uint32_t index)
{
    return nvme->shadow && index >= 2;
}

/* Stores into a mapped page cost a client nothing: it shall not keep the admin side busy with them. */
static void complain(struct pv_nvme *nvme, uint32_t event)
{
    if (nvme->config.poll_doorbells) {
        uint64_t now = nvme_now();
        if (now < nvme->complain_at)
            return;
        nvme->complain_at = now + COMPLAIN_NS;
    }
    nvme_event(nvme, event);
}

static void hear_sq(struct pv_nvme *nvme, uint32_t id, uint32_t tail)
{
    struct nvme_sq *sq = &nvme->sq[id];
    if (!sq->live) {
        complain(nvme, PV_NVME_EVENT_DOORBELL);
    } else if (tail >= sq->size || nvme_ahead(sq->head, tail, sq->size) < nvme_ahead(sq->head, sq->tail, sq->size)) {
        complain(nvme, PV_NVME_EVENT_DOORBELL_VALUE);
    } else {
        sq->tail = tail;
        if (tail != sq->head)
            nvme->ready_sq[id / 64] |= 1ull << id % 64;
    }
}

static void hear_cq(struct pv_nvme *nvme, uint32_t id, uint32_t head)
{
    struct nvme_cq *cq = &nvme->cq[id];
    if (!cq->live) {
        complain(nvme, PV_NVME_EVENT_DOORBELL);
        return;
    }
    if (head >= cq->size || nvme_ahead(cq->head, head, cq->size) > nvme_ahead(cq->head, cq->tail, cq->size)) {
        complain(nvme, PV_NVME_EVENT_DOORBELL_VALUE);
        return;
    }
    cq->head = head;
    nvme_cq_moved(nvme, cq);
}

static uint32_t doorbell_value(const struct pv_nvme *nvme, uint32_t index)
{
    return atomic_load_explicit(&nvme->doorbell[((uint64_t)index << stride_shift(nvme)) / 4], memory_order_acquire);
}

static void hear(struct pv_nvme *nvme, uint32_t index, uint32_t value)
{
    nvme->heard[index] = value;
    if (index & 1)
        hear_cq(nvme, index / 2, value);
    else
        hear_sq(nvme, index / 2, value);
}

static bool hear_rung(struct pv_nvme *nvme)
{
    bool any = false;
    for (uint32_t word = 0; word < 4; word++) {
        if (!atomic_load_explicit(&nvme->rung[word], memory_order_relaxed))
            continue;
        for (uint64_t bits = atomic_exchange(&nvme->rung[word], 0); bits; bits &= bits - 1) {
            uint32_t queue = word % 2 * 64 + (uint32_t)__builtin_ctzll(bits), index = 2 * queue + word / 2;
            if (!is_shadowed(nvme, index) || !is_live(nvme, index))
                hear(nvme, index, doorbell_value(nvme, index));
            any = true;
        }
    }
    return any;
}

/* Every doorbell of a queue that is there, in the page that a client may have mapped. */
static bool hear_page(struct pv_nvme *nvme)
{
    bool any = false;
    for (uint32_t index = 0; index < 2 * PV_NVME_QUEUES; index++) {
        if (!is_live(nvme, index) || is_shadowed(nvme, index))
            continue;
        uint32_t value = doorbell_value(nvme, index);
        if (value != nvme->heard[index]) {
            hear(nvme, index, value);
            any = true;
        }
    }
    return any;
}

/* Stores what was heard of a doorbell into its place in one of the two buffers. */
static void tell(struct pv_nvme *nvme, uint64_t buffer, uint32_t index)
{
    struct pv_dma dma;
    uint64_t at = buffer + ((uint64_t)index << stride_shift(nvme));
    if (pv_bus_write(nvme->bus, at, &nvme->heard[index], sizeof(nvme->heard[index]), &dma))
        nvme_fatal(nvme);
}

static void tell_index(struct pv_nvme *nvme, uint32_t index)
{
    if (nvme->event_index)
        tell(nvme, nvme->event_index, index);
}

void nvme_begin_shadow(struct pv_nvme *nvme, uint32_t index)
{
    if (is_shadowed(nvme, index) && is_live(nvme, index))
        nvme->fresh[index / 64] |= 1ull << index % 64;
}

static void switch_shadow(struct pv_nvme *nvme)
{
    nvme->switches = false;
    nvme->shadow = nvme->next_shadow;
    nvme->event_index = nvme->next_event_index;
    for (uint32_t index = 2; index < 2 * PV_NVME_QUEUES; index++)
        nvme_begin_shadow(nvme, index);
}

static void tell_fresh(struct pv_nvme *nvme)
{
    for (uint32_t word = 0; word < NVME_DOORBELL_WORDS; word++) {
        for (; nvme->fresh[word]; nvme->fresh[word] &= nvme->fresh[word] - 1) {
            uint32_t index = word * 64 + (uint32_t)__builtin_ctzll(nvme->fresh[word]);
            if (!is_live(nvme, index))
                continue;
            tell(nvme, nvme->shadow, index);
            tell_index(nvme, index);
        }
    }
}

/*
 * The shadow buffer, of the I/O queues. The event index is written with every value that is heard, and the buffer is
 * read again after that (any change means another step): a driver that saw the old index wrote before.
 */
static bool hear_shadow(struct pv_nvme *nvme)
{
    uint8_t values[2 * PV_NVME_QUEUES * 4 << PV_NVME_MAX_DSTRD];
    struct pv_dma dma;
    unsigned shift = stride_shift(nvme);
    bool any = false;
    if (pv_bus_read(nvme->bus, nvme->shadow, values, (uint64_t)2 * PV_NVME_QUEUES << shift, &dma)) {
        nvme_fatal(nvme);
        return false;
    }
    for (uint32_t index = 2; index < 2 * PV_NVME_QUEUES; index++) {
        uint32_t value;
        memcpy(&value, values + ((uint64_t)index << shift), sizeof(value));
        if (!is_live(nvme, index) || value == nvme->heard[index])
            continue;
        hear(nvme, index, value);
        any = true;
        tell_index(nvme, index);
    }
    atomic_thread_fence(memory_order_seq_cst); /* the indexes are stored before the next look */
    return any;
}

bool nvme_hear(struct pv_nvme *nvme)
{
    bool any = hear_rung(nvme);
    if (nvme->config.poll_doorbells && atomic_load_explicit(&nvme->decode, memory_order_relaxed))
        any |= hear_page(nvme);
    if (nvme->switches)
        switch_shadow(nvme);
    if (nvme->shadow) {
        tell_fresh(nvme);
        any |= hear_shadow(nvme);
    }
    return any;
}
