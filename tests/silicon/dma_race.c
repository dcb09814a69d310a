/*
 * Engine threads that write through the IOMMU without a pause, beside threads that map, unmap, flush, attach and destroy,
 * that switch ATS in the devices, and one that keeps the host's dirty log: over stage 2 of both platforms.
 *
 * The checker knows nothing of translation: whenever an invalidation or an attach has returned, it marks the memory that
 * is nobody's any more, and finds its mark untouched later. Under ThreadSanitizer the marks themselves race with any
 * DMA that the handshake did not order before them. Arguments: milliseconds, and how many unmaps at least, on each platform.
 */
#include <errno.h>
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
#define RAM LOG_RAM
#define WINDOW 0x2000000000ull
#define SLOT (2 * MIB)
#define SLOTS 3
#define BUFFERS (2 * SLOTS)
#define SIDES 2
#define ENGINES 2          /* of a side */
#define PART (SLOT / ENGINES) /* of a slot: what one engine writes */
#define PIECE 65536
#define HOT (WINDOW + SLOTS * SLOT) /* a page that is mapped, flushed and mapped elsewhere all the time */
#define PATIENCE_NS 60000000000
#define PATIENCE_PER_UNMAP_NS 5000000
#define HOT_TURNS 200
#define MARK 0x5a
#define DMA_BYTE 0xa5

#include "race_log.h"

struct buffer {
    uint64_t gpa;
    int64_t extent;
    uint8_t *at; /* in the host's view, as DMA sees it */
    bool busy;
    unsigned judged; /* in which run of the dirty log nothing has written it since; 0: in none */
};

struct engine {
    struct pv_bus *bus;
    _Atomic uint64_t target; /* the first slot it writes | how many there are */
    _Atomic bool park, parked;
    unsigned number;
    pthread_t thread;
};

/* Pages for tables, given to everybody at one address: so a page that is used again too early is a race as well. */
struct pages {
    struct pv_space space;
    struct buffer buffer;
    uint32_t free[SLOT / 4096], count;
};

/* One IO address space, its engines, and the thread that changes it. */
struct side {
    struct pv_domain *domain;
    struct pt_table *table;
    struct pages pages;
    struct engine engine[ENGINES];
    struct buffer buffer[BUFFERS], bare, hot; /* `bare` is reached through the identity domain */
    struct buffer *slot[SLOTS];
    bool small[SLOTS]; /* mapped in 4 KiB pages */
    unsigned unmaps, pieces, turns, moves, written, hot_written, logged;
    uint32_t id;
    uint64_t random;
    pthread_t thread;
};

static struct pv_memory *memory;
static struct pv_iommu *iommu;
static struct pv_domain *identity;
static struct race_log dirty = {.lock = PTHREAD_MUTEX_INITIALIZER};
static struct side sides[SIDES];
static _Atomic int engines_stop;
static uint64_t end_ns, unmaps_wanted; /* of a side */

static struct buffer new_buffer(void)
{
    uint64_t vaddr;
    struct pv_run run;
    int64_t extent = pv_memory_alloc(memory, SLOT, SLOT, 0, &vaddr);
    CHECK(extent >= 0);
    CHECK(pv_memory_runs(memory, vaddr, SLOT, &run, 1) == 1);
    struct buffer buffer = {.gpa = run.gpa, .extent = extent};
    buffer.at = pv_space_at(pv_memory_host_space(memory), pv_memory_gpa_to_hpa(memory, run.gpa), SLOT);
    CHECK(buffer.at);
    memset(buffer.at, MARK, SLOT);
    return buffer;
}

static struct pt_table *new_table(struct pt_config config)
{
    int error;
    config.levels = 4;
    struct pt_table *table = pt_create(&config, &error);
    CHECK(table);
    return table;
}

static struct pt_table *new_stage2(int format)
{
    struct pt_table *table = new_table((struct pt_config){.format = format,
                                                          .space = pv_memory_host_space(memory),
                                                          .owner = memory,
                                                          .alloc_page = pv_memory_host_page,
                                                          .free_page = pv_memory_host_page_free});
    for (uint64_t gpa = 0; gpa < RAM; gpa += PV_BLOCK_SIZE)
        CHECK(!pt_map_range(table, gpa, pv_memory_gpa_to_hpa(memory, gpa), PV_BLOCK_SIZE, PT_READ | PT_WRITE));
    return table;
}

