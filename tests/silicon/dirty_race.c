/*
 * Engine threads that write through the IOMMU without a pause, beside a thread that reads and clears the dirty bits of stage
 * 2, splits its leaves and merges them, and one that maps, unmaps and flushes.
 *
 * The checker is a mirror: whatever page a harvest reports is copied after it, nothing else ever is, and at the end the
 * mirror is the memory. A lost bit, a cached write that went unmarked, or a hole while leaves change size ends the
 * program. One platform per half of the time. Argument: milliseconds.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "c_program.h"
#include "memory/memory.h"
#include "pagetable/pagetable.h"
#include "silicon/bus.h"
#include "silicon/iommu.h"

#define MIB (1ull << 20)
#define RAM (16 * MIB)
#define AREA (4 * MIB) /* what the engines write: [BASE, BASE + AREA) */
#define BASE (8 * MIB)
#define PAGES (AREA / 4096)
#define WINDOW 0x2000000000ull
#define ENGINES 3 /* the first sees GPAs, the others IOVAs */
#define PATIENCE_NS 60000000000

struct engine {
    struct pv_bus *bus;
    uint64_t base, random;
    uint64_t aborted;
    pthread_t thread;
};

static struct pv_memory *memory;
static struct pt_table *stage2, *stage1;
static struct pv_iommu *iommu;
static struct pv_domain *identity, *paging;
static struct engine engines[ENGINES];
static pthread_t flusher;
static uint8_t *mirror;
static _Atomic int stop;

/* What a migration does by design: reads pages that devices write. */
__attribute__((no_sanitize("thread"), noinline)) static void copy_page(uint8_t *to, const uint8_t *from)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(const void *)from;
    for (unsigned i = 0; i < 512; i++)
        ((volatile uint64_t *)(void *)to)[i] = words[i];
}

static void *run_engine(void *arg)
{
    struct engine *e = arg;
    uint64_t own = AREA / ENGINES / 4096 * 4096, first = e->base + (uint64_t)(e - engines) * own;
    while (!atomic_load(&stop)) {
        struct pv_dma dma;
        uint64_t pattern = next_random(&e->random), size = 1 + pattern % (3 * 4096);
        /* Few pages, so that most writes find their translation cached. */
        uint64_t at = first + next_random(&e->random) % 8 * 4096, source = first + own / 2;
        if (next_random(&e->random) % 64 == 0)
            at = first + next_random(&e->random) % (own / 2);
        int result = pattern & 1 ? pv_bus_fill(e->bus, at, &pattern, size, &dma)
                                 : pv_bus_move(e->bus, at, source, size, &dma);
        e->aborted += result != 0;
        if (next_random(&e->random) % 8 == 0) /* cached for reading: the next write must be seen all the same */
            pv_bus_read(e->bus, source + next_random(&e->random) % 8 * 4096, &(uint8_t){0}, 1, &dma);
    }
    return NULL;
}

static void *run_flusher(void *arg)
{
    uint64_t random = 99, page = WINDOW + 2 * AREA, unmapped;
    (void)arg;
    while (!atomic_load(&stop)) {
        CHECK(!pt_map_range(stage1, page, BASE, 4096, PT_READ));
        CHECK(!pt_unmap_range(stage1, page, 4096, &unmapped) && unmapped == 4096);
        pv_iommu_invalidate_pages(paging, (WINDOW >> 12) + next_random(&random) % PAGES, 3);
        pt_release_detached(stage1);
        sched_yield();
    }
    return NULL;
}

static uint64_t harvest(void)
{
    uint64_t bitmap[PAGES / 64] = {0}, leaves, reported = 0;
    CHECK(!pt_read_clear_dirty(stage2, BASE, AREA, bitmap, 0, &leaves));
    if (leaves)
        pv_iommu_invalidate_stage2(iommu);
    for (uint64_t page = 0; page < PAGES; page++) {
        if (bitmap[page / 64] >> page % 64 & 1) {
            uint64_t gpa = BASE + page * 4096;
            copy_page(mirror + page * 4096, pv_space_at(pv_memory_guest_space(memory), gpa, 4096));
            reported++;
        }
    }
    return reported;
}

/* Leaves change size under the engines; what is dirty must not be lost by a split. */
static void change_sizes(uint64_t *random)
{
    uint64_t at = BASE + next_random(random) % (AREA / PV_BLOCK_SIZE) * PV_BLOCK_SIZE;
    CHECK(!pt_split_range(stage2, at, PV_BLOCK_SIZE));
    pv_iommu_invalidate_stage2(iommu);
}

