/* What a channel sends: see channel.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "channel.h"
#include "channel_private.h"

/* The backlog takes whole messages up to this, and the rest of one that the socket took in part. */
#define BACKLOG_BYTES (256 << 10)

static int send_error(int error)
{
    if (error == EAGAIN || error == EWOULDBLOCK)
        return -EAGAIN;
    return error == ECONNRESET || error == ENOTCONN ? -EPIPE : -error;
}

/* How many bytes went; -errno. */
static ssize_t send_iov(struct pv_vfu *ch, struct iovec *iov, unsigned parts, const int32_t *fds, uint32_t fd_count)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(PV_VFU_MAX_FDS * sizeof(int))];
    } control;
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = parts};
    if (fd_count) {
        memset(&control, 0, sizeof(control));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(&control.header), fds, fd_count * sizeof(int));
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
    }
    ssize_t sent;
    do {
        sent = sendmsg(ch->socket, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? send_error(errno) : sent;
}

static void set_backlogged(struct pv_vfu *ch)
{
    bool waits = ch->backlog.len != 0;
    if (waits != atomic_load(&ch->backlogged)) {
        atomic_store(&ch->backlogged, waits);
        vfu_arm(ch);
    }
}

/* 0, -EAGAIN, or why nothing will be sent any more. */
static int flush_backlog(struct pv_vfu *ch)
{
    struct backlog *b = &ch->backlog;
    while (b->len) {
        struct iovec iov = {b->bytes + b->head, b->len};
        ssize_t sent = send_iov(ch, &iov, 1, NULL, 0);
        if (sent == -EAGAIN)
            return -EAGAIN;
        if (sent < 0) { /* the stream is broken in the middle of a message */
            ch->send_error = (int)sent;
            b->len = 0;
            break;
        }
        b->head += sent;
        b->len -= sent;
    }
    free(b->bytes);
    *b = (struct backlog){0};
    set_backlogged(ch);
    return ch->send_error;
}

static int backlog_reserve(struct backlog *b, uint64_t n)
{
    if (b->head + b->len + n <= b->capacity)
        return 0;
    uint64_t capacity = b->len + n > 4096 ? b->len + n + b->len / 2 : 4096;
    uint8_t *bytes = malloc(capacity);
    if (!bytes)
        return -ENOMEM;
    if (b->len)
        memcpy(bytes, b->bytes + b->head, b->len);
    free(b->bytes);
    *b = (struct backlog){bytes, 0, b->len, capacity};
    return 0;
}

/* What is left of the parts after `skip` bytes. */
static void backlog_add(struct backlog *b, const struct iovec *iov, unsigned parts, uint64_t skip)
{
    for (unsigned i = 0; i < parts; i++) {
        uint64_t gone = skip < iov[i].iov_len ? skip : iov[i].iov_len;
        uint64_t left = iov[i].iov_len - gone;
        if (left)
            memcpy(b->bytes + b->head + b->len, (const uint8_t *)iov[i].iov_base + gone, left);
        b->len += left;
        skip -= gone;
    }
}

/* A message, or the rest of one: 1, or -ENOMEM; half a message that cannot be kept breaks the stream. */
static int keep(struct pv_vfu *ch, const struct iovec *iov, unsigned parts, uint64_t size, uint64_t skip)
{
    if (backlog_reserve(&ch->backlog, size - skip)) {
        if (skip) {
            ch->send_error = -EPIPE;
            shutdown(ch->socket, SHUT_WR);
        }
        return -ENOMEM;
    }
    backlog_add(&ch->backlog, iov, parts, skip);
    set_backlogged(ch);
    return 1;
}

static int send_locked(struct pv_vfu *ch, struct iovec *iov, unsigned parts, uint64_t size, const int32_t *fds,
                       uint32_t fd_count)
{
    if (atomic_load(&ch->closed))
        return -ENOTCONN;
    int error = ch->send_error ? ch->send_error : ch->backlog.len ? flush_backlog(ch) : 0;
    ssize_t sent = error ? error : send_iov(ch, iov, parts, fds, fd_count);
    if (sent == -EAGAIN && !fd_count && ch->backlog.len + size <= BACKLOG_BYTES)
        sent = 0;
    if (sent < 0)
        return (int)sent;
    return (uint64_t)sent == size ? 0 : keep(ch, iov, parts, size, (uint64_t)sent);
}

int pv_vfu_send(struct pv_vfu *ch, uint16_t id, uint16_t command, uint32_t flags, uint32_t error, const void *body,
                uint64_t body_size, const void *data, uint64_t data_size, const int32_t *fds, uint32_t fd_count)
{
    if (body_size > UINT32_MAX / 2 || data_size > UINT32_MAX / 2 - PV_VFU_HEADER || fd_count > PV_VFU_MAX_FDS)
        return -EINVAL;
    uint64_t size = PV_VFU_HEADER + body_size + data_size;
    struct vfio_user_header header = {id, command, (uint32_t)size, flags, error};
    struct iovec iov[3] = {{&header, sizeof(header)}, {(void *)body, body_size}, {(void *)data, data_size}};
    pthread_mutex_lock(&ch->send_lock);
    int result = send_locked(ch, iov, data_size ? 3 : body_size ? 2 : 1, size, fds, fd_count);
    pthread_mutex_unlock(&ch->send_lock);
    return result;
}

int pv_vfu_flush(struct pv_vfu *ch)
{
    pthread_mutex_lock(&ch->send_lock);
    int result = atomic_load(&ch->closed) ? -ENOTCONN : ch->send_error ? ch->send_error : flush_backlog(ch);
    pthread_mutex_unlock(&ch->send_lock);
    return result;
}
