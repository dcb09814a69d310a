/*
 * Engines: threads and inline runners (see engine.h).
 *
 * Steps run under the `run` mutex, so "no step runs" is "the mutex is free and somebody is pausing". `kicks` counts
 * announcements and is the futex word: a runner that saw the latest kick and found no work may sleep. Before that it spins
 * for as long as has lately paid: up to LONGEST_SPIN_NS where work comes soon, hardly at all where it does not, and not at
 * all on the processor on which who brings it runs.
 */
#include "engine.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LONGEST_SPIN_NS 40000
#define SHORTEST_SPIN_NS 1000
#define FOREVER UINT64_MAX
/* Polling: looks all the time for so long after work, then after sleeps of an eighth of the time that there was none. */
#define POLL_SPIN_NS 30000
#define POLL_SHORTEST_NS 20000
#define POLL_SHARE 8

struct pv_engine {
    pv_engine_step step;
    void *device;
    int kind;
    uint64_t poll_ns;
    pthread_t thread;
    pthread_mutex_t run;
    _Atomic uint32_t kicks;
    _Atomic int kicked_on; /* the processor, -1: none yet */
    _Atomic uint32_t sleeping;
    _Atomic uint32_t leaving;
    _Atomic uint32_t pausing;
    _Atomic uint32_t stopped;
    _Atomic int64_t stop_in; /* gates to pass before the stop point; < 0: none */
    _Atomic uint64_t wake_at; /* 0: never */
    _Atomic uint64_t gates, sleeps;
    int stop_fd;
    uint64_t spin_ns; /* the runner's */
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen, uint64_t timeout_ns)
{
    struct timespec t = {(time_t)(timeout_ns / 1000000000), (long)(timeout_ns % 1000000000)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout_ns ? &t : NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* With `run` held: steps until idle, stopped or paused. What the last one said; *worked: whether one made progress. */
static int run_steps(struct pv_engine *e, bool *worked)
{
    int said = PV_STEP_OFF;
    while (!atomic_load(&e->pausing) && !atomic_load(&e->stopped) && !atomic_load(&e->leaving)) {
        said = e->step(e->device);
        if (said != PV_STEP_PROGRESS)
            break;
        *worked = true;
    }
    return said;
}

static void run_inline(struct pv_engine *e)
{
    for (;;) {
        uint32_t seen = atomic_load(&e->kicks);
        if (pthread_mutex_trylock(&e->run))
            return; /* whoever runs looks at `kicks` again after unlocking */
        bool worked = false;
        run_steps(e, &worked);
        pthread_mutex_unlock(&e->run);
        if (atomic_load(&e->kicks) == seen)
            return;
    }
}

/* How long a sleep may last that is to be no longer than `longest`; 0: not at all. */
static uint64_t longest_sleep(struct pv_engine *e, uint64_t longest)
{
    uint64_t wake_at = atomic_load(&e->wake_at);
    if (!wake_at)
        return longest;
    uint64_t now = now_ns();
    if (wake_at <= now)
        return 0;
    return wake_at - now < longest ? wake_at - now : longest;
}

static bool is_kicked(struct pv_engine *e, uint32_t seen)
{
    for (int i = 0; i < 32; i++) {
        if (atomic_load_explicit(&e->kicks, memory_order_acquire) != seen)
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

/* At most `longest`; FOREVER: until there is a kick. */
static void sleep_until_kicked(struct pv_engine *e, uint32_t seen, uint64_t longest)
{
    atomic_store(&e->sleeping, 1);
    longest = longest_sleep(e, longest);
    if (longest && atomic_load(&e->kicks) == seen) {
        atomic_fetch_add_explicit(&e->sleeps, 1, memory_order_relaxed);
        futex_wait(&e->kicks, seen, longest == FOREVER ? 0 : longest);
    }
    atomic_store(&e->sleeping, 0);
}

static void idle(struct pv_engine *e, uint32_t seen)
{
    const uint64_t begin = now_ns();
    const bool alone = sched_getcpu() != atomic_load_explicit(&e->kicked_on, memory_order_relaxed);
    const uint64_t spin = alone ? e->spin_ns : 0;
    do {
        if (is_kicked(e, seen))
            return;
    } while (now_ns() - begin < spin);
    sleep_until_kicked(e, seen, FOREVER);
    if (now_ns() - begin <= LONGEST_SPIN_NS)
        e->spin_ns = LONGEST_SPIN_NS;
    else if (e->spin_ns > SHORTEST_SPIN_NS)
        e->spin_ns /= 2;
}

/* Nobody may ever kick: the next look is soon after work, later the longer there was none. */
static void idle_polling(struct pv_engine *e, uint32_t seen, uint64_t since)
{
    uint64_t quiet = now_ns() - since, pause = quiet / POLL_SHARE;
    if (quiet < POLL_SPIN_NS) {
        is_kicked(e, seen);
        return;
    }
    pause = pause < POLL_SHORTEST_NS ? POLL_SHORTEST_NS : pause;
    sleep_until_kicked(e, seen, pause < e->poll_ns ? pause : e->poll_ns);
}

static void *run_thread(void *arg)
{
    struct pv_engine *e = arg;
    uint64_t since = 0;
    if (e->poll_ns)
        prctl(PR_SET_TIMERSLACK, 1000ul); /* else 50 us come on top of every sleep */
    while (!atomic_load(&e->kicks)) /* no step before the first: the device may not have stored the engine yet */
        idle(e, 0);                 /* a futex may return for nothing */
    for (;;) {
        bool worked = false;
        uint32_t seen = atomic_load(&e->kicks); /* before `leaving`: the kick that follows it is never taken for an old one */
        if (atomic_load(&e->leaving))
            return NULL;
        pthread_mutex_lock(&e->run);
        int said = run_steps(e, &worked);
        pthread_mutex_unlock(&e->run);
        if (worked && e->poll_ns)
            since = now_ns();
        if (e->poll_ns && said != PV_STEP_OFF && said != PV_STEP_STOPPED)
            idle_polling(e, seen, since);
        else
            idle(e, seen);
    }
}

static void free_engine(struct pv_engine *e)
{
    if (e->stop_fd >= 0)
        close(e->stop_fd);
    pthread_mutex_destroy(&e->run);
    free(e);
}

int pv_start_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
    /* The thread's own doing: a fault that is blocked ends the process, whatever handler there is. */
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL};
    sigset_t all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof(faults) / sizeof(*faults); i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

struct pv_engine *pv_engine_create(pv_engine_step step, void *device, int kind, uint64_t poll_ns)
{
    struct pv_engine *e = calloc(1, sizeof(*e));
    if (!e)
        return NULL;
    e->step = step;
    e->device = device;
    e->kind = kind;
    e->poll_ns = poll_ns;
    e->spin_ns = LONGEST_SPIN_NS;
    atomic_init(&e->stop_in, -1);
    atomic_init(&e->kicked_on, -1);
    pthread_mutex_init(&e->run, NULL);
    e->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->stop_fd < 0 || (kind == PV_ENGINE_THREAD && pv_start_thread(&e->thread, run_thread, e))) {
        free_engine(e);
        return NULL;
    }
    return e;
}

void pv_engine_kick(struct pv_engine *e)
{
    if (e->kind == PV_ENGINE_THREAD)
        atomic_store_explicit(&e->kicked_on, sched_getcpu(), memory_order_relaxed);
    atomic_fetch_add(&e->kicks, 1);
    if (e->kind == PV_ENGINE_INLINE)
        run_inline(e);
    else if (atomic_load(&e->sleeping))
        futex_wake(&e->kicks);
}

void pv_engine_destroy(struct pv_engine *e)
{
    if (!e)
        return;
    if (e->kind == PV_ENGINE_THREAD) {
        atomic_store(&e->leaving, 1);
        pv_engine_kick(e);
        pthread_join(e->thread, NULL);
    }
    free_engine(e);
}

void pv_engine_wake_at(struct pv_engine *e, uint64_t when)
{
    atomic_store(&e->wake_at, when);
}

bool pv_engine_gate(struct pv_engine *e)
{
    int64_t left = atomic_load_explicit(&e->stop_in, memory_order_relaxed);
    while (left >= 0) {
        if (!atomic_compare_exchange_weak(&e->stop_in, &left, left - 1))
            continue;
        if (left > 0)
            break;
        atomic_store(&e->stopped, 1);
        eventfd_write(e->stop_fd, 1);
        return false;
    }
    /* Only the runner counts. */
    uint64_t gates = atomic_load_explicit(&e->gates, memory_order_relaxed);
    atomic_store_explicit(&e->gates, gates + 1, memory_order_relaxed);
    return true;
}

bool pv_engine_pausing(struct pv_engine *e)
{
    return atomic_load_explicit(&e->pausing, memory_order_relaxed) || atomic_load_explicit(&e->leaving, memory_order_relaxed);
}

void pv_engine_stop_before(struct pv_engine *e, int64_t n)
{
    atomic_store(&e->stop_in, n);
}

int pv_engine_stopped(struct pv_engine *e)
{
    return atomic_load(&e->stopped) != 0;
}

void pv_engine_resume(struct pv_engine *e)
{
    eventfd_t count;
    eventfd_read(e->stop_fd, &count);
    atomic_store(&e->stopped, 0);
    pv_engine_kick(e);
}

void pv_engine_pause(struct pv_engine *e)
{
    atomic_fetch_add(&e->pausing, 1);
    pthread_mutex_lock(&e->run);
    pthread_mutex_unlock(&e->run);
}

void pv_engine_unpause(struct pv_engine *e)
{
    atomic_fetch_sub(&e->pausing, 1);
    pv_engine_kick(e);
}

int pv_engine_stop_fd(struct pv_engine *e)
{
    return e->stop_fd;
}

void pv_engine_stats(struct pv_engine *e, struct pv_engine_stats *out)
{
    *out = (struct pv_engine_stats){.gates = atomic_load(&e->gates),
                                    .kicks = atomic_load(&e->kicks),
                                    .sleeps = atomic_load(&e->sleeps)};
}
