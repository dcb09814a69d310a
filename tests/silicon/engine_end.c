/*
 * Engines that end while they are busy: every one of them ends. One that does not within seconds fails.
 * Argument: milliseconds.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "c_program.h"
#include "silicon/engine.h"

#define PATIENCE_S 20

struct device {
    struct pv_engine *engine;
    bool restless;
};

/* One that announces more work by itself never sleeps: it is always about to look whether it is to end. */
static int step(void *device)
{
    struct device *d = device;
    if (d->restless)
        pv_engine_kick(d->engine);
    return PV_STEP_IDLE;
}

static void dawdle(uint64_t turns)
{
    for (volatile uint64_t turn = 0; turn < turns; turn++)
        ;
}

int main(int argc, char **argv)
{
    uint64_t until = now_ns() + (argc > 1 ? strtoull(argv[1], NULL, 0) : 1000) * 1000000, ended = 0;
    while (now_ns() < until) {
        struct device d = {NULL, ended % 8};
        alarm(PATIENCE_S);
        d.engine = pv_engine_create(step, &d, PV_ENGINE_THREAD, ended % 3 ? 0 : 1000000);
        CHECK(d.engine);
        pv_engine_kick(d.engine);
        dawdle(20000 + ended * 37 % 2000);
        pv_engine_destroy(d.engine);
        ended++;
    }
    printf("%llu engines\n", (unsigned long long)ended);
    return ended < 100;
}