static uint64_t take_page(void *owner)
{
    struct pages *p = owner;
    CHECK(p->count);
    uint64_t offset = p->free[--p->count] * 4096ull;
    memset(p->space.window[0].ptr + offset, 0, 4096);
    return p->space.window[0].start + offset;
}

static void give_page(void *owner, uint64_t gpa)
{
    struct pages *p = owner;
    p->free[p->count++] = (uint32_t)((gpa - p->space.window[0].start) / 4096);
}

static struct pt_table *new_stage1(struct pages *pages)
{
    return new_table((struct pt_config){
        .format = PT_X86_64, .space = &pages->space, .owner = pages, .alloc_page = take_page, .free_page = give_page});
}

/* All of it is MARK. */
static void check_mark(const uint8_t *at, uint64_t size)
{
    CHECK(at[0] == MARK && !memcmp(at, at + 1, size - 1));
}

/* The memory has just become nobody's. */
static void retire(struct side *s, struct buffer *b)
{
    s->written += memchr(b->at, DMA_BYTE, SLOT) != NULL;
    s->logged += log_judge(&dirty, b->gpa, b->at, SLOT, false, &b->judged);
    memset(b->at, MARK, SLOT);
    b->busy = false;
}

static void *run_engine(void *arg)
{
    struct engine *e = arg;
    uint64_t random = 77 + e->number, pattern;
    memset(&pattern, DMA_BYTE, sizeof(pattern));
    while (!atomic_load(&engines_stop)) {
        struct pv_dma dma;
        while (atomic_load(&e->park)) {
            atomic_store(&e->parked, true);
            sched_yield();
        }
        atomic_store(&e->parked, false);
        sched_yield(); /* rather here than with a section open, for which a flush would wait */
        for (unsigned i = 0; i < 16; i++)
            pv_bus_fill(e->bus, HOT + e->number * 64, &pattern, 64, &dma);
        uint64_t target = atomic_load(&e->target), slots = target % SLOT;
        uint64_t at = target - slots + next_random(&random) % slots * SLOT + e->number * PART;
        uint64_t most = 64ull << next_random(&random) % 14; /* 64 bytes to half a megabyte: mostly short */
        uint64_t size = 1 + next_random(&random) % (most < PART / 4 ? most : PART / 4), offset = next_random(&random) % (PART / 4);
        uint64_t other = PART / 2 + next_random(&random) % (PART / 4);
        if (next_random(&random) % 2)
            pv_bus_fill(e->bus, at + offset, &pattern, size, &dma);
        else
            pv_bus_move(e->bus, at + other, at + offset, size, &dma);
    }
    return NULL;
}

static struct buffer *free_buffer(struct side *s)
{
    struct buffer *b;
    do
        b = &s->buffer[next_random(&s->random) % BUFFERS];
    while (b->busy);
    check_mark(b->at, SLOT);
    log_check_clean(&dirty, b->gpa, SLOT, b->judged);
    b->busy = true;
    return b;
}

static void map_slot(struct side *s, unsigned slot)
{
    uint64_t iova = WINDOW + slot * SLOT;
    struct buffer *b = s->slot[slot] = free_buffer(s);
    s->small[slot] = next_random(&s->random) % 2;
    uint64_t step = s->small[slot] ? 4096 : SLOT;
    for (uint64_t at = 0; at < SLOT; at += step)
        CHECK(!pt_map_range(s->table, iova + at, b->gpa + at, step, PT_READ | PT_WRITE));
}

static void unmap(struct side *s, uint64_t iova, uint64_t size, unsigned shift)
{
    uint64_t unmapped;
    CHECK(!pt_unmap_range(s->table, iova, size, &unmapped) && unmapped == size);
    pv_iommu_invalidate_pages(s->domain, iova >> 12, shift);
    pt_release_detached(s->table);
}

