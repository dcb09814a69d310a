/*
 * Making and configuring the NVMe data path (see nvme_engine.h): events, settings, the pin, namespaces.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "nvme_private.h"

#define LONGEST_POLL_NS 800000 /* with waking up and the work, 1 ms at most from a store to its completion */
#define COALESCE_UNIT_NS 100000u

uint64_t nvme_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void nvme_event(struct pv_nvme *nvme, uint32_t event)
{
    if (!(atomic_fetch_or(&nvme->events, event) & event))
        eventfd_write(nvme->event_fd, 1);
}

void nvme_fatal(struct pv_nvme *nvme)
{
    /* A reset that goes on cancels DMA: what fails because of it is not the controller's failure. */
    if (atomic_load(&nvme->bus->cancel) || atomic_exchange(&nvme->fatal, 1))
        return;
    nvme_event(nvme, PV_NVME_EVENT_FATAL);
}

static bool allocate(struct pv_nvme *nvme)
{
    nvme->admin = calloc(NVME_AQA_MAX, sizeof(*nvme->admin));
    nvme->bounce = malloc(NVME_BOUNCE);
    nvme->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return nvme->admin && nvme->bounce && nvme->event_fd >= 0 && nvme_make_doorbells(nvme);
}

struct pv_nvme *pv_nvme_create(const struct pv_nvme_config *config, struct pv_bus *bus, struct pv_msix *msix, int kind)
{
    if (config->dstrd > PV_NVME_MAX_DSTRD || config->mdts_shift > PV_NVME_MAX_MDTS || !config->namespaces ||
        config->namespaces > PV_NVME_NAMESPACES || !msix)
        return NULL;
    struct pv_nvme *nvme = calloc(1, sizeof(*nvme));
    if (!nvme)
        return NULL;
    nvme->config = *config;
    nvme->bus = pv_bus_get(bus);
    nvme->msix = pv_msix_get(msix);
    nvme->threaded = kind == PV_ENGINE_THREAD;
    nvme->mmio = (struct pv_mmio){&nvme_mmio_ops, nvme, 0};
    nvme->event_fd = nvme->doorbell_fd = -1;
    nvme->answers_end = &nvme->answers;
    nvme->synced_end = &nvme->synced;
    atomic_init(&nvme->due, NVME_NEVER);
    pthread_mutex_init(&nvme->lock, NULL);
    pthread_cond_init(&nvme->transferred, NULL);
    pv_nvme_set_arbitration(nvme, 7, 0, 0, 0);
    if (allocate(nvme)) {
        nvme->mmio.size = NVME_REG_DBS + nvme->doorbell_bytes;
        nvme->engine = pv_engine_create(nvme_step, nvme, kind, config->poll_doorbells ? LONGEST_POLL_NS : 0);
    }
    if (!nvme->engine) {
        pv_nvme_destroy(nvme);
        return NULL;
    }
    atomic_store_explicit(&nvme->ready, true, memory_order_release);
    return nvme;
}

static void drop_namespace(struct nvme_namespace *ns)
{
    pv_nvme_backing_put(ns->backing);
    free(ns->metadata);
    free(ns->unusable);
    *ns = (struct nvme_namespace){0};
}

void pv_nvme_destroy(struct pv_nvme *nvme)
{
    if (!nvme)
        return;
    if (nvme->engine)
        pv_nvme_disable(nvme);
    nvme_sync_destroy(nvme); /* it kicks the engine */
    pv_engine_destroy(nvme->engine);
    for (uint32_t i = 0; i < PV_NVME_NAMESPACES; i++)
        drop_namespace(&nvme->ns[i]);
    nvme_drop_doorbells(nvme);
    if (nvme->event_fd >= 0)
        close(nvme->event_fd);
    free(nvme->admin);
    free(nvme->bounce);
    pthread_cond_destroy(&nvme->transferred);
    pthread_mutex_destroy(&nvme->lock);
    pv_msix_destroy(nvme->msix);
    pv_bus_destroy(nvme->bus);
    free(nvme);
}

struct pv_engine *pv_nvme_engine(struct pv_nvme *nvme)
{
    return nvme->engine;
}

struct pv_mmio *pv_nvme_mmio(struct pv_nvme *nvme)
{
    return &nvme->mmio;
}

void pv_nvme_decode(struct pv_nvme *nvme, int on)
{
    atomic_store(&nvme->decode, on ? 1u : 0u);
}

int pv_nvme_event_fd(struct pv_nvme *nvme)
{
    return nvme->event_fd;
}

uint32_t pv_nvme_events(struct pv_nvme *nvme)
{
    eventfd_t count;
    eventfd_read(nvme->event_fd, &count);
    return atomic_exchange(&nvme->events, 0);
}

int pv_nvme_set_shadow(struct pv_nvme *nvme, uint64_t shadow, uint64_t event_index)
{
    uint64_t page = 1ull << nvme->page_shift;
    if ((shadow | event_index) & (page - 1) || nvme->doorbell_bytes > page)
        return -EINVAL;
    pv_engine_pause(nvme->engine);
    nvme->next_shadow = shadow;
    nvme->next_event_index = event_index;
    nvme->switches = true;
    pv_engine_unpause(nvme->engine);
    pv_engine_kick(nvme->engine);
    return 0;
}

