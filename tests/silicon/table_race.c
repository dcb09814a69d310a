/*
 * Engines that share one table bus, beside threads that change its ranges, its vectors and who is asked for remote ones.
 *
 * Memory is freed as soon as its range is unmapped, and looked at before: it holds what DMA writes or what it had. The
 * sanitizer sees the rest. Arguments: milliseconds, unmaps; it ends when both are over.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "c_program.h"
#include "silicon/iommu.h"

#define PAGE 4096ull
#define BASE 0x10000000ull
#define ENGINES 3
#define CHANGERS 2
#define SLOTS 512 /* of each changer */
#define VECTORS 4
#define DMA_BYTE 0xd5
#define MARK 0x3c

struct engine {
    uint64_t random, done, faults;
    pthread_t thread;
};

struct changer {
    uint64_t first, random, unmaps; /* its slots, from `first` on */
    uint8_t *slot[SLOTS];
    bool mapped[SLOTS];
    pthread_t thread;
};

static struct pv_bus *bus;
static _Atomic int stop;
static _Atomic uint64_t asked;
static uint64_t end_ns, least;

static int answer(void *arg, uint64_t iova, void *buf, uint64_t n, int write)
{
    CHECK(arg == &asked && iova >= BASE && n <= PV_SECTION_BYTES);
    if (!write)
        memset(buf, DMA_BYTE, n);
    return atomic_fetch_add(&asked, 1) % 16 ? 0 : -EFAULT;
}

static void *run_engine(void *arg)
{
    struct engine *e = arg;
    const uint8_t pattern[8] = {DMA_BYTE, DMA_BYTE, DMA_BYTE, DMA_BYTE, DMA_BYTE, DMA_BYTE, DMA_BYTE, DMA_BYTE};
    uint64_t span = CHANGERS * SLOTS * PAGE;
    struct pv_dma dma;
    while (!atomic_load(&stop)) {
        uint64_t kind = next_random(&e->random) % 8, size = 1 + next_random(&e->random) % (kind ? 300 : 3 * PAGE);
        uint64_t at = next_random(&e->random) % (span - size), from = next_random(&e->random) % (span - size);
        int result = kind % 3 == 0   ? pv_bus_fill(bus, BASE + at, pattern, size, &dma)
                     : kind % 3 == 1 ? pv_bus_move(bus, BASE + at, BASE + from, size, &dma)
                                     : pv_bus_compare(bus, BASE + at, BASE + from, size, &dma);
        CHECK(result == 0 || result == 1 || result == -EFAULT);
        CHECK(result != -EFAULT || dma.done < size);
        e->done += !result;
        e->faults += result == -EFAULT;
        pv_bus_msi(bus, PV_MSI_START, (uint32_t)at % (VECTORS + 1));
    }
    return NULL;
}

static void map_slot(struct changer *c, uint64_t i)
{
    uint64_t iova = BASE + (c->first + i) * PAGE;
    if (next_random(&c->random) % 8) {
        c->slot[i] = malloc(PAGE);
        CHECK(c->slot[i]);
        memset(c->slot[i], MARK, PAGE);
        CHECK(!pv_table_bus_map(bus, iova, PAGE, c->slot[i], PV_DMA_READ | PV_DMA_WRITE));
    } else {
        CHECK(!pv_table_bus_map_remote(bus, iova, PAGE, PV_DMA_READ | PV_DMA_WRITE));
    }
    c->mapped[i] = true;
}

static void unmap_slots(struct changer *c, uint64_t first, uint64_t count)
{
    CHECK(!pv_table_bus_unmap(bus, BASE + (c->first + first) * PAGE, count * PAGE));
    for (uint64_t i = first; i < first + count; i++) {
        uint8_t *memory = c->slot[i];
        for (uint64_t at = 0; memory && at < PAGE; at++)
            CHECK(memory[at] == MARK || memory[at] == DMA_BYTE);
        free(memory);
        c->slot[i] = NULL;
        c->unmaps += c->mapped[i];
        c->mapped[i] = false;
    }
}

static void *run_changer(void *arg)
{
    struct changer *c = arg;
    while (now_ns() < end_ns || c->unmaps < least) {
        uint64_t at = next_random(&c->random) % SLOTS, count = 1 + next_random(&c->random) % 100;
        count = at + count > SLOTS ? SLOTS - at : count;
        bool whole = next_random(&c->random) % 4 == 0;
        for (uint64_t i = at; i < at + count; i++)
            if (!c->mapped[i])
                map_slot(c, i);
            else if (!whole && next_random(&c->random) % 2)
                unmap_slots(c, i, 1);
        if (whole)
            unmap_slots(c, at, count);
    }
    unmap_slots(c, 0, SLOTS);
    return NULL;
}

static void *run_vectors(void *arg)
{
    int bell = eventfd(0, EFD_NONBLOCK);
    uint64_t random = 77;
    (void)arg;
    while (!atomic_load(&stop)) {
        if (next_random(&random) % 8 == 0)
            CHECK(!pv_table_bus_vectors(bus, VECTORS));
        CHECK(!pv_table_bus_vector(bus, next_random(&random) % VECTORS, next_random(&random) % 2 ? bell : -1));
        bool nobody = next_random(&random) % 4 == 0;
        pv_table_bus_remote(bus, nobody ? NULL : answer, nobody ? NULL : &asked);
    }
    close(bell);
    return NULL;
}

int main(int argc, char **argv)
{
    static struct engine engine[ENGINES];
    static struct changer changer[CHANGERS];
    pthread_t vectors;
    CHECK(argc == 3);
    end_ns = now_ns() + strtoull(argv[1], NULL, 10) * 1000000;
    least = strtoull(argv[2], NULL, 10) / CHANGERS;
    bus = pv_table_bus_create(-1);
    CHECK(bus && !pv_table_bus_vectors(bus, VECTORS));
    for (uint64_t i = 0; i < CHANGERS; i++) {
        changer[i].first = i * SLOTS;
        changer[i].random = 1000 + i;
        CHECK(!pthread_create(&changer[i].thread, NULL, run_changer, &changer[i]));
    }
    for (uint64_t i = 0; i < ENGINES; i++) {
        engine[i].random = 1 + i;
        CHECK(!pthread_create(&engine[i].thread, NULL, run_engine, &engine[i]));
    }
    CHECK(!pthread_create(&vectors, NULL, run_vectors, NULL));
    for (uint64_t i = 0; i < CHANGERS; i++)
        pthread_join(changer[i].thread, NULL);
    atomic_store(&stop, 1);
    for (uint64_t i = 0; i < ENGINES; i++)
        pthread_join(engine[i].thread, NULL);
    pthread_join(vectors, NULL);
    struct pv_table_bus_stats stats;
    pv_table_bus_stats(bus, &stats);
    CHECK(!stats.maps && !pv_bus_is_remote(bus) && atomic_load(&asked) && engine[0].done && engine[0].faults);
    pv_bus_destroy(bus);
    return 0;
}