static void unmap_slot(struct side *s, unsigned slot)
{
    uint64_t iova = WINDOW + slot * SLOT;
    struct buffer *b = s->slot[slot];
    if (s->small[slot]) { /* a piece first: the rest stays, and is written on */
        uint64_t piece = next_random(&s->random) % (SLOT / PIECE) * PIECE;
        unsigned judged;
        unmap(s, iova + piece, PIECE, 4);
        s->logged += log_judge(&dirty, b->gpa + piece, b->at + piece, PIECE, false, &judged);
        memset(b->at + piece, MARK, PIECE);
        for (unsigned i = next_random(&s->random) % 2; i; i--)
            sched_yield();
        check_mark(b->at + piece, PIECE);
        log_check_clean(&dirty, b->gpa + piece, PIECE, judged);
        CHECK(!pt_map_range(s->table, iova + piece, b->gpa + piece, PIECE, PT_READ | PT_WRITE));
        s->pieces++;
    }
    unmap(s, iova, SLOT, 9);
    retire(s, b);
    s->slot[slot] = NULL;
    s->unmaps++;
}

/* A translation that was looked up just before the flush must not be remembered just after it. */
static void turn_hot_page(struct side *s)
{
    for (unsigned i = 0; i < HOT_TURNS; i++) {
        uint64_t page = i % 16 * 4096;
        uint8_t *at = s->hot.at + page;
        check_mark(at, ENGINES * 64);
        CHECK(!pt_map_range(s->table, HOT, s->hot.gpa + page, 4096, PT_READ | PT_WRITE));
        for (unsigned wait = next_random(&s->random) % 64; wait; wait--)
            __builtin_ia32_pause();
        if (next_random(&s->random) % 4 == 0)
            sched_yield();
        unmap(s, HOT, 4096, 0);
        if (i % 8 == 0)
            s->logged += log_judge(&dirty, s->hot.gpa + page, at, 4096, false, &s->hot.judged);
        s->hot_written += memchr(at, DMA_BYTE, ENGINES * 64) != NULL;
        memset(at, MARK, ENGINES * 64);
        s->turns++;
    }
}

static void attach_all(struct side *s, struct pv_domain *domain)
{
    for (unsigned i = 0; i < ENGINES; i++)
        CHECK(!pv_requester_attach(s->engine[i].bus, domain));
}

/* Through the identity domain for a while, and back. */
static void go_bare(struct side *s)
{
    check_mark(s->bare.at, SLOT);
    for (unsigned i = 0; i < ENGINES; i++)
        atomic_store(&s->engine[i].target, s->bare.gpa | 1);
    attach_all(s, identity);
    for (unsigned i = 0; i < SLOTS; i++)
        if (s->slot[i]) { /* not reachable now, mapped or not */
            retire(s, s->slot[i]);
            s->slot[i]->busy = true;
        }
    sched_yield();
    for (unsigned i = 0; i < SLOTS; i++)
        if (s->slot[i])
            check_mark(s->slot[i]->at, SLOT);
    attach_all(s, s->domain);
    for (unsigned i = 0; i < ENGINES; i++)
        atomic_store(&s->engine[i].target, WINDOW | SLOTS);
    retire(s, &s->bare);
}

/* The engines stand still with all they have cached, while the log is judged, and then write the same memory again. */
static void judge_mapped(struct side *s, struct buffer *b)
{
    for (unsigned i = 0; i < ENGINES; i++)
        atomic_store(&s->engine[i].park, true);
    for (unsigned i = 0; i < ENGINES; i++)
        while (!atomic_load(&s->engine[i].parked))
            sched_yield();
    s->logged += log_judge(&dirty, b->gpa, b->at, SLOT, true, &b->judged);
    memset(b->at, MARK, SLOT);
    for (unsigned i = 0; i < ENGINES; i++)
        atomic_store(&s->engine[i].park, false);
}

/* The unit is 4 KiB, or now and then twice that, so that single pages are of no use to the device. */
static void switch_ats(struct side *s)
{
    struct pv_bus *bus = s->engine[next_random(&s->random) % ENGINES].bus;
    pv_bus_ats(bus, next_random(&s->random) % 4 != 0, next_random(&s->random) % 4 == 0);
    pv_requester_allow_ats(bus, next_random(&s->random) % 8 != 0);
}

