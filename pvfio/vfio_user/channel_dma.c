/* DMA_READ and DMA_WRITE: see channel_dma.h. */
#include "channel_dma.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#include "channel_private.h"

#define SPIN_NS 20000
#define ACCESS sizeof(struct vfio_user_dma_region_access)

/* When to give up, and who is asked first. */
struct patience {
    uint64_t until;
    const uint32_t *cancel;
    const struct pv_vfu_gate *gate;
};

int pv_vfu_transfer_limit(struct pv_vfu *ch, uint64_t bytes)
{
    uint64_t most = ch->max_message - PV_VFU_MIN_MESSAGE;
    if (!bytes)
        return -EINVAL;
    atomic_store(&ch->max_transfer, bytes < most ? bytes : most);
    return 0;
}

void vfu_wake_leader(struct pv_vfu *ch)
{
    if (ch->polling)
        vfu_signal(ch->wake_fd);
}

static void finish(struct pv_vfu *ch, struct waiter *w, int result)
{
    w->result = result;
    w->done = true;
    pthread_cond_broadcast(&ch->changed);
    if (w == ch->leader)
        vfu_wake_leader(ch);
}

void vfu_fail_waiters(struct pv_vfu *ch)
{
    for (struct waiter *w = ch->waiters; w; w = w->next) {
        if (!w->done)
            finish(ch, w, -ENOTCONN);
    }
}

/*
 * A reply repeats address and count, and a read's has the data behind them: so answers QEMU 11.1. QEMU 10.1 has a count of
 * 32 bits (hw/vfio-user/protocol.h, VFIOUserDMARW): it takes and gives data four bytes too early, and answers a write with a
 * header alone. That is refused, for the wrong bytes moved.
 */
static int take(const struct waiter *w, const struct pv_vfu_message *reply)
{
    struct vfio_user_dma_region_access access;
    uint64_t size = reply->size - PV_VFU_HEADER, data = w->buf ? w->size : 0;
    if (reply->flags & VFIO_USER_F_ERROR || reply->command != w->command)
        return -EFAULT;
    if (size != ACCESS + data)
        return -EFAULT;
    memcpy(&access, reply->body, ACCESS);
    if (access.addr != w->iova || access.count != w->size)
        return -EFAULT;
    if (data)
        memcpy(w->buf, reply->body + ACCESS, data);
    return 0;
}

/* Nobody's: the answer to a question that was given up, or to none. */
void vfu_reply(struct pv_vfu *ch, const struct pv_vfu_message *reply)
{
    for (struct waiter *w = ch->waiters; w; w = w->next) {
        if (w->id == reply->id && w->sent && !w->done) {
            finish(ch, w, take(w, reply));
            return;
        }
    }
}

static void add_waiter(struct pv_vfu *ch, struct waiter *w)
{
    const struct waiter *other = ch->waiters;
    do {
        w->id = PV_VFU_OWN_ID | ch->next_id++;
        for (other = ch->waiters; other && other->id != w->id; other = other->next)
            ;
    } while (other);
    w->next = ch->waiters;
    ch->waiters = w;
    if (!atomic_fetch_add(&ch->waiting, 1))
        vfu_arm(ch);
}

static void remove_waiter(struct pv_vfu *ch, struct waiter *w)
{
    struct waiter **at = &ch->waiters;
    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    if (ch->leader == w) {
        ch->leader = NULL;
        pthread_cond_broadcast(&ch->changed);
    }
    if (atomic_fetch_sub(&ch->waiting, 1) == 1)
        vfu_arm(ch);
}

static uint64_t nap(const struct patience *patience, uint64_t now)
{
    uint64_t left = patience->until > now ? patience->until - now : 0;
    return left < PV_VFU_CANCEL_NS ? left : PV_VFU_CANCEL_NS;
}

/* Another waiter reads: until it is done, goes, or hands this one its answer. */
static void follow(struct pv_vfu *ch, uint64_t ns)
{
    uint64_t until = vfu_now() + ns;
    struct timespec ts = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&ch->changed, &ch->lock, &ts);
}