void pv_nvme_set_arbitration(struct pv_nvme *nvme, uint32_t burst, uint32_t low, uint32_t medium, uint32_t high)
{
    if (nvme->engine)
        pv_engine_pause(nvme->engine);
    nvme->burst = burst >= 7 ? NVME_BURST : 1u << burst > NVME_BURST ? NVME_BURST : 1u << burst;
    nvme->weight[NVME_SQ_QPRIO_HIGH] = high + 1;
    nvme->weight[NVME_SQ_QPRIO_MEDIUM] = medium + 1;
    nvme->weight[NVME_SQ_QPRIO_LOW] = low + 1;
    memset(nvme->credit, 0, sizeof(nvme->credit));
    if (nvme->engine)
        pv_engine_unpause(nvme->engine);
}

void pv_nvme_set_coalescing(struct pv_nvme *nvme, uint32_t threshold, uint32_t time)
{
    pv_engine_pause(nvme->engine);
    nvme->coalesce_threshold = threshold;
    nvme->coalesce_ns = (uint64_t)time * COALESCE_UNIT_NS;
    nvme_ring_due(nvme, NVME_NEVER);
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_set_vector_coalescing(struct pv_nvme *nvme, uint32_t vector, int on)
{
    if (vector >= 2048)
        return;
    pv_engine_pause(nvme->engine);
    uint64_t bit = 1ull << vector % 64;
    nvme->uncoalesced[vector / 64] = on ? nvme->uncoalesced[vector / 64] & ~bit : nvme->uncoalesced[vector / 64] | bit;
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_set_pin(struct pv_nvme *nvme, int on)
{
    atomic_store(&nvme->pin, on ? 1u : 0u);
    nvme_event(nvme, PV_NVME_EVENT_PIN);
}

int pv_nvme_pin(struct pv_nvme *nvme)
{
    int level = 0;
    if (!atomic_load(&nvme->pin) || atomic_load(&nvme->pin_mask) & 1)
        return 0;
    pv_engine_pause(nvme->engine);
    nvme_catch_up(nvme); /* heads that the host has stored and nobody has looked at yet */
    for (uint32_t i = 0; i < PV_NVME_QUEUES; i++)
        level |= nvme->cq[i].live && nvme->cq[i].interrupts && nvme->cq[i].head != nvme->cq[i].tail;
    pv_engine_unpause(nvme->engine);
    pv_engine_kick(nvme->engine);
    return level;
}

void pv_nvme_mask_pin(struct pv_nvme *nvme, uint32_t mask)
{
    atomic_store(&nvme->pin_mask, mask);
    nvme_event(nvme, PV_NVME_EVENT_PIN);
}

static bool format_fits(const struct pv_nvme_backing *backing, const struct pv_nvme_format *format)
{
    if (format->lba_shift < 9 || format->lba_shift > 16 || format->metadata > PV_NVME_MAX_METADATA || format->pi > 1 ||
        (format->pi && format->metadata < sizeof(struct nvme_pi_tuple)) || !format->blocks ||
        (format->metadata && !backing->base)) /* there is nowhere to make metadata durable */
        return false;
    return format->blocks <= backing->size >> format->lba_shift;
}

int pv_nvme_set_namespace(struct pv_nvme *nvme, uint32_t nsid, struct pv_nvme_backing *backing,
                          const struct pv_nvme_format *format)
{
    if (!nsid || nsid > nvme->config.namespaces || (backing && !format_fits(backing, format)))
        return -EINVAL;
    struct nvme_namespace made = {0};
    if (backing) {
        made.format = *format;
        made.format.read_only |= backing->read_only;
        if (format->metadata && !(made.metadata = malloc(format->blocks * format->metadata)))
            return -ENOMEM;
        if (made.metadata)
            memset(made.metadata, 0xff, format->blocks * format->metadata); /* tags that are not checked, NVM 5.2.1.4 */
        made.backing = pv_nvme_backing_get(backing);
    }
    pv_engine_pause(nvme->engine);
    struct nvme_namespace old = nvme->ns[nsid - 1];
    made.refuse = backing ? old.refuse : 0;
    made.write_protected = backing && old.write_protected;
    nvme->ns[nsid - 1] = made;
    pv_engine_unpause(nvme->engine);
    drop_namespace(&old);
    return 0;
}

void pv_nvme_write_protect(struct pv_nvme *nvme, uint32_t nsid, int on)
{
    if (!nsid || nsid > PV_NVME_NAMESPACES)
        return;
    pv_engine_pause(nvme->engine);
    nvme->ns[nsid - 1].write_protected = on;
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_refuse_namespace(struct pv_nvme *nvme, uint32_t nsid, uint32_t status)
{
    if (!nsid || nsid > PV_NVME_NAMESPACES)
        return;
    pv_engine_pause(nvme->engine);
    nvme->ns[nsid - 1].refuse = status;
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_set_write_cache(struct pv_nvme *nvme, int on)
{
    pv_engine_pause(nvme->engine);
    nvme->write_through = !on;
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_refuse_io(struct pv_nvme *nvme, uint32_t status)
{
    pv_engine_pause(nvme->engine);
    nvme->refuse = status;
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_get_stats(struct pv_nvme *nvme, struct pv_nvme_stats *out)
{
    pv_engine_pause(nvme->engine);
    *out = nvme->stats;
    pv_engine_unpause(nvme->engine);
}

uint64_t pv_nvme_due(struct pv_nvme *nvme)
{
    uint64_t due = atomic_load(&nvme->due);
    return due == NVME_NEVER ? 0 : due;
}
