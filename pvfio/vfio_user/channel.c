/* A channel's life, and what it receives: see channel.h. */
#include "channel.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel_private.h"

/* Looking for the next message of a busy peer; after spins in vain, the next 8, 16 .. 256 waits go without. */
#define SPIN_NS 30000
#define MOST_IN_VAIN 6
/* Messages read before the thread looks at anything else: replies that nobody asked for could keep it for ever. */
#define AT_ONCE 64

void vfu_signal(int event_fd)
{
    uint64_t one = 1;
    while (write(event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

void vfu_clear(int event_fd)
{
    uint64_t count;
    while (read(event_fd, &count, sizeof(count)) < 0 && errno == EINTR)
        ;
}

void vfu_arm(struct pv_vfu *ch)
{
    pthread_mutex_lock(&ch->poll_lock);
    uint32_t events = (atomic_load(&ch->waiting) ? 0 : EPOLLIN) | (atomic_load(&ch->backlogged) ? EPOLLOUT : 0);
    if (events != ch->armed) {
        struct epoll_event event = {.events = events};
        epoll_ctl(ch->poll_fd, EPOLL_CTL_MOD, ch->socket, &event);
        ch->armed = events;
    }
    pthread_mutex_unlock(&ch->poll_lock);
}

static int open_fds(struct pv_vfu *ch)
{
    struct epoll_event event = {.events = EPOLLIN};
    ch->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    ch->queued_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ch->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ch->armed = EPOLLIN;
    if (ch->poll_fd < 0 || ch->queued_fd < 0 || ch->wake_fd < 0 ||
        epoll_ctl(ch->poll_fd, EPOLL_CTL_ADD, ch->socket, &event) ||
        epoll_ctl(ch->poll_fd, EPOLL_CTL_ADD, ch->queued_fd, &event))
        return -errno;
    return 0;
}

static void close_own_fds(struct pv_vfu *ch)
{
    const int fds[] = {ch->poll_fd, ch->queued_fd, ch->wake_fd};
    for (unsigned i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
        if (fds[i] >= 0)
            close(fds[i]);
    }
}

static void init_locks(struct pv_vfu *ch)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&ch->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&ch->lock, NULL);
    pthread_mutex_init(&ch->send_lock, NULL);
    pthread_mutex_init(&ch->poll_lock, NULL);
}

struct pv_vfu *pv_vfu_create(int fd, uint32_t max_message, uint32_t max_fds, struct pv_vfu_message *inbox)
{
    if (max_message <= PV_VFU_MIN_MESSAGE || max_fds > PV_VFU_MAX_FDS) {
        errno = EINVAL;
        return NULL;
    }
    struct pv_vfu *ch = calloc(1, sizeof(*ch));
    if (!ch)
        return NULL;
    ch->socket = fd;
    ch->max_message = max_message;
    ch->max_fds = max_fds;
    ch->inbox = inbox;
    atomic_init(&ch->references, 1);
    atomic_init(&ch->max_transfer, max_message - PV_VFU_MIN_MESSAGE);
    int error = open_fds(ch);
    if (error) {
        close_own_fds(ch);
        free(ch);
        errno = -error;
        return NULL;
    }
    init_locks(ch);
    return ch;
}

struct pv_vfu *pv_vfu_get(struct pv_vfu *ch)
{
    atomic_fetch_add(&ch->references, 1);
    return ch;
}

static void free_message(struct pv_vfu *ch, struct pv_vfu_message *message)
{
    if (message && message != ch->inbox)
        free(message);
}

static void drop_received(struct pv_vfu *ch)
{
    for (; ch->queue_count; ch->queue_count--) {
        struct pv_vfu_message *message = ch->queue[ch->queue_head++ % QUEUE_MESSAGES];
        vfu_close_fds(message->fds, message->fd_count);
        free(message);
    }
    vfu_close_fds(ch->fds, ch->fd_count);
    ch->fd_count = 0;
    free_message(ch, ch->target);
    ch->target = NULL;
}

static void end(struct pv_vfu *ch, int code)
{
    if (ch->ended)
        return;
    ch->ended = true;
    ch->end = code;
    vfu_fail_waiters(ch);
    vfu_signal(ch->queued_fd);
}

void pv_vfu_close(struct pv_vfu *ch)
{
    atomic_store(&ch->closed, true);
    shutdown(ch->socket, SHUT_RDWR);
    pthread_mutex_lock(&ch->lock);
    end(ch, -ENOTCONN);
    ch->end = -ENOTCONN;
    drop_received(ch);
    pthread_mutex_unlock(&ch->lock);
}

void pv_vfu_put(struct pv_vfu *ch)
{
    if (!ch || atomic_fetch_sub(&ch->references, 1) != 1)
        return;
    drop_received(ch);
    close_own_fds(ch);
    close(ch->socket);
    free(ch->backlog.bytes);
    pthread_cond_destroy(&ch->changed);
    pthread_mutex_destroy(&ch->lock);
    pthread_mutex_destroy(&ch->send_lock);
    pthread_mutex_destroy(&ch->poll_lock);
    free(ch);
}

int pv_vfu_poll_fd(struct pv_vfu *ch)
{
    return ch->poll_fd;
}

int pv_vfu_socket(struct pv_vfu *ch)
{
    return ch->socket;
}

/* A reply to this side's C goes to its waiter. False: the message is Python's. */
static bool take_reply(struct pv_vfu *ch, struct pv_vfu_message *message)
{
    struct vfio_user_header header;
    memcpy(&header, message, sizeof(header));
    if (!vfu_own_reply(&header))
        return false;
    vfu_reply(ch, message);
    vfu_close_fds(message->fds, message->fd_count);
    free_message(ch, message);
    return true;
}

bool vfu_queue_has_room(const struct pv_vfu *ch)
{
    return ch->queue_count < QUEUE_MESSAGES && ch->queue_bytes < ch->max_message;
}

static size_t bytes_of(const struct pv_vfu_message *message)
{
    return sizeof(*message) + message->size - PV_VFU_HEADER;
}

/* Queues a message for Python. 0, -ENOMEM. */
static int enqueue(struct pv_vfu *ch, struct pv_vfu_message *message)
{
    if (message == ch->inbox) { /* Python began to read it */
        struct pv_vfu_message *copy = malloc(bytes_of(message));
        if (!copy) {
            vfu_close_fds(message->fds, message->fd_count);
            return -ENOMEM;
        }
        message = memcpy(copy, message, bytes_of(message));
    }
    ch->queue[(ch->queue_head + ch->queue_count) % QUEUE_MESSAGES] = message;
    ch->queue_bytes += bytes_of(message);
    if (!ch->queue_count++)
        vfu_signal(ch->queued_fd);
    return 0;
}

void vfu_pump(struct pv_vfu *ch)
{
    for (unsigned i = 0; i < AT_ONCE && !ch->ended && vfu_queue_has_room(ch); i++) {
        struct pv_vfu_message *message;
        int result = vfu_read(ch, false, &message);
        if (result == -EAGAIN)
            return;
        if (result == 1 && !take_reply(ch, message)) {
            result = enqueue(ch, message);
            result = result ? result : 1;
        }
        if (result != 1)
            end(ch, result);
    }
}

static void dequeue(struct pv_vfu *ch)
{
    bool was_full = !vfu_queue_has_room(ch);
    struct pv_vfu_message *message = ch->queue[ch->queue_head];
    ch->queue_head = (ch->queue_head + 1) % QUEUE_MESSAGES;
    ch->queue_bytes -= bytes_of(message);
    if (!--ch->queue_count && !ch->ended)
        vfu_clear(ch->queued_fd);
    memcpy(ch->inbox, message, bytes_of(message));
    free(message);
    if (was_full)
        vfu_wake_leader(ch);
}

/* Under the lock: one message into the inbox, or why not. */
static int receive(struct pv_vfu *ch)
{
    if (ch->queue_count) {
        dequeue(ch);
        return 1;
    }
    for (unsigned i = 0; i < AT_ONCE; i++) {
        if (ch->ended)
            return ch->end;
        struct pv_vfu_message *message;
        int result = vfu_read(ch, true, &message);
        if (result == -EAGAIN)
            return result;
        if (result != 1) {
            end(ch, result);
        } else if (!take_reply(ch, message)) {
            if (message != ch->inbox) { /* a waiter began to read it */
                memcpy(ch->inbox, message, bytes_of(message));
                free(message);
            }
            return 1;
        }
    }
    return -EAGAIN;
}

static int receive_once(struct pv_vfu *ch, uint64_t *recent)
{
    pthread_mutex_lock(&ch->lock);
    int result = receive(ch);
    if (result == 1)
        ch->last_message_ns = vfu_now();
    *recent = ch->last_message_ns;
    pthread_mutex_unlock(&ch->lock);
    return result;
}

/* Looks for a message again and again; not after it was in vain, as where the peer needs this very processor. */
static int spin(struct pv_vfu *ch, uint64_t start)
{
    uint64_t recent;
    int result = -EAGAIN;
    if (ch->spins_to_skip) {
        ch->spins_to_skip--;
        return result;
    }
    while (result == -EAGAIN && vfu_now() - start < SPIN_NS) {
        vfu_relax();
        result = receive_once(ch, &recent);
    }
    if (result != -EAGAIN)
        ch->spins_in_vain = 0;
    else if (ch->spins_in_vain < MOST_IN_VAIN)
        ch->spins_in_vain++;
    ch->spins_to_skip = ch->spins_in_vain ? 4u << ch->spins_in_vain : 0;
    return result;
}

int pv_vfu_receive(struct pv_vfu *ch, uint64_t nap_ns)
{
    uint64_t recent, start;
    if (atomic_load_explicit(&ch->backlogged, memory_order_relaxed))
        pv_vfu_flush(ch);
    int result = receive_once(ch, &recent);
    if (result != -EAGAIN || !nap_ns)
        return result;
    start = vfu_now();
    if (start - recent > PV_VFU_RECENT_NS)
        return result;
    result = spin(ch, start);
    if (result != -EAGAIN)
        return result;
    struct timespec ts = {0, (long)nap_ns};
    struct pollfd fds[] = {{atomic_load(&ch->waiting) ? -1 : ch->socket, POLLIN, 0}, {ch->queued_fd, POLLIN, 0}};
    return ppoll(fds, 2, &ts, NULL) > 0 ? receive_once(ch, &recent) : -EAGAIN;
}
