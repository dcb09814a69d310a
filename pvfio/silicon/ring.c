/*
 * Eventfds of others (see ring.h).
 *
 * Whether a write blocks is the file's flag, which everybody who shares it may change, also between a look at the counter
 * and the write. So a bell has the kernel ring: an asynchronous read of nothing, which is over when it was submitted, and
 * whose end the kernel tells the eventfd as it tells of interrupts, without ever waiting. Where there is no asynchronous
 * I/O (a sandbox), and for eventfds of this process, room is looked for first: an owner who makes the file blocking and
 * fills it in between can keep the thread.
 */
#include "ring.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bus.h"

#define COMPLETIONS_MAGIC 0xa10a10a1u

/* Where the kernel puts completions, at the address that names the context (Linux fs/aio.c, struct aio_ring). */
struct completions {
    uint32_t id, count, head, tail, magic;
};

struct pv_bell {
    aio_context_t context;
    int nothing; /* a file without bytes */
};

static struct completions *completions_of(const struct pv_bell *bell)
{
    return (struct completions *)(uintptr_t)bell->context;
}

struct pv_bell *pv_bell_create(void)
{
    struct pv_bell *bell = calloc(1, sizeof(*bell));
    if (!bell)
        return NULL;
    bell->nothing = memfd_create("pvfio-bell", MFD_CLOEXEC);
    if (bell->nothing >= 0 && !syscall(SYS_io_setup, 1, &bell->context)) {
        if (completions_of(bell)->magic == COMPLETIONS_MAGIC)
            return bell;
        syscall(SYS_io_destroy, bell->context);
    }
    if (bell->nothing >= 0)
        close(bell->nothing);
    free(bell);
    return NULL;
}

void pv_bell_destroy(struct pv_bell *bell)
{
    if (!bell)
        return;
    syscall(SYS_io_destroy, bell->context);
    close(bell->nothing);
    free(bell);
}

int pv_bell_ring(struct pv_bell *bell, int eventfd)
{
    struct iocb nothing = {
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)bell->nothing,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)eventfd,
    };
    struct iocb *requests[] = {&nothing};
    struct completions *completions = completions_of(bell);
    if (syscall(SYS_io_submit, bell->context, 1L, requests) != 1)
        return -EFAULT;
    uint32_t tail = __atomic_load_n(&completions->tail, __ATOMIC_ACQUIRE);
    __atomic_store_n(&completions->head, tail, __ATOMIC_RELEASE);
    return 0;
}

int pv_ring(int eventfd)
{
    struct pollfd ready = {.fd = eventfd, .events = POLLOUT};
    if (poll(&ready, 1, 0) >= 0 && !(ready.revents & POLLOUT)) /* full, or one that overflowed */
        return 0;
    return eventfd_write(eventfd, 1) ? -EFAULT : 0;
}

int pv_is_eventfd(int fd)
{
    static const char wanted[] = "anon_inode:[eventfd]";
    char path[32], name[sizeof(wanted)];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t n = fd < 0 ? -1 : readlink(path, name, sizeof(name));
    return n == (ssize_t)sizeof(wanted) - 1 && !memcmp(name, wanted, (size_t)n);
}
