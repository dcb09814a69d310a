/*
 * Eventfds of others (see ring.h).
 *
 * Whether a write blocks is the file's flag, which everybody who shares it may change; so room is looked for first. Not
 * prevented: the other side fills the counter between the look and the write, and has made the file blocking.
 */
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "bus.h"

int pv_ring(int eventfd)
{
    struct pollfd ready = {.fd = eventfd, .events = POLLOUT};
    if (poll(&ready, 1, 0) == 0)
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
