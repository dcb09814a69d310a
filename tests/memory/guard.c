/*
 * The SIGBUS handler: memory of a file that is truncated while threads use it, and every fault that is not of such memory
 * goes to whoever had it before. Argument: what to do. "untouched", "sent" and "bus" end by SIGBUS, the others with 0.
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "c_program.h"
#include "memory/guard.h"
#include "memory/mapped.h"

#define PAGE 4096u
#define PAGES 64u
#define ROUNDS 40

static int file_of(uint64_t pages)
{
    int fd = memfd_create("guarded", MFD_CLOEXEC);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)(pages * PAGE)));
    return fd;
}

static struct pv_mapped map(int fd, uint64_t pages, uint32_t flags, int bell)
{
    struct pv_mapped mapping;
    CHECK(!pv_mapped_create(&mapping, fd, 0, pages * PAGE, PAGE, flags, bell));
    return mapping;
}

static uint8_t look(const uint8_t *at)
{
    return *(const volatile uint8_t *)at;
}

static void touch(uint8_t *at, uint8_t value)
{
    *(volatile uint8_t *)at = value;
}

/* What is left of the file stays the file's, what is not reads zero and takes writes, and the bell rings. */
static void test_truncated(void)
{
    int fd = file_of(PAGES), bell = eventfd(0, EFD_NONBLOCK);
    struct pv_mapped m = map(fd, PAGES, PV_MAP_WRITE | PV_MAP_GUARD, bell);
    eventfd_t rang;
    memset(m.ptr, 0x55, m.size);
    CHECK(!ftruncate(fd, 8 * PAGE));
    CHECK(look(m.ptr + 7 * PAGE) == 0x55 && !pv_guard_poisoned(m.guard) && eventfd_read(bell, &rang));
    touch(m.ptr + 20 * PAGE + 5, 1);
    CHECK(pv_guard_poisoned(m.guard) && !eventfd_read(bell, &rang));
    CHECK(look(m.ptr + 20 * PAGE + 5) == 1 && !look(m.ptr + 20 * PAGE + 4) && !look(m.ptr + 21 * PAGE));
    CHECK(!look(m.ptr + 8 * PAGE) && look(m.ptr + 7 * PAGE) == 0x55);
    touch(m.ptr, 0x66);
    uint8_t byte;
    CHECK(pread(fd, &byte, 1, 0) == 1 && byte == 0x66);
    pv_mapped_destroy(&m);
    m = map(fd, PAGES, PV_MAP_GUARD, -1);
    CHECK(!look(m.ptr + 63 * PAGE) && pv_guard_poisoned(m.guard) && look(m.ptr + PAGE) == 0x55);
    pv_mapped_destroy(&m);
}

/* Threads that read and write while the file is cut and grows again, and mappings that come and go. */
static _Atomic int leave;

