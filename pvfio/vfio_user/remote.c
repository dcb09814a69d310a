/* A bus's remote ranges over a channel: see remote.h. */
#include "remote.h"

#include <errno.h>
#include <stdlib.h>

#include "channel.h"
#include "channel_dma.h"
#include "silicon/bus.h"

struct pv_vfu_remote {
    struct pv_bus *bus;
    struct pv_vfu *channel;
    uint64_t timeout_ns;
};

static void close_section(void *arg)
{
    struct pv_bus *bus = arg;
    bus->ops->leave(bus);
}

/* In which the range is one that is asked for: until it is closed, no unmap returns. */
static int open_section(void *arg, uint64_t iova, uint64_t n, int write)
{
    struct pv_bus *bus = arg;
    struct pv_span span;
    bus->ops->enter(bus);
    if (bus->ops->translate(bus, iova, write ? PV_DMA_WRITE : PV_DMA_READ, &span) == PV_REMOTE && span.len >= n)
        return 0;
    bus->ops->leave(bus);
    return -EFAULT;
}

static int ask(void *arg, uint64_t iova, void *buf, uint64_t n, int write)
{
    const struct pv_vfu_remote *remote = arg;
    const uint32_t *cancel = (const uint32_t *)&remote->bus->cancel;
    const struct pv_vfu_gate gate = {open_section, close_section, remote->bus};
    return pv_vfu_dma(remote->channel, iova, buf, n, write, remote->timeout_ns, cancel, &gate);
}

struct pv_vfu_remote *pv_vfu_remote_create(struct pv_bus *bus, struct pv_vfu *channel, uint64_t timeout_ns)
{
    struct pv_vfu_remote *remote = malloc(sizeof(*remote));
    if (!remote)
        return NULL;
    *remote = (struct pv_vfu_remote){pv_bus_get(bus), pv_vfu_get(channel), timeout_ns};
    pv_table_bus_remote(bus, ask, remote);
    return remote;
}

void pv_vfu_remote_destroy(struct pv_vfu_remote *remote)
{
    if (!remote)
        return;
    pv_table_bus_remote(remote->bus, NULL, NULL);
    pv_vfu_put(remote->channel);
    pv_bus_destroy(remote->bus);
    free(remote);
}
