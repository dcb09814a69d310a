/*
 * Round trips over a Unix socket. As a program: the plain server, which answers every REQUEST bytes with REPLY bytes. As
 * a shared library: a client that sends messages, each with a file or none, and waits for each one's reply.
 */
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 32
#define REPLY 40

struct message {
    const uint8_t *bytes;
    uint32_t size, reply_size;
    int32_t file; /* -1: none */
};

static int receive(int fd, uint8_t *to, size_t size)
{
    for (ssize_t got; size; to += got, size -= (size_t)got) {
        got = recv(fd, to, size, 0);
        if (got <= 0)
            return -1;
    }
    return 0;
}

static int send_message(int fd, const struct message *message)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int32_t))];
    } control;
    struct iovec iov = {(void *)message->bytes, message->size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (message->file >= 0) {
        memset(&control, 0, sizeof(control));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int32_t));
        memcpy(CMSG_DATA(&control.header), &message->file, sizeof(int32_t));
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
    }
    return sendmsg(fd, &msg, MSG_NOSIGNAL) == (ssize_t)message->size ? 0 : -1;
}

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

/* Nanoseconds for `times` times all of `messages`, over a socket that blocks; -1 where a reply is short or an error. */
int64_t round_trips(int fd, const struct message *messages, uint32_t count, uint64_t times)
{
    uint8_t reply[4096];
    int64_t start = now();
    for (uint64_t i = 0; i < times; i++) {
        for (const struct message *m = messages; m < messages + count; m++) {
            if (send_message(fd, m) || receive(fd, reply, m->reply_size) || reply[8] & 0x20)
                return -1;
        }
    }
    return now() - start;
}

/* echo PATH: one client after the other. */
int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint8_t request[REQUEST], reply[REPLY] = {0};
    int listening = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc != 2 || listening < 0 || strlen(argv[1]) >= sizeof(address.sun_path))
        return 2;
    strcpy(address.sun_path, argv[1]);
    if (bind(listening, (struct sockaddr *)&address, sizeof(address)) || listen(listening, 1))
        return 1;
    if (write(STDOUT_FILENO, "ready\n", 6) != 6)
        return 1;
    for (;;) {
        int client = accept(listening, NULL, NULL);
        if (client < 0)
            return 1;
        while (!receive(client, request, REQUEST) && send(client, reply, REPLY, MSG_NOSIGNAL) == REPLY)
            ;
        close(client);
    }
}
