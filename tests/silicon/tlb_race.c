/*
 * One who inserts neighbouring pages into a translation cache, each if it is mapped when it is looked at, beside one who
 * invalidates them: once that has returned nothing of what was mapped before is found, wherever the insertion was. The
 * pages share a set, so that its bit is taken back and set again all the time.
 * Arguments: milliseconds, and how many invalidations at least.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "c_program.h"
#include "silicon/section.h"
#include "silicon/tlb.h"

#define PAGES TLB_WAYS
#define PATIENCE_NS 120000000000

static struct tlb tlb;
static _Atomic uint64_t announced, section, inserted;
static _Atomic bool mapped, stop;

static void wait_a_little(uint64_t *random, uint64_t longest)
{
    for (uint64_t turns = next_random(random) % longest; turns; turns--)
        atomic_load(&stop);
}

static void *run_device(void *arg)
{
    uint64_t random = 5;
    while (!atomic_load(&stop)) {
        pv_section_enter(&section);
        uint64_t sequence = atomic_load(&announced);
        for (uint64_t page = 0; page < PAGES && atomic_load(&mapped); page++) {
            tlb_insert(&tlb, 0, page << 12, 12, 8, &announced, sequence);
            tlb_bump(&inserted);
            wait_a_little(&random, 16);
        }
        pv_section_leave(&section);
    }
    return arg;
}

int main(int argc, char **argv)
{
    uint64_t end = now_ns() + (argc > 1 ? strtoull(argv[1], NULL, 10) : 1000) * 1000000, last = now_ns() + PATIENCE_NS;
    uint64_t wanted = argc > 2 ? strtoull(argv[2], NULL, 10) : 0, turns = 0, random = 9, data;
    unsigned lg2;
    pthread_t device;
    CHECK(!pthread_create(&device, NULL, run_device, NULL));
    while (now_ns() < end || ((turns < wanted || !atomic_load(&inserted)) && now_ns() < last)) {
        atomic_store(&mapped, true);
        wait_a_little(&random, 128);
        atomic_store(&mapped, false);
        atomic_fetch_add(&announced, 1);
        tlb_drop(&tlb, 0, 0, (PAGES << 12) - 1);
        pv_section_wait(&section);
        CHECK(!tlb_entries(&tlb));
        for (uint64_t page = 0; page < PAGES; page++)
            CHECK(!tlb_find(&tlb, 0, page << 12, &data, &lg2));
        turns++;
    }
    atomic_store(&stop, true);
    pthread_join(device, NULL);
    printf("%lu invalidations, %lu insertions\n", (unsigned long)turns, (unsigned long)atomic_load(&inserted));
    CHECK(turns >= wanted && atomic_load(&inserted)); /* else nothing was tested */
    return 0;
}