static void *use(void *arg)
{
    struct pv_mapped *m = arg;
    uint64_t random = (uintptr_t)&random | 1;
    while (!atomic_load(&leave)) {
        uint64_t at = next_random(&random) % m->size;
        if (at & 1)
            __atomic_fetch_add(m->ptr + at, 1, __ATOMIC_RELAXED);
        else
            (void)__atomic_load_n(m->ptr + at, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void test_threads(void)
{
    for (int round = 0; round < ROUNDS; round++) {
        int fd = file_of(PAGES), other = file_of(PAGES);
        struct pv_mapped m = map(fd, PAGES, PV_MAP_WRITE | PV_MAP_GUARD, -1);
        pthread_t thread[2];
        atomic_store(&leave, 0);
        for (int i = 0; i < 2; i++)
            CHECK(!pthread_create(&thread[i], NULL, use, &m));
        for (int i = 0; i < 20; i++) {
            struct pv_mapped n = map(other, PAGES, PV_MAP_GUARD, -1);
            CHECK(!ftruncate(fd, i % 3 * 5 * PAGE) && !ftruncate(other, i % 2 * PAGE));
            look(n.ptr + i * PAGE);
            pv_mapped_destroy(&n);
        }
        for (uint64_t until = now_ns() + 1000000000; !pv_guard_poisoned(m.guard);)
            CHECK(now_ns() < until);
        atomic_store(&leave, 1);
        for (int i = 0; i < 2; i++)
            pthread_join(thread[i], NULL);
        pv_mapped_destroy(&m);
        close(fd);
        close(other);
    }
}

/* More ranges than one piece of the list; each is found, those that went are not. */
static void test_many(void)
{
    enum { MANY = 1000 };
    static struct pv_mapped m[MANY];
    int fd = file_of(1);
    for (int i = 0; i < MANY; i++)
        m[i] = map(fd, 2, PV_MAP_GUARD, -1);
    for (int i = 0; i < MANY; i += 2)
        pv_mapped_destroy(&m[i]);
    for (int i = 1; i < MANY; i += 2) {
        CHECK(!pv_guard_poisoned(m[i].guard) && !look(m[i].ptr + PAGE) && pv_guard_poisoned(m[i].guard));
        pv_mapped_destroy(&m[i]);
    }
    struct pv_mapped again = map(fd, 2, PV_MAP_GUARD, -1);
    CHECK(!pv_guard_poisoned(again.guard));
    pv_mapped_destroy(&again);
}

static void test_refused(void)
{
    static const struct {
        uintptr_t start;
        uint64_t size, page;
    } bad[] = {{PAGE, 0, PAGE},    {PAGE + 1, PAGE, PAGE},      {PAGE, PAGE + 1, PAGE},
               {PAGE, PAGE, 0},    {PAGE, PAGE, 3},             {(uintptr_t)-1 & ~4095ul, 2 * PAGE, PAGE},
               {PAGE, PAGE, 8192}};
    for (unsigned i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        CHECK(pv_guard_add((void *)bad[i].start, bad[i].size, bad[i].page, 0, -1) == -22);
}

/* Memory nobody registered. */
static uint8_t *unguarded(void)
{
    int fd = file_of(2);
    struct pv_mapped m = map(fd, 2, PV_MAP_WRITE, -1);
    CHECK(!ftruncate(fd, 0));
    return m.ptr;
}

static sigjmp_buf back;
static _Atomic uintptr_t where;
static _Atomic int calls, plain_calls;

static void with_info(int number, siginfo_t *info, void *context)
{
    CHECK(number == SIGBUS && context);
    sigset_t blocked;
    CHECK(!pthread_sigmask(SIG_BLOCK, NULL, &blocked) && sigismember(&blocked, SIGBUS) && sigismember(&blocked, SIGUSR1));
    atomic_fetch_add(&calls, 1);
    atomic_store(&where, (uintptr_t)info->si_addr);
    void *page = (void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1));
    CHECK(mmap(page, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page);
}

static void plain(int number)
{
    CHECK(number == SIGBUS);
    atomic_fetch_add(&plain_calls, 1);
    siglongjmp(back, 1);
}

static void guard_something(void)
{
    int fd = file_of(2);
    struct pv_mapped m = map(fd, 2, PV_MAP_GUARD, -1);
    CHECK(!ftruncate(fd, 0) && !look(m.ptr) && pv_guard_poisoned(m.guard));
    pv_mapped_destroy(&m);
}

static void test_chained(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO}, now;
    action.sa_sigaction = with_info;
    sigaddset(&action.sa_mask, SIGUSR1);
    CHECK(!sigaction(SIGBUS, &action, NULL));
    guard_something();
    CHECK(!atomic_load(&calls));
    uint8_t *other = unguarded();
    CHECK(!look(other + 17) && atomic_load(&calls) == 1 && atomic_load(&where) == (uintptr_t)(other + 17));
    sigset_t blocked;
    CHECK(!pthread_sigmask(SIG_BLOCK, NULL, &blocked) && !sigismember(&blocked, SIGBUS));

    /* One that comes later stands before us until there is another range. */
    struct sigaction late = {.sa_handler = plain};
    CHECK(!sigaction(SIGBUS, &late, NULL));
    guard_something();
    CHECK(!atomic_load(&plain_calls));
    uint8_t *third = unguarded();
    if (!sigsetjmp(back, 1)) {
        look(third);
        CHECK(0);
    }
    CHECK(atomic_load(&plain_calls) == 1 && atomic_load(&calls) == 1);
    CHECK(!sigaction(SIGBUS, NULL, &now) && now.sa_flags & SA_SIGINFO && now.sa_sigaction != with_info);
}

/* As Python's faulthandler: gives the signal back to whoever had it, and sends it again. */
static struct sigaction before_nosy;

static void nosy(int number)
{
    atomic_fetch_add(&calls, 1);
    CHECK(atomic_load(&calls) == 1);
    sigaction(number, &before_nosy, NULL);
    raise(number);
}

static void come_between(void)
{
    struct sigaction action = {.sa_handler = nosy, .sa_flags = SA_NODEFER};
    guard_something();
    CHECK(!sigaction(SIGBUS, &action, &before_nosy));
    guard_something();
    CHECK(!atomic_load(&calls));
    look(unguarded());
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    const char *what = argv[1];
    struct sigaction action = {.sa_handler = SIG_DFL};
    if (!strcmp(what, "bus") || !strcmp(what, "sent") || !strcmp(what, "ignored") || !strcmp(what, "nosy"))
        CHECK(!sigaction(SIGBUS, &action, NULL)); /* a sanitizer's handler is not the question */
    if (!strcmp(what, "mended")) {
        test_refused();
        test_truncated();
        test_many();
    } else if (!strcmp(what, "threads")) {
        test_threads();
    } else if (!strcmp(what, "chained")) {
        test_chained();
    } else if (!strcmp(what, "nosy")) {
        come_between();
    } else if (!strcmp(what, "untouched") || !strcmp(what, "bus")) {
        guard_something();
        look(unguarded());
    } else if (!strcmp(what, "sent")) {
        guard_something();
        raise(SIGBUS);
    } else if (!strcmp(what, "ignored")) {
        action.sa_handler = SIG_IGN;
        CHECK(!sigaction(SIGBUS, &action, NULL));
        guard_something();
        raise(SIGBUS);
        return 0;
    } else {
        return 2;
    }
    return 0;
}