static bool used_ats(const struct side *s)
{
    struct pv_atc_stats stats;
    uint64_t hits = 0;
    for (unsigned e = 0; e < ENGINES; e++) {
        pv_requester_atc_stats(s->engine[e].bus, &stats);
        hits += stats.hits;
    }
    return hits > 0;
}

/* Migrations, one after the other. */
static void *run_log(void *arg)
{
    uint64_t random = 4711;
    (void)arg;
    while (!atomic_load(&engines_stop)) {
        log_start(&dirty);
        for (unsigned n = 1 + next_random(&random) % 8; n; n--) {
            for (unsigned i = next_random(&random) % 64; i; i--)
                sched_yield();
            log_harvest(&dirty);
        }
        log_stop(&dirty);
        for (unsigned i = next_random(&random) % 64; i; i--)
            sched_yield();
    }
    return NULL;
}

/* A new domain, with the tag of the old one as likely as not, and other memory behind the same addresses. */
static void change_domain(struct side *s)
{
    attach_all(s, NULL);
    for (unsigned i = 0; i < SLOTS; i++)
        if (s->slot[i]) {
            retire(s, s->slot[i]);
            s->slot[i] = NULL;
        }
    CHECK(!pv_domain_destroy(s->domain));
    pt_destroy(s->table);
    s->table = new_stage1(&s->pages);
    s->domain = pv_domain_create(iommu, s->id++);
    CHECK(s->domain && !pv_domain_configure(s->domain, PV_DOMAIN_PAGING, pt_top(s->table) & ~4095ull, 4));
    attach_all(s, s->domain);
    s->moves++;
}

/* On a busy machine a side goes on until it has seen what it came for, within reason. */
static bool goes_on(const struct side *s)
{
    uint64_t now = now_ns();
    bool seen = s->written && s->hot_written && s->logged && used_ats(s);
    seen = seen && s->unmaps && s->unmaps + s->pieces + s->turns >= unmaps_wanted;
    return now < end_ns || (!seen && now < end_ns + PATIENCE_NS + unmaps_wanted * PATIENCE_PER_UNMAP_NS);
}

static void *run_side(void *arg)
{
    struct side *s = arg;
    while (goes_on(s)) {
        unsigned action = next_random(&s->random) % 16, slot = next_random(&s->random) % SLOTS;
        if (action == 0)
            change_domain(s);
        else if (action == 1)
            go_bare(s);
        else if (action == 2)
            pv_iommu_invalidate_domain(s->domain);
        else if (action == 4)
            switch_ats(s);
        else if (action == 5 && s->slot[slot])
            judge_mapped(s, s->slot[slot]);
        else if (action == 3)
            turn_hot_page(s);
        else if (s->slot[slot])
            unmap_slot(s, slot);
        else
            map_slot(s, slot);
        for (unsigned i = next_random(&s->random) % 4; i; i--)
            sched_yield();
    }
    return NULL;
}

static void build_side(struct side *s, unsigned number)
{
    *s = (struct side){.random = 12345 + number, .id = 1000 * (number + 1)};
    struct buffer pages = s->pages.buffer = new_buffer();
    s->pages.space.window[0] = (struct pv_window){pages.gpa, SLOT, pages.at};
    for (uint32_t p = 0; p < SLOT / 4096; p++)
        give_page(&s->pages, pages.gpa + p * 4096ull);
    s->table = new_stage1(&s->pages);
    s->domain = pv_domain_create(iommu, s->id++);
    CHECK(s->domain && !pv_domain_configure(s->domain, PV_DOMAIN_PAGING, pt_top(s->table) & ~4095ull, 4));
    for (unsigned b = 0; b < BUFFERS; b++)
        s->buffer[b] = new_buffer();
    s->bare = new_buffer();
    s->hot = new_buffer();
    for (unsigned e = 0; e < ENGINES; e++) {
        struct pv_bus *bus = pv_requester_create(iommu, 10 * number + e);
        CHECK(bus);
        s->engine[e] = (struct engine){.bus = bus, .target = WINDOW | SLOTS, .number = e};
        pv_requester_allow_ats(bus, 1);
        pv_bus_ats(bus, e % 2, 0);
    }
    attach_all(s, s->domain);
}

