/*
 * Engines under doorbells, pauses and stop points from several threads: no doorbell is lost, no two steps run at once,
 * none runs while somebody pauses. A doorbell that nobody answers within seconds fails. Engines that poll are not even told.
 * Argument: milliseconds.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "c_program.h"
#include "silicon/engine.h"

#define SUBMITTERS 2
#define POLL_NS 800000ull
#define ROUND_NS 50000000ull
#define PATIENCE_NS 20000000000ull

struct device {
    struct pv_engine *engine;
    bool polled;
    _Atomic uint64_t submitted, done;
    _Atomic int leave, left; /* left: submitters that have gone */
    uint64_t steps; /* plain, as a device's own state is: only the pause orders a reader */
};

static int step(void *device)
{
    struct device *d = device;
    d->steps++;
    if (atomic_load(&d->done) == atomic_load(&d->submitted))
        return PV_STEP_IDLE;
    if (!pv_engine_gate(d->engine))
        return PV_STEP_STOPPED;
    atomic_fetch_add(&d->done, 1);
    return PV_STEP_PROGRESS;
}

/* Rings, and waits for the answer: what it rang for may be done by anybody's ring, but it is done. */
static void *submit(void *device)
{
    struct device *d = device;
    while (!atomic_load(&d->leave)) {
        uint64_t mine = atomic_fetch_add(&d->submitted, 1) + 1, until = now_ns() + PATIENCE_NS;
        if (!d->polled)
            pv_engine_kick(d->engine);
        while (atomic_load(&d->done) < mine) {
            CHECK(now_ns() < until);
            sched_yield();
        }
    }
    atomic_fetch_add(&d->left, 1);
    return NULL;
}

static void *pause_now_and_then(void *device)
{
    struct device *d = device;
    while (!atomic_load(&d->leave)) {
        pv_engine_pause(d->engine);
        uint64_t steps = d->steps++, done = atomic_load(&d->done);
        sched_yield();
        CHECK(d->steps == steps + 1 && atomic_load(&d->done) == done);
        pv_engine_unpause(d->engine);
        sched_yield();
    }
    return NULL;
}

/* One engine from birth to death. */
static void run_round(int kind, bool polled)
{
    struct device d = {.polled = polled};
    pthread_t submitter[SUBMITTERS], pauser;
    uint64_t until = now_ns() + ROUND_NS, n = 0;
    d.engine = pv_engine_create(step, &d, kind, polled ? POLL_NS : 0);
    CHECK(d.engine);
    pv_engine_kick(d.engine); /* the device is there */
    for (int i = 0; i < SUBMITTERS; i++)
        CHECK(!pthread_create(&submitter[i], NULL, submit, &d));
    CHECK(!pthread_create(&pauser, NULL, pause_now_and_then, &d));
    while (now_ns() < until) {
        pv_engine_stop_before(d.engine, (int64_t)(n++ % 5));
        sched_yield();
        if (pv_engine_stopped(d.engine))
            pv_engine_resume(d.engine);
    }
    pv_engine_stop_before(d.engine, -1);
    atomic_store(&d.leave, 1);
    while (atomic_load(&d.left) < SUBMITTERS) {
        if (pv_engine_stopped(d.engine)) /* at the last stop point, on the way while it was removed */
            pv_engine_resume(d.engine);
        sched_yield();
    }
    for (int i = 0; i < SUBMITTERS; i++)
        pthread_join(submitter[i], NULL);
    pthread_join(pauser, NULL);
    CHECK(atomic_load(&d.done) == atomic_load(&d.submitted));
    pv_engine_destroy(d.engine);
}

int main(int argc, char **argv)
{
    uint64_t end = now_ns() + (argc > 1 ? strtoull(argv[1], NULL, 10) : 1000) * 1000000;
    unsigned rounds = 0;
    while (now_ns() < end)
        switch (rounds++ % 3) {
        case 0:
            run_round(PV_ENGINE_THREAD, false);
            break;
        case 1:
            run_round(PV_ENGINE_INLINE, false);
            break;
        default:
            run_round(PV_ENGINE_THREAD, true);
        }
    printf("%u engines\n", rounds);
    return 0;
}
