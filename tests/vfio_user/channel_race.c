/*
 * A channel under everything at once: engines that read and write the peer's memory, some with little patience or
 * cancelled, one thread that receives and replies as Python does, a peer that answers late, out of order or with an error,
 * asks for things itself and sends descriptors, and a close or a hang-up in the middle. No answer goes to the wrong
 * question, the peer's requests arrive in order, every thread comes home, no descriptor is left.
 * Argument: milliseconds.
 */
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "abi/abi.h"
#include "c_program.h"
#include "vfio_user/channel.h"
#include "vfio_user/channel_dma.h"

#define ENGINES 3
#define MAX_MESSAGE 8192
#define HELD 8
#define PATIENCE_NS 20000000000ull

struct round {
    struct pv_vfu *channel;
    int peer;
    struct pv_vfu_message *inbox;
    uint64_t seed;
    _Atomic int hang_up; /* the peer is to go */
    _Atomic uint64_t done, failed;
};

struct engine {
    struct round *round;
    struct pv_vfu *channel; /* a reference of its own */
    uint64_t seed;
    uint32_t cancel;
};

/* What is at an address of the peer's memory. */
static uint8_t byte_at(uint64_t iova)
{
    return (uint8_t)(iova * 31 + (iova >> 8));
}

static void engine_step(struct engine *e)
{
    uint8_t buf[3 * MAX_MESSAGE];
    uint64_t r = next_random(&e->seed), n = 1 + r % sizeof(buf), iova = r >> 20;
    int write = r >> 60 & 1, hasty = !(r >> 61 & 7);
    for (uint64_t i = 0; i < n; i++)
        buf[i] = write ? byte_at(iova + i) : 0;
    int result = pv_vfu_dma(e->channel, iova, buf, n, write, hasty ? r >> 32 & 0xffff : PATIENCE_NS, &e->cancel,
                            NULL);
    CHECK(!result || result == -EFAULT || result == -ENOTCONN || result == -ECANCELED ||
          (hasty && result == -ETIMEDOUT));
    for (uint64_t i = 0; i < n && !result; i++)
        CHECK(buf[i] == byte_at(iova + i));
    atomic_fetch_add(result ? &e->round->failed : &e->round->done, 1);
    if (result == -ENOTCONN)
        __atomic_store_n(&e->cancel, 2, __ATOMIC_RELEASE);
}

static void *run_engine(void *arg)
{
    struct engine *e = arg;
    while (__atomic_load_n(&e->cancel, __ATOMIC_ACQUIRE) != 2)
        engine_step(e);
    pv_vfu_put(e->channel);
    return NULL;
}

/* As Python: sleeps on the one descriptor, takes what there is, replies to each. */
static void *run_receiver(void *arg)
{
    struct round *round = arg;
    uint64_t next = 0;
    for (;;) {
        int result = pv_vfu_receive(round->channel, next & 1 ? 20000 : 0);
        if (result == -EAGAIN) {
            struct pollfd fd = {pv_vfu_poll_fd(round->channel), POLLIN, 0};
            CHECK(poll(&fd, 1, 20000) == 1);
            continue;
        }
        if (result != 1)
            return NULL;
        const struct pv_vfu_message *m = round->inbox;
        uint64_t number;
        CHECK(m->size == 24 && !m->fds_lost && m->fd_count == (m->id == 7));
        memcpy(&number, m->body, 8);
        CHECK(number == next++);
        for (uint32_t i = 0; i < m->fd_count; i++)
            close(m->fds[i]);
        pv_vfu_send(round->channel, m->id, m->command, VFIO_USER_F_TYPE_REPLY, 0, m->body, 8, NULL, 0, NULL, 0);
    }
}

static int peer_read(int fd, void *to, size_t n)
{
    for (size_t got = 0; got < n;) {
        ssize_t more = recv(fd, (char *)to + got, n - got, 0);
        if (more <= 0)
            return -1;
        got += (size_t)more;
    }
    return 0;
}

struct question {
    struct vfio_user_header header;
    struct vfio_user_dma_region_access access;
};

static void answer(int fd, const struct question *q, uint64_t r)
{
    uint8_t reply[MAX_MESSAGE];
    struct question a = *q;
    int refuse = !(r & 15), write = q->header.cmd == VFIO_USER_DMA_WRITE;
    uint64_t data = refuse || write ? 0 : q->access.count;
    a.header.flags = VFIO_USER_F_TYPE_REPLY | (refuse ? VFIO_USER_F_ERROR : 0);
    a.header.error_no = refuse ? EFAULT : 0;
    a.header.msg_size = (uint32_t)(refuse ? sizeof(a.header) : sizeof(a) + data);
    memcpy(reply, &a, sizeof(a));
    for (uint64_t i = 0; i < data; i++)
        reply[sizeof(a) + i] = byte_at(q->access.addr + i);
    for (uint32_t sent = 0, cut = r >> 8 & 63; sent < a.header.msg_size;) {
        uint32_t part = sent ? a.header.msg_size - sent : cut && cut < a.header.msg_size ? cut : a.header.msg_size;
        ssize_t n = send(fd, reply + sent, part, MSG_NOSIGNAL);
        if (n <= 0)
            return;
        sent += (uint32_t)n;
    }
}