/* Without the lock: until the socket, or somebody who has news for the leader. */
static void sleep_for_news(struct pv_vfu *ch, bool input, bool output, uint64_t ns)
{
    struct timespec ts = {0, (long)ns};
    int socket = input || output ? ch->socket : -1; /* or a peer that has gone would wake it all the time */
    struct pollfd fds[] = {
        {socket, (short)((input ? POLLIN : 0) | (output ? POLLOUT : 0)), 0},
        {ch->wake_fd, POLLIN, 0},
    };
    if (ppoll(fds, 2, &ts, NULL) > 0 && fds[1].revents)
        vfu_clear(ch->wake_fd);
}

static void lead(struct pv_vfu *ch, const struct waiter *w, uint64_t spin_until, const struct patience *patience)
{
    vfu_pump(ch);
    if (w->done || ch->ended)
        return;
    uint64_t now = vfu_now();
    bool input = vfu_queue_has_room(ch), output = !w->sent || atomic_load(&ch->backlogged);
    bool spin = now < spin_until && input;
    ch->polling = !spin;
    pthread_mutex_unlock(&ch->lock);
    if (spin)
        vfu_relax();
    else
        sleep_for_news(ch, input, output, nap(patience, now));
    if (atomic_load(&ch->backlogged))
        pv_vfu_flush(ch);
    pthread_mutex_lock(&ch->lock);
    ch->polling = false;
}

static int ask(struct pv_vfu *ch, struct waiter *w, const void *data, const struct pv_vfu_gate *gate)
{
    const struct vfio_user_dma_region_access access = {.addr = w->iova, .count = w->size};
    int result = gate ? gate->open(gate->arg, w->iova, w->size, data != NULL) : 0;
    if (result)
        return result;
    result = pv_vfu_send(ch, w->id, w->command, VFIO_USER_F_TYPE_COMMAND, 0, &access, ACCESS, data, data ? w->size : 0,
                         NULL, 0);
    if (gate)
        gate->close(gate->arg);
    w->sent = result >= 0;
    return result == -EPIPE ? -ENOTCONN : result == -EAGAIN || w->sent ? 0 : result;
}

/* 0: go on waiting. */
static int give_up(const struct pv_vfu *ch, const struct patience *patience)
{
    if (ch->ended)
        return -ENOTCONN;
    if (patience->cancel && __atomic_load_n(patience->cancel, __ATOMIC_ACQUIRE))
        return -ECANCELED;
    return vfu_now() >= patience->until ? -ETIMEDOUT : 0;
}

static int transact(struct pv_vfu *ch, struct waiter *w, const void *data, const struct patience *patience)
{
    pthread_mutex_lock(&ch->lock);
    add_waiter(ch, w);
    uint64_t spin_until = vfu_now() + SPIN_NS;
    while (!w->done) {
        int result = give_up(ch, patience);
        if (!result && !w->sent)
            result = ask(ch, w, data, patience->gate);
        if (result) {
            w->result = result;
            break;
        }
        if (!ch->leader)
            ch->leader = w;
        if (ch->leader == w)
            lead(ch, w, spin_until, patience);
        else
            follow(ch, nap(patience, vfu_now()));
    }
    remove_waiter(ch, w);
    pthread_mutex_unlock(&ch->lock);
    return w->result;
}

int pv_vfu_dma(struct pv_vfu *ch, uint64_t iova, void *buf, uint64_t n, int write, uint64_t timeout_ns,
               const uint32_t *cancel, const struct pv_vfu_gate *gate)
{
    const struct patience patience = {vfu_now() + timeout_ns, cancel, gate};
    uint64_t most = atomic_load(&ch->max_transfer);
    int result = 0;
    pv_vfu_get(ch);
    for (uint64_t done = 0; done < n && !result;) {
        uint8_t *at = (uint8_t *)buf + done;
        uint64_t size = n - done < most ? n - done : most;
        struct waiter w = {
            .command = write ? VFIO_USER_DMA_WRITE : VFIO_USER_DMA_READ,
            .iova = iova + done,
            .size = size,
            .buf = write ? NULL : at,
        };
        result = transact(ch, &w, write ? at : NULL, &patience);
        done += size;
    }
    pv_vfu_put(ch);
    return result;
}