static struct pt_table *new_table(int format, bool host)
{
    int error;
    struct pt_config config = {.format = format,
                               .levels = 4,
                               .space = host ? pv_memory_host_space(memory) : pv_memory_guest_space(memory),
                               .owner = memory,
                               .alloc_page = host ? pv_memory_host_page : pv_memory_guest_page,
                               .free_page = host ? pv_memory_host_page_free : pv_memory_guest_page_free};
    struct pt_table *table = pt_create(&config, &error);
    CHECK(table);
    return table;
}

static void build(int format)
{
    int error;
    memory = pv_memory_create(RAM, 4 * MIB, 5, &error);
    CHECK(memory);
    stage2 = new_table(format, true);
    stage1 = new_table(PT_X86_64, false);
    for (uint64_t gpa = 0; gpa < RAM; gpa += PV_BLOCK_SIZE)
        CHECK(!pt_map_range(stage2, gpa, pv_memory_gpa_to_hpa(memory, gpa), PV_BLOCK_SIZE, PT_READ | PT_WRITE));
    CHECK(!pt_map_range(stage1, WINDOW, BASE, AREA, PT_READ | PT_WRITE));
    iommu = pv_iommu_create(memory, format, pt_top(stage2) & ~4095ull, 4);
    identity = pv_domain_create(iommu, 1);
    paging = pv_domain_create(iommu, 2);
    mirror = calloc(1, AREA);
    CHECK(iommu && identity && paging && mirror);
    CHECK(!pv_domain_configure(identity, PV_DOMAIN_IDENTITY, 0, 0));
    CHECK(!pv_domain_configure(paging, PV_DOMAIN_PAGING, pt_top(stage1) & ~4095ull, 4));
    for (unsigned i = 0; i < ENGINES; i++) {
        engines[i] = (struct engine){.bus = pv_requester_create(iommu, i), .base = i ? WINDOW : BASE, .random = 7 + i};
        CHECK(engines[i].bus && !pv_requester_attach(engines[i].bus, i ? paging : identity));
    }
}

static void take_down(void)
{
    for (unsigned i = 0; i < ENGINES; i++)
        pv_bus_destroy(engines[i].bus);
    pv_domain_release(identity);
    pv_domain_release(paging);
    pv_iommu_destroy(iommu);
    pt_destroy(stage1);
    pt_destroy(stage2);
    pv_memory_destroy(memory);
    free(mirror);
}

static void run(int format, uint64_t duration_ns)
{
    uint64_t random = 4711, rounds = 0, reported = 0, merged = 0, cycles = 0;
    build(format);
    atomic_store(&stop, 0);
    uint64_t start = now_ns();
    for (unsigned i = 0; i < ENGINES; i++)
        CHECK(!pthread_create(&engines[i].thread, NULL, run_engine, &engines[i]));
    CHECK(!pthread_create(&flusher, NULL, run_flusher, NULL));
    while (now_ns() < start + duration_ns || ((cycles < 2 || reported < 100) && now_ns() < start + PATIENCE_NS)) {
        change_sizes(&random);
        reported += harvest();
        if (++rounds % 8)
            continue;
        /* A merge may lose what is marked meanwhile: all of it counts as written. */
        uint64_t count;
        CHECK(!pt_merge_range(stage2, BASE, AREA, &count));
        pv_iommu_invalidate_stage2(iommu);
        pt_release_detached(stage2);
        for (uint64_t page = 0; page < PAGES; page++)
            copy_page(mirror + page * 4096, pv_space_at(pv_memory_guest_space(memory), BASE + page * 4096, 4096));
        merged += count;
        cycles++;
    }
    atomic_store(&stop, 1);
    for (unsigned i = 0; i < ENGINES; i++)
        CHECK(!pthread_join(engines[i].thread, NULL) && !engines[i].aborted);
    pthread_join(flusher, NULL);
    harvest();
    CHECK(!harvest());
    CHECK(!memcmp(mirror, pv_space_at(pv_memory_guest_space(memory), BASE, AREA), AREA));
    printf("format %d: %lu rounds, %lu pages reported, %lu leaves merged\n", format, rounds, reported, merged);
    CHECK(reported > 100 && merged); /* else nothing was tested */
    take_down();
}

int main(int argc, char **argv)
{
    uint64_t ns = (argc > 1 ? strtoull(argv[1], NULL, 10) : 1000) * 1000000 / 2;
    run(PT_VTDSS, ns);
    run(PT_AMDV1, ns);
    return 0;
}