static void build(int format)
{
    int error;
    memory = pv_memory_create(RAM, 16 * MIB, 5, &error);
    CHECK(memory);
    dirty.stage2 = new_stage2(format);
    iommu = pv_iommu_create(memory, format, pt_top(dirty.stage2) & ~4095ull, 4);
    CHECK(iommu);
    dirty.iommu = iommu;
    dirty.starts = dirty.harvests = 0;
    identity = pv_domain_create(iommu, 99);
    CHECK(identity && !pv_domain_configure(identity, PV_DOMAIN_IDENTITY, 0, 0));
    for (unsigned i = 0; i < SIDES; i++)
        build_side(&sides[i], i);
}

/* The creators' references first: whoever holds another keeps what it needs. */
static void take_down(void)
{
    for (unsigned i = 0; i < SIDES; i++)
        pt_destroy(sides[i].table);
    pt_destroy(dirty.stage2);
    pv_memory_destroy(memory);
    pv_iommu_destroy(iommu);
    pv_domain_release(identity);
    for (unsigned i = 0; i < SIDES; i++) {
        struct side *s = &sides[i];
        for (unsigned b = 0; b < BUFFERS; b++)
            pv_memory_release(memory, s->buffer[b].extent);
        pv_memory_release(memory, s->bare.extent);
        pv_memory_release(memory, s->hot.extent);
        pv_memory_release(memory, s->pages.buffer.extent);
        pv_domain_release(s->domain);
        for (unsigned e = 0; e < ENGINES; e++)
            pv_bus_destroy(s->engine[e].bus);
    }
}

static void report(const struct side *s)
{
    printf("unmaps: %u slots, %u pieces, %u hot pages; domains %u; written %u, hot %u; pages in the log %u, harvests %u\n",
           s->unmaps, s->pieces, s->turns, s->moves, s->written, s->hot_written, s->logged, dirty.harvests);
    CHECK(s->unmaps && s->written && s->hot_written && s->logged && used_ats(s)); /* else nothing was tested */
    CHECK(s->unmaps + s->pieces + s->turns >= unmaps_wanted);
}

static void race(int format, uint64_t milliseconds)
{
    struct pv_fault fault[64];
    uint64_t lost;
    pthread_t log;
    build(format);
    atomic_store(&engines_stop, 0);
    end_ns = now_ns() + milliseconds * 1000000;
    for (unsigned i = 0; i < SIDES; i++)
        for (unsigned e = 0; e < ENGINES; e++)
            CHECK(!pthread_create(&sides[i].engine[e].thread, NULL, run_engine, &sides[i].engine[e]));
    CHECK(!pthread_create(&log, NULL, run_log, NULL));
    for (unsigned i = 0; i < SIDES; i++)
        CHECK(!pthread_create(&sides[i].thread, NULL, run_side, &sides[i]));
    for (unsigned i = 0; i < SIDES; i++)
        pthread_join(sides[i].thread, NULL);
    pv_iommu_faults(iommu, fault, 64, &lost);
    atomic_store(&engines_stop, 1);
    pthread_join(log, NULL);
    for (unsigned i = 0; i < SIDES; i++) {
        for (unsigned e = 0; e < ENGINES; e++)
            pthread_join(sides[i].engine[e].thread, NULL);
        CHECK(pv_domain_destroy(sides[i].domain) == -EBUSY);
        report(&sides[i]);
    }
    take_down();
}

int main(int argc, char **argv)
{
    static const int formats[] = {PT_VTDSS, PT_AMDV1};
    uint64_t milliseconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    unmaps_wanted = (argc > 2 ? strtoull(argv[2], NULL, 10) : 0) / SIDES;
    for (unsigned i = 0; i < 2; i++)
        race(formats[i], milliseconds);
    return 0;
}
