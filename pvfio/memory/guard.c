/*
 * The SIGBUS handler (see guard.h).
 *
 * The handler takes no lock: slots are published by their size, written last and cleared first; whoever removes one waits
 * until no handler runs that may have seen it. Searching is linear, and happens once for every mapping that a
 * client truncates.
 */
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHUNK 256
#define LEVELS 8
#define NONE UINT32_MAX

struct slot {
    uintptr_t start;
    uint64_t page;
    int prot, eventfd;
    uint32_t next; /* of the free ones */
    _Atomic uint64_t size; /* 0: nothing */
    _Atomic uint32_t poisoned;
};

static struct {
    pthread_mutex_t lock; /* of registration */
    uint32_t free, made;
    _Atomic(struct slot *) chunk[PV_GUARDS / CHUNK];
    _Atomic uint32_t used;    /* slots that were ever handed out */
    _Atomic uint32_t running; /* handlers that look at slots */
    /* Who had SIGBUS before, oldest first; and how many of them are at work on a signal now. */
    struct sigaction previous[LEVELS];
    _Atomic uint32_t levels, deep, handed_on;
} guards = {.lock = PTHREAD_MUTEX_INITIALIZER, .free = NONE};

static struct slot *slot_at(uint32_t i)
{
    return atomic_load_explicit(&guards.chunk[i / CHUNK], memory_order_acquire) + i % CHUNK;
}

/* Not through libc's wrapper: sanitizers put theirs there, which is not for handlers. */
static bool put_zeroes(uintptr_t at, uint64_t size, int prot)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return syscall(SYS_mmap, at, size, prot, flags, -1, 0L) == (long)at;
}

/* Whether the address was in a range, and is memory now. */
static bool mend(uintptr_t at)
{
    uint32_t used = atomic_load(&guards.used);
    for (uint32_t i = 0; i < used; i++) {
        struct slot *slot = slot_at(i);
        uint64_t size = atomic_load(&slot->size);
        if (at - slot->start >= size)
            continue;
        uintptr_t from = at & ~(uintptr_t)(slot->page - 1);
        atomic_store(&slot->poisoned, 1);
        if (!put_zeroes(from, slot->start + size - from, slot->prot) && !put_zeroes(from, slot->page, slot->prot))
            return false;
        uint64_t one = 1;
        if (slot->eventfd >= 0 && write(slot->eventfd, &one, sizeof(one)) < 0)
            return true; /* it is full: it rang */
        return true;
    }
    return false;
}

static void end_process(bool sent)
{
    struct sigaction plain = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, &plain, NULL);
    if (sent)
        raise(SIGBUS); /* a fault repeats itself */
}

/*
 * Which of the previous handlers a signal is for. One that came after us may hand a fault on to whom it replaced (by sending
 * the signal once more, as faulthandler does), which is us: that is for the next older one.
 */
static const struct sigaction *whose(const siginfo_t *info)
{
    uint32_t levels = atomic_load(&guards.levels), deep = atomic_fetch_add(&guards.deep, 1);
    if (info->si_code > 0)
        atomic_store(&guards.handed_on, 1);
    else if (info->si_code == SI_TKILL && info->si_pid == getpid() && atomic_exchange(&guards.handed_on, 0) && !deep)
        deep = levels > 1;
    return deep < levels ? &guards.previous[levels - 1 - deep] : NULL;
}

/* As if we were not there. */
static void chain(int number, siginfo_t *info, void *context)
{
    bool sent = info->si_code <= 0;
    const struct sigaction *old = whose(info);
    if (!old || (!(old->sa_flags & SA_SIGINFO) && old->sa_handler == SIG_DFL)) {
        end_process(sent);
    } else if (!(old->sa_flags & SA_SIGINFO) && old->sa_handler == SIG_IGN) {
        if (!sent)
            end_process(false); /* the kernel does not let a fault be ignored */
    } else {
        sigset_t mask = old->sa_mask, before;
        if (!(old->sa_flags & SA_NODEFER))
            sigaddset(&mask, number);
        pthread_sigmask(SIG_BLOCK, &mask, &before);
        if (old->sa_flags & SA_SIGINFO)
            old->sa_sigaction(number, info, context);
        else
            old->sa_handler(number);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    atomic_fetch_sub(&guards.deep, 1);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    bool mended = false;
    if (info->si_code > 0) {
        atomic_fetch_add(&guards.running, 1);
        mended = mend((uintptr_t)info->si_addr);
        atomic_fetch_sub(&guards.running, 1);
    }
    if (!mended)
        chain(number, info, context);
    errno = saved;
}

/* With the lock. On top, also of a handler that came after ours: it would take our faults for its own. */
static int install(void)
{
    struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    uint32_t levels = atomic_load(&guards.levels);
    if (sigaction(SIGBUS, NULL, &now))
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigbus)
        return 0;
    if (levels == LEVELS)
        return -ENOSPC;
    ours.sa_sigaction = on_sigbus;
    sigemptyset(&ours.sa_mask);
    guards.previous[levels] = now;
    atomic_store(&guards.levels, levels + 1);
    if (!sigaction(SIGBUS, &ours, NULL))
        return 0;
    int error = -errno;
    atomic_store(&guards.levels, levels);
    return error;
}

/* With the lock: a slot that nothing is in, or -errno. */
static int take_slot(void)
{
    if (guards.free != NONE) {
        uint32_t i = guards.free;
        guards.free = slot_at(i)->next;
        return (int)i;
    }
    uint32_t i = atomic_load(&guards.used);
    if (i == PV_GUARDS)
        return -ENOSPC;
    if (i == guards.made) {
        struct slot *chunk = calloc(CHUNK, sizeof(*chunk));
        if (!chunk)
            return -ENOMEM;
        atomic_store_explicit(&guards.chunk[i / CHUNK], chunk, memory_order_release);
        guards.made += CHUNK;
    }
    atomic_store(&guards.used, i + 1);
    return (int)i;
}

int pv_guard_add(void *addr, uint64_t size, uint64_t page, int writable, int eventfd)
{
    uintptr_t start = (uintptr_t)addr;
    if (!page || page & (page - 1) || !size || (start | size) & (page - 1) || start + size < start)
        return -EINVAL;
    pthread_mutex_lock(&guards.lock);
    int guard = install();
    if (!guard)
        guard = take_slot();
    if (guard >= 0) {
        struct slot *slot = slot_at((uint32_t)guard);
        slot->start = start;
        slot->page = page;
        slot->prot = PROT_READ | (writable ? PROT_WRITE : 0);
        slot->eventfd = eventfd;
        atomic_store(&slot->poisoned, 0);
        atomic_store(&slot->size, size);
    }
    pthread_mutex_unlock(&guards.lock);
    return guard;
}

void pv_guard_remove(int guard)
{
    if (guard < 0)
        return;
    pthread_mutex_lock(&guards.lock);
    struct slot *slot = slot_at((uint32_t)guard);
    atomic_store(&slot->size, 0);
    while (atomic_load(&guards.running))
        sched_yield();
    slot->next = guards.free;
    guards.free = (uint32_t)guard;
    pthread_mutex_unlock(&guards.lock);
}

int pv_guard_poisoned(int guard)
{
    return guard >= 0 && atomic_load(&slot_at((uint32_t)guard)->poisoned);
}
