/* Reads one message from the socket, in whatever pieces it comes: see channel.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "channel_private.h"

/* The most descriptors that one sendmsg carries (Linux, SCM_MAX_FD): so none of them is cut off here. */
#define KERNEL_FDS 253

void vfu_close_fds(const int32_t *fds, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        close(fds[i]);
}

/* Descriptors go to the message that is being read; one too many, and all of them are closed. */
static void take_fds(struct pv_vfu *ch, const int32_t *fds, uint32_t count)
{
    if (!ch->fds_lost && ch->fd_count + count <= ch->max_fds) {
        memcpy(ch->fds + ch->fd_count, fds, count * sizeof(*fds));
        ch->fd_count += count;
        return;
    }
    vfu_close_fds(fds, count);
    vfu_close_fds(ch->fds, ch->fd_count);
    ch->fd_count = 0;
    ch->fds_lost = true;
}

static void take_control(struct pv_vfu *ch, struct msghdr *msg)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        int32_t fds[KERNEL_FDS];
        size_t bytes = c->cmsg_len - CMSG_LEN(0);
        memcpy(fds, CMSG_DATA(c), bytes);
        take_fds(ch, fds, bytes / sizeof(*fds));
    }
    if (msg->msg_flags & MSG_CTRUNC) { /* the process has no descriptor left */
        vfu_close_fds(ch->fds, ch->fd_count);
        ch->fd_count = 0;
        ch->fds_lost = true;
    }
}

/* At most n bytes. How many; 0 at the end; -errno. */
static ssize_t read_bytes(struct pv_vfu *ch, void *to, size_t n)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(KERNEL_FDS * sizeof(int))];
    struct iovec iov = {to, n};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t got;
    do {
        got = recvmsg(ch->socket, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    if (msg.msg_controllen || msg.msg_flags & MSG_CTRUNC)
        take_control(ch, &msg);
    ch->got += got;
    return got;
}

/* The header is complete: where its message goes. 0, -EPROTO, -ENOMEM. */
static int choose_target(struct pv_vfu *ch, bool inbox)
{
    struct vfio_user_header header;
    memcpy(&header, ch->header, sizeof(header));
    if (header.msg_size < PV_VFU_HEADER || header.msg_size > ch->max_message)
        return -EPROTO;
    struct pv_vfu_message *target = ch->inbox;
    if (!inbox || vfu_own_reply(&header))
        target = malloc(sizeof(*target) + header.msg_size - PV_VFU_HEADER);
    if (!target)
        return -ENOMEM;
    memcpy(target, ch->header, PV_VFU_HEADER);
    target->fd_count = 0;
    target->fds_lost = 0;
    ch->target = target;
    return 0;
}

int vfu_read(struct pv_vfu *ch, bool inbox, struct pv_vfu_message **message)
{
    ssize_t got;
    while (ch->got < PV_VFU_HEADER) {
        got = read_bytes(ch, ch->header + ch->got, PV_VFU_HEADER - ch->got);
        if (got <= 0)
            return got == 0 && ch->got ? -ECONNRESET : (int)got;
    }
    if (!ch->target) {
        int error = choose_target(ch, inbox);
        if (error)
            return error;
    }
    while (ch->got < ch->target->size) {
        got = read_bytes(ch, ch->target->body + (ch->got - PV_VFU_HEADER), ch->target->size - ch->got);
        if (got <= 0)
            return got == 0 ? -ECONNRESET : (int)got;
    }
    *message = ch->target;
    memcpy((*message)->fds, ch->fds, ch->fd_count * sizeof(*ch->fds));
    (*message)->fd_count = ch->fd_count;
    (*message)->fds_lost = ch->fds_lost;
    ch->target = NULL;
    ch->got = 0;
    ch->fd_count = 0;
    ch->fds_lost = false;
    return 1;
}
