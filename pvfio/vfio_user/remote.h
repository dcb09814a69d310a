/*
 * Memory without a descriptor, behind a bus: the remote ranges of a table bus (bus.h) are asked of a channel's peer.
 *
 * A request goes out while the range is mapped, however long ago its bytes were made: the peer reads it before the answer to
 * an unmap of the range, or there is none. As everywhere, where the range is mapped anew meanwhile, the new one is used.
 *
 * Not modelled: more than one channel per bus.
 */
#ifndef PVFIO_VFIO_USER_REMOTE_H
#define PVFIO_VFIO_USER_REMOTE_H

#include <stdint.h>

/* cffi: begin */
struct pv_bus;
struct pv_vfu;
struct pv_vfu_remote;

/*
 * From now on the bus asks the channel's peer, and waits for at most timeout_ns, or until the bus is cancelled (what
 * pv_vfu_dma says). Holds a reference of both. NULL: no memory.
 */
struct pv_vfu_remote *pv_vfu_remote_create(struct pv_bus *bus, struct pv_vfu *channel, uint64_t timeout_ns);
/* The bus asks nobody any more. Waits for who is waiting: close the channel, or cancel the bus, before. */
void pv_vfu_remote_destroy(struct pv_vfu_remote *remote);
/* cffi: end */

#endif
