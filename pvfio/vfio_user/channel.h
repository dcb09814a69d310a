/*
 * One end of a vfio-user connection: messages on a stream socket, with their file descriptors.
 *
 * Both ends send requests and replies over one socket, and there is no reader thread: whoever waits, reads. Python waits
 * for messages through an epoll descriptor. While an engine's thread waits for the answer to a request of its own
 * (DMA_READ, DMA_WRITE), that thread reads the socket; what is not for it is queued, and Python is told. Replies whose
 * id has PV_VFU_OWN_ID set belong to such requests and never reach Python.
 *
 * A header is read as 16 bytes and then exactly its body: so descriptors belong to the message whose bytes carried them.
 * A message has at most the size and descriptors said at creation; nothing a peer sends makes the queue or the backlog
 * grow beyond their bounds.
 *
 * Not modelled: twin sockets, other transports, the meaning of any message but DMA_READ and DMA_WRITE.
 */
#ifndef PVFIO_VFIO_USER_CHANNEL_H
#define PVFIO_VFIO_USER_CHANNEL_H

#include <stdint.h>

/* cffi: begin */
#define PV_VFU_HEADER 16
#define PV_VFU_MAX_FDS 64
#define PV_VFU_MIN_MESSAGE 32
#define PV_VFU_OWN_ID 0x8000

struct pv_vfu;

/* Where received messages are put, one at a time. The first four words are the header's. */
struct pv_vfu_message {
    uint16_t id;
    uint16_t command;
    uint32_t size;
    uint32_t flags;
    uint32_t error;
    uint32_t fd_count;
    uint32_t fds_lost; /* not 0: more descriptors came than are taken (or than the process may open); all are closed */
    int32_t fds[64];
    uint8_t body[];
};

/*
 * Takes over `fd`, a connected stream socket. `inbox` has room for a body of max_message - PV_VFU_HEADER bytes, is written by
 * pv_vfu_receive and until pv_vfu_close returns. NULL with errno: EINVAL (max_message not over PV_VFU_MIN_MESSAGE, max_fds over PV_VFU_MAX_FDS),
 * ENOMEM, EMFILE; then fd stays the caller's.
 */
struct pv_vfu *pv_vfu_create(int fd, uint32_t max_message, uint32_t max_fds, struct pv_vfu_message *inbox);
struct pv_vfu *pv_vfu_get(struct pv_vfu *channel);
/* Drops a reference; the last one closes the socket and frees the channel. */
void pv_vfu_put(struct pv_vfu *channel);
/* Shuts the socket down: every wait ends with -ENOTCONN, what was not received is dropped with its descriptors. */
void pv_vfu_close(struct pv_vfu *channel);
/* Readable when pv_vfu_receive has something to do. The channel's own, do not close. */
int pv_vfu_poll_fd(struct pv_vfu *channel);
int pv_vfu_socket(struct pv_vfu *channel);

/*
 * One message into the inbox, from one thread at a time. 1: it is there, and its descriptors are the caller's. 0: the peer
 * has closed between two messages. -EAGAIN: none yet. -ECONNRESET: the end came inside a message. -EPROTO: a size that
 * cannot be. -ENOMEM. -ENOTCONN: closed here. All but 1 and -EAGAIN are final. With nap_ns (below a second), and when a
 * message came in the last PV_VFU_RECENT_NS, it looks for the next one for 30 us, if that helped of late, then sleeps for it.
 */
#define PV_VFU_RECENT_NS 250000
int pv_vfu_receive(struct pv_vfu *channel, uint64_t nap_ns);

/*
 * One message, its body in two parts; never blocks, from any thread. 0: sent. 1: accepted, a part waits in the backlog
 * until the socket has room. -EAGAIN: not accepted, the backlog is full, or it has descriptors and the socket no room.
 * -EINVAL: too long, too many descriptors. -EPIPE: the peer is gone. -ENOTCONN: closed here. Or what sendmsg says.
 */
int pv_vfu_send(struct pv_vfu *channel, uint16_t id, uint16_t command, uint32_t flags, uint32_t error, const void *body,
                uint64_t body_size, const void *data, uint64_t data_size, const int32_t *fds, uint32_t fd_count);
/* Sends what waits in the backlog. 0: nothing waits. -EAGAIN: something still does. Otherwise as pv_vfu_send. */
int pv_vfu_flush(struct pv_vfu *channel);
/* cffi: end */

#endif
