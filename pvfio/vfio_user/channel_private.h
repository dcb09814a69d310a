/* What the parts of a channel share. */
#ifndef PVFIO_VFIO_USER_CHANNEL_PRIVATE_H
#define PVFIO_VFIO_USER_CHANNEL_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "abi/abi.h"
#include "channel.h"

#define QUEUE_MESSAGES 256

/* A request of this side's C, on the stack of the thread that waits for its reply. Guarded by the channel's lock. */
struct waiter {
    struct waiter *next;
    uint16_t id;
    uint16_t command;
    bool sent, done;
    int result;
    uint64_t iova, size;
    uint8_t *buf; /* DMA_READ: where the data goes */
};

/* Bytes accepted and not yet sent. */
struct backlog {
    uint8_t *bytes;
    uint64_t head, len, capacity;
};

struct pv_vfu {
    int socket, poll_fd;
    int queued_fd; /* readable while the queue holds messages, or the end was seen by a waiter */
    int wake_fd;   /* wakes the waiter that polls */
    uint32_t max_message, max_fds;
    _Atomic uint32_t references;
    _Atomic bool closed;
    _Atomic uint64_t max_transfer;

    pthread_mutex_t lock; /* of all that follows, to the blank line; held for short, never while something is waited for */
    pthread_cond_t changed; /* a waiter is done, nobody polls, the end came */
    struct pv_vfu_message *inbox;
    uint32_t got; /* bytes of the message that is being read, its header included */
    uint8_t header[PV_VFU_HEADER];
    struct pv_vfu_message *target; /* the message that is being read, once its header is there: the inbox, or on the heap */
    int32_t fds[PV_VFU_MAX_FDS];
    uint32_t fd_count;
    bool fds_lost;
    struct pv_vfu_message *queue[QUEUE_MESSAGES]; /* a ring of heap messages */
    uint32_t queue_head, queue_count;
    uint64_t queue_bytes;
    bool ended;
    int end; /* what pv_vfu_receive says once the queue is empty */
    struct waiter *waiters;
    struct waiter *leader; /* the one that reads the socket */
    bool polling;          /* the leader is in poll */
    uint16_t next_id;
    uint64_t last_message_ns;
    uint32_t spins_to_skip, spins_in_vain; /* of whoever receives for Python, without the lock */

    pthread_mutex_t send_lock; /* of the backlog and the order of what is sent; taken inside of `lock` */
    struct backlog backlog;
    int send_error;

    pthread_mutex_t poll_lock; /* of `armed`; taken inside of the others */
    uint32_t armed;
    _Atomic uint32_t waiting;  /* number of waiters: while there are any, poll_fd does not tell of the socket's input */
    _Atomic bool backlogged;   /* poll_fd tells when the socket has room */
};

static inline uint64_t vfu_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void vfu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    for (int i = 0; i < 8; i++)
        __builtin_ia32_pause();
#endif
}

/* A reply to a request of this side's C. */
static inline bool vfu_own_reply(const struct vfio_user_header *header)
{
    return (header->flags & VFIO_USER_F_TYPE_MASK) == VFIO_USER_F_TYPE_REPLY && header->msg_id & PV_VFU_OWN_ID;
}

void vfu_close_fds(const int32_t *fds, uint32_t count);
/*
 * Under the lock: goes on with the message that is being read. 1: complete, *message is it; 0: the end; -EAGAIN, -errno.
 * `inbox`: a new message may go there.
 */
int vfu_read(struct pv_vfu *ch, bool inbox, struct pv_vfu_message **message);
/* Makes poll_fd tell what `waiting` and `backlogged` ask for. */
void vfu_arm(struct pv_vfu *ch);
void vfu_signal(int event_fd);
void vfu_clear(int event_fd);
/* Reads what there is, up to a number of messages and the queue's room: for the waiters, or into the queue. */
void vfu_pump(struct pv_vfu *ch);
/* Whether the queue takes another message. */
bool vfu_queue_has_room(const struct pv_vfu *ch);
/* A reply to one of the waiters' requests: it is done. Under the lock. */
void vfu_reply(struct pv_vfu *ch, const struct pv_vfu_message *reply);
/* Every waiter is done: the connection ended. Under the lock. */
void vfu_fail_waiters(struct pv_vfu *ch);
/* Wakes the waiter that polls, if any. Under the lock. */
void vfu_wake_leader(struct pv_vfu *ch);

#endif
