/*
 * A device's access to memory that the peer alone can reach: DMA_READ and DMA_WRITE, asked by an engine's thread.
 *
 * The thread that asks reads the socket until its answer is there: it hands other threads theirs, and queues for Python what
 * is Python's. One of several that wait reads, and hands on when it goes.
 */
#ifndef PVFIO_VFIO_USER_CHANNEL_DMA_H
#define PVFIO_VFIO_USER_CHANNEL_DMA_H

#include <stdint.h>

/* cffi: begin */
struct pv_vfu;

/*
 * Who is asked before each request is sent: 0, or what pv_vfu_dma is to return. What was opened is closed when the request
 * was sent or could not be. Neither waits for anything: they are called with the channel's lock held.
 */
struct pv_vfu_gate {
    int (*open)(void *arg, uint64_t iova, uint64_t n, int write);
    void (*close)(void *arg);
    void *arg;
};

/* The most bytes of data in one request from now on: what the peer said, never more than fits a message. 0: -EINVAL. */
int pv_vfu_transfer_limit(struct pv_vfu *channel, uint64_t bytes);
/*
 * Reads or writes n bytes of the peer's memory, one request after the other. 0: done. -EFAULT: the peer refused, or its
 * reply is not the one to the question (too short, another address). -ETIMEDOUT after timeout_ns. -ECANCELED when *cancel is
 * not 0 (NULL: never; looked at every PV_VFU_CANCEL_NS at least). -ENOTCONN: the connection ended. -ENOMEM. Or what the
 * gate says (NULL: none). A read that fails may have written the parts before it; nothing is written to buf after the return.
 */
#define PV_VFU_CANCEL_NS 5000000
int pv_vfu_dma(struct pv_vfu *channel, uint64_t iova, void *buf, uint64_t n, int write, uint64_t timeout_ns,
               const uint32_t *cancel, const struct pv_vfu_gate *gate);
/* cffi: end */

#endif
