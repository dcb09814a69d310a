/*
 * Timing loops over translation alone (see bench.h).
 *
 * Not modelled: the data a translation is for, invalidations in between.
 */
#include "bench.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static uint64_t now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int translate_series(struct pv_bus *bus, const struct pv_bench *bench)
{
    const struct pv_bus_ops *ops = bus->ops;
    uint64_t offset = 0, end = bench->stride * bench->count;
    struct pv_span span;
    int error = 0;
    for (uint64_t done = 0; done < bench->calls && !error;) {
        ops->enter(bus);
        for (uint32_t n = 0; n < bench->section && done < bench->calls && !error; n++, done++) {
            error = ops->translate(bus, bench->iova + offset, bench->perm, &span);
            offset += bench->stride;
            offset = offset == end ? 0 : offset;
        }
        ops->leave(bus);
    }
    return error;
}

static int check(const struct pv_bench *bench)
{
    return bench->count && bench->section ? 0 : -EINVAL;
}

int pv_bench_translate(struct pv_bus *bus, const struct pv_bench *bench, uint64_t *ns)
{
    int error = check(bench);
    if (error)
        return error;
    uint64_t start = now_ns(CLOCK_MONOTONIC);
    error = translate_series(bus, bench);
    *ns = now_ns(CLOCK_MONOTONIC) - start;
    return error;
}

struct runner {
    struct pv_bus *bus;
    const struct pv_bench *bench;
    pthread_mutex_t *gate; /* held until all threads exist */
    pthread_t thread;
    uint64_t cpu_ns;
    int error;
};

static void *run(void *arg)
{
    struct runner *r = arg;
    pthread_mutex_lock(r->gate);
    pthread_mutex_unlock(r->gate);
    uint64_t start = now_ns(CLOCK_THREAD_CPUTIME_ID);
    r->error = translate_series(r->bus, r->bench);
    r->cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - start;
    return NULL;
}

int pv_bench_translate_all(struct pv_bus *const *buses, uint32_t count, const struct pv_bench *bench, uint64_t *ns,
                           uint64_t *cpu_ns)
{
    int error = check(bench);
    struct runner *runners = error ? NULL : calloc(count ? count : 1, sizeof(*runners));
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    uint32_t started = 0;
    if (error || !runners)
        return error ? error : -ENOMEM;
    *cpu_ns = 0;
    pthread_mutex_lock(&gate);
    for (; started < count && !error; started++) {
        runners[started] = (struct runner){.bus = buses[started], .bench = bench, .gate = &gate};
        error = -pthread_create(&runners[started].thread, NULL, run, &runners[started]);
        if (error)
            break;
    }
    uint64_t start = now_ns(CLOCK_MONOTONIC);
    pthread_mutex_unlock(&gate);
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(runners[i].thread, NULL);
        *cpu_ns += runners[i].cpu_ns;
        error = error ? error : runners[i].error;
    }
    *ns = now_ns(CLOCK_MONOTONIC) - start;
    pthread_mutex_destroy(&gate);
    free(runners);
    return error;
}
