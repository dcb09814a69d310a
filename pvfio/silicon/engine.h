/*
 * A data engine: what runs a device's work, as a native thread or in the caller.
 *
 * A device gives a step function that does one bounded piece of work. A threaded engine calls it until it is
 * idle, spins briefly, then sleeps on a futex; a doorbell (pv_engine_kick) wakes it. An inline engine runs the
 * steps in whoever rings the doorbell, until idle or until a stop point. Stop points are deterministic: before
 * each descriptor the device asks pv_engine_gate, and returns PV_STEP_STOPPED when told to.
 */
#ifndef PVFIO_ENGINE_H
#define PVFIO_ENGINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct pv_engine;
typedef int (*pv_engine_step)(void *device);

/* cffi: begin */
#define PV_STEP_IDLE 0
#define PV_STEP_PROGRESS 1
#define PV_STEP_STOPPED 2
#define PV_STEP_OFF 3 /* idle, and only a kick changes that: a polling engine does not look any more */

#define PV_ENGINE_INLINE 0
#define PV_ENGINE_THREAD 1

struct pv_engine;

struct pv_engine_stats {
    uint64_t gates;  /* descriptors begun */
    uint64_t kicks;
    uint64_t sleeps;
};

void pv_engine_destroy(struct pv_engine *engine);
void pv_engine_kick(struct pv_engine *engine);
/* Stop before the n-th descriptor from now on (0: the next one); n < 0 removes the stop point. */
void pv_engine_stop_before(struct pv_engine *engine, int64_t n);
int pv_engine_stopped(struct pv_engine *engine);
/* Goes on from a stop point (an inline engine: in this call). */
void pv_engine_resume(struct pv_engine *engine);
/* Waits until no step runs, and lets none begin until pv_engine_unpause. Nests. From a step itself: deadlock. */
void pv_engine_pause(struct pv_engine *engine);
void pv_engine_unpause(struct pv_engine *engine);
/* Rings when the engine arrives at a stop point; the engine's own, do not close. */
int pv_engine_stop_fd(struct pv_engine *engine);
void pv_engine_stats(struct pv_engine *engine, struct pv_engine_stats *out);
/* cffi: end */

/*
 * poll_ns: 0, or how often at least a threaded engine looks for work nobody announced (at most 1 ms is 1000000). It looks
 * more often while there is work and soon after.
 */
struct pv_engine *pv_engine_create(pv_engine_step step, void *device, int kind, uint64_t poll_ns);
/* From a step: a threaded engine does not sleep beyond that time (CLOCK_MONOTONIC, ns); 0: as long as it likes. */
void pv_engine_wake_at(struct pv_engine *engine, uint64_t when);
/* A thread of a device's own: signals are the program's, it takes none but its own faults. 0 or an errno. */
int pv_start_thread(pthread_t *thread, void *(*run)(void *), void *arg);
/* Before a descriptor: true to go on, false: return PV_STEP_STOPPED now and begin with this descriptor next time. */
bool pv_engine_gate(struct pv_engine *engine);
/* True when somebody waits in pv_engine_pause: a step that has much left to do returns PV_STEP_PROGRESS soon. */
bool pv_engine_pausing(struct pv_engine *engine);

#endif
