/* Waiting for device-written memory: see wait.h. */
#include "wait.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS 5000
#define ALONE_NS 4000 /* after that, what is waited for may need this very processor */
#define RUN_SPIN_NS 50000 /* who polls a ring has nothing else to do; the shortest sleep takes longer than most commands */
#define FIRST_SLEEP_NS 10000
#define LONGEST_SLEEP_NS 1000000

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

struct pace {
    uint64_t start;
    uint64_t timeout;
    uint64_t spin;
    uint64_t sleep;
    uint64_t yield;
};

/* Lets time pass between two looks; false when there is none left. */
static bool pace_step(struct pace *pace)
{
    if (!pace->timeout)
        return false;
    uint64_t now = now_ns();
    if (!pace->start)
        pace->start = now;
    uint64_t elapsed = now - pace->start;
    if (elapsed >= pace->timeout)
        return false;
    if (elapsed < pace->spin) {
        if (elapsed >= (pace->yield ? pace->yield : ALONE_NS)) {
            pace->yield = 2 * elapsed;
            sched_yield();
        }
        for (int i = 0; i < 8; i++)
            cpu_relax();
        return true;
    }
    uint64_t left = pace->timeout - elapsed;
    uint64_t nap = pace->sleep ? pace->sleep : FIRST_SLEEP_NS;
    pace->sleep = nap * 2 < LONGEST_SLEEP_NS ? nap * 2 : LONGEST_SLEEP_NS;
    if (nap > left)
        nap = left;
    struct timespec ts = {.tv_sec = 0, .tv_nsec = (long)nap};
    nanosleep(&ts, NULL);
    return true;
}

static uint64_t load(const void *addr, uint32_t size)
{
    switch (size) {
    case 1:
        return __atomic_load_n((const uint8_t *)addr, __ATOMIC_ACQUIRE);
    case 2:
        return __atomic_load_n((const uint16_t *)addr, __ATOMIC_ACQUIRE);
    case 4:
        return __atomic_load_n((const uint32_t *)addr, __ATOMIC_ACQUIRE);
    default:
        return __atomic_load_n((const uint64_t *)addr, __ATOMIC_ACQUIRE);
    }
}

int pv_wait_word(const void *addr, uint32_t size, uint64_t mask, uint64_t wanted, int differ, uint64_t timeout_ns,
                 uint64_t *value)
{
    if ((size != 1 && size != 2 && size != 4 && size != 8) || (uintptr_t)addr % size)
        return -EINVAL;
    struct pace pace = {.timeout = timeout_ns, .spin = SPIN_NS};
    do {
        *value = load(addr, size);
        if (((*value & mask) == wanted) != (differ != 0))
            return 1;
    } while (pace_step(&pace));
    return 0;
}

uint64_t pv_wait_bytes(const void *first, int64_t stride, uint64_t n, uint8_t mask, uint64_t timeout_ns)
{
    struct pace pace = {.timeout = timeout_ns, .spin = SPIN_NS};
    const uint8_t *byte = first;
    uint64_t done = 0; /* all before this one are set */
    do {
        while (done < n && (__atomic_load_n(byte + (int64_t)done * stride, __ATOMIC_ACQUIRE) & mask))
            done++;
        if (done == n)
            return n;
    } while (pace_step(&pace));
    uint64_t ready = done;
    for (uint64_t i = done; i < n; i++)
        ready += (__atomic_load_n(byte + (int64_t)i * stride, __ATOMIC_ACQUIRE) & mask) != 0;
    return ready;
}

uint64_t pv_wait_run(const void *first, int64_t stride, uint64_t n, uint8_t mask, uint8_t wanted, uint64_t least,
                     uint64_t timeout_ns)
{
    struct pace pace = {.timeout = timeout_ns, .spin = RUN_SPIN_NS};
    const uint8_t *byte = first;
    uint64_t done = 0;
    do {
        while (done < n && (__atomic_load_n(byte + (int64_t)done * stride, __ATOMIC_ACQUIRE) & mask) == wanted)
            done++;
        if (done >= least || done == n)
            break;
    } while (pace_step(&pace));
    return done;
}

uint64_t pv_wait_event(int eventfd, uint64_t timeout_ns)
{
    struct pollfd fd = {.fd = eventfd, .events = POLLIN};
    struct timespec ts = {.tv_sec = (time_t)(timeout_ns / 1000000000u), .tv_nsec = (long)(timeout_ns % 1000000000u)};
    uint64_t count = 0;
    if (ppoll(&fd, 1, &ts, NULL) <= 0 || read(eventfd, &count, sizeof(count)) != (ssize_t)sizeof(count))
        return 0;
    return count;
}