/* A request of the peer's own; every eighth has a descriptor. */
static void ask(int fd, uint64_t number)
{
    struct {
        struct vfio_user_header header;
        uint64_t number;
    } request = {{number % 8, VFIO_USER_REGION_WRITE, 24, 0, 0}, number};
    struct iovec iov = {&request, sizeof(request)};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    int null = 2;
    memcpy(CMSG_DATA(&control.header), &null, sizeof(null));
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (number % 8 == 7) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control.bytes);
    }
    sendmsg(fd, &msg, MSG_NOSIGNAL);
}

/* Holds questions back and answers them in another order; asks something itself now and then. */
static void *run_peer(void *arg)
{
    struct round *round = arg;
    uint64_t seed = round->seed | 1, number = 0;
    struct question held[HELD];
    unsigned count = 0;
    static _Thread_local uint8_t data[MAX_MESSAGE];
    while (!atomic_load(&round->hang_up)) {
        uint64_t r = next_random(&seed);
        struct pollfd fd = {round->peer, POLLIN, 0};
        if (count < HELD && poll(&fd, 1, count ? 0 : 1)) {
            struct question *q = &held[count];
            if (peer_read(round->peer, &q->header, sizeof(q->header)) || q->header.msg_size > MAX_MESSAGE ||
                peer_read(round->peer, data, q->header.msg_size - sizeof(q->header)))
                break;
            if (q->header.flags & VFIO_USER_F_TYPE_REPLY)
                continue;
            memcpy(&q->access, data, sizeof(q->access));
            bool write = q->header.cmd == VFIO_USER_DMA_WRITE;
            for (uint64_t i = 0; i < q->access.count && write; i++)
                CHECK(data[sizeof(q->access) + i] == byte_at(q->access.addr + i));
            count++;
        } else if (count && r & 3) {
            unsigned i = r % count;
            answer(round->peer, &held[i], r >> 8);
            held[i] = held[--count];
        } else {
            ask(round->peer, number++);
        }
    }
    close(round->peer);
    return NULL;
}

static void play(uint64_t seed, uint64_t ns, uint64_t *done, uint64_t *failed)
{
    struct round round = {.seed = seed};
    struct engine engines[ENGINES];
    pthread_t receiver, peer, threads[ENGINES];
    int pair[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    round.inbox = malloc(sizeof(*round.inbox) + MAX_MESSAGE);
    round.channel = pv_vfu_create(pair[0], MAX_MESSAGE, 4, round.inbox);
    round.peer = pair[1];
    CHECK(round.channel);
    CHECK(!pthread_create(&peer, NULL, run_peer, &round));
    CHECK(!pthread_create(&receiver, NULL, run_receiver, &round));
    for (unsigned i = 0; i < ENGINES; i++) {
        engines[i] = (struct engine){&round, pv_vfu_get(round.channel), next_random(&seed), 0};
        CHECK(!pthread_create(&threads[i], NULL, run_engine, &engines[i]));
    }
    for (uint64_t until = now_ns() + ns; now_ns() < until;) {
        uint32_t on = 1, *cancel = &engines[next_random(&seed) % ENGINES].cancel, off = 0;
        usleep(500);
        __atomic_compare_exchange_n(cancel, &off, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
        usleep(500);
        __atomic_compare_exchange_n(cancel, &on, 0, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    if (seed & 1)
        pv_vfu_close(round.channel);
    else
        atomic_store(&round.hang_up, 1);
    for (unsigned i = 0; i < ENGINES; i++)
        pthread_join(threads[i], NULL);
    pthread_join(receiver, NULL);
    pv_vfu_close(round.channel);
    pv_vfu_put(round.channel);
    pthread_join(peer, NULL);
    free(round.inbox);
    *done += atomic_load(&round.done);
    *failed += atomic_load(&round.failed);
}

static unsigned open_fds(void)
{
    unsigned count = 0;
    DIR *dir = opendir("/proc/self/fd");
    CHECK(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

int main(int argc, char **argv)
{
    uint64_t ns = (argc > 1 ? strtoull(argv[1], NULL, 0) : 1000) * 1000000, seed = 88172645463325252u;
    uint64_t until = now_ns() + ns, rounds = 0, done = 0, failed = 0;
    unsigned fds = open_fds();
    do {
        play(next_random(&seed), ns / 20, &done, &failed);
        rounds++;
        CHECK(done || now_ns() < until + PATIENCE_NS);
    } while (now_ns() < until || !done);
    CHECK(open_fds() == fds);
    printf("%lu rounds, %lu transfers, %lu failed\n", (unsigned long)rounds, (unsigned long)done, (unsigned long)failed);
    return 0;
}
