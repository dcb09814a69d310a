/*
 * Random maps and unmaps of one table, and an account of every table page: none is lost, none is handed back twice or while
 * the hardware could still reach it.
 *
 * The auditor reads the entries as a walker does and knows nothing of the nodes beside the table pages: what it reaches is
 * what the table says it uses, every page of it is handed out, and the leaves cover the bytes that maps and unmaps left.
 * A page that is handed back is poisoned at once. Argument: how many operations for each format.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "c_program.h"
#include "memory/memory.h"
#include "pagetable/format.h"
#include "pagetable/pagetable.h"

#define PAGES 4096
#define FEW 160 /* all the pages there are for a while: maps fail half way */
#define ARENA 0x40000000ull
#define POISON 0xdb
#define AUDIT_EVERY 16384
#define BASES 6
#define RECENT 1024 /* maps that an unmap may be aimed at */
#define M2 (1ull << 21)
#define G1 (1ull << 30)

struct arena {
    struct pv_space space;
    bool out[PAGES];
    uint32_t free[PAGES], count, limit, used;
    uint64_t refused;
};

struct shape {
    int format;
    uint32_t levels;
    uint64_t sizes, bases[BASES];
};

struct range {
    uint64_t iova, size;
};

struct audit {
    uint64_t tables, bytes;
};

static uint8_t *page_at(const struct arena *a, uint32_t page)
{
    return a->space.window[0].ptr + page * 4096ull;
}

static uint64_t take_page(void *owner)
{
    struct arena *a = owner;
    if (a->used >= a->limit) {
        a->refused++;
        return PV_PHYS_NONE;
    }
    uint32_t page = a->free[--a->count];
    const uint8_t *at = page_at(a, page);
    CHECK(!a->out[page]);
    CHECK(at[0] == POISON && !memcmp(at, at + 1, 4095)); /* nobody wrote it since it was handed back */
    a->out[page] = true;
    a->used++;
    memset(page_at(a, page), 0, 4096);
    return ARENA + page * 4096ull;
}

static void give_page(void *owner, uint64_t phys)
{
    struct arena *a = owner;
    uint64_t page = (phys - ARENA) / 4096;
    CHECK(phys % 4096 == 0 && page < PAGES && a->out[page]);
    a->out[page] = false;
    a->used--;
    memset(page_at(a, (uint32_t)page), POISON, 4096);
    a->free[a->count++] = (uint32_t)page;
}

static struct arena *new_arena(void)
{
    struct arena *a = calloc(1, sizeof(*a));
    uint8_t *memory = aligned_alloc(4096, PAGES * 4096ull);
    CHECK(a && memory);
    memset(memory, POISON, PAGES * 4096ull);
    a->space.window[0] = (struct pv_window){ARENA, PAGES * 4096ull, memory};
    a->limit = PAGES;
    for (uint32_t page = 0; page < PAGES; page++)
        a->free[a->count++] = page;
    return a;
}

static void audit_table(const struct arena *a, int format, unsigned level, uint64_t phys, bool root, struct audit *found)
{
    uint64_t page = (phys - ARENA) / 4096;
    unsigned present = 0;
    CHECK(phys % 4096 == 0 && page < PAGES && a->out[page]);
    const uint64_t *entries = (const uint64_t *)(const void *)page_at(a, (uint32_t)page);
    found->tables++;
    for (unsigned i = 0; i < PT_ENTRIES; i++) {
        struct pt_entry e = pt_decode(format, entries[i], level);
        if (!e.present)
            continue;
        CHECK(!e.reserved);
        present++;
        if (e.leaf) /* amdv1 repeats the entry of a page that is wider than its slot */
            found->bytes += 1ull << pt_item_lg2(level);
        else
            audit_table(a, format, e.next_level, e.addr, false, found);
    }
    CHECK(root || present); /* an empty table is no use to anybody */
}

static void audit(const struct arena *a, const struct pt_table *table, int format, uint64_t bytes)
{
    struct audit found = {0, 0};
    struct pt_stats stats;
    uint64_t top = pt_top(table);
    audit_table(a, format, top & 7, top & PT_ADDRESS, true, &found);
    pt_get_stats(table, &stats);
    CHECK(found.tables == stats.tables);
    CHECK(found.bytes == bytes);
    CHECK(a->used == stats.tables + stats.detached);
}

/* Where and how much: mostly few pages, now and then many, or large ones. */
static void choose(const struct shape *shape, uint64_t *random, uint64_t *iova, uint64_t *size)
{
    uint64_t kind = next_random(random) % 64;
    *iova = shape->bases[next_random(random) % BASES];
    if (kind < 48) {
        *iova += next_random(random) % 64 * M2 + next_random(random) % 512 * 4096;
        *size = (1 + next_random(random) % (kind < 24 ? 4 : 64)) * 4096;
    } else if (kind < 63) {
        *iova += next_random(random) % 512 * M2;
        *size = (1 + next_random(random) % 8) * M2 + next_random(random) % 4 * 4096;
    } else {
        *iova += next_random(random) % 4 * G1;
        *size = (1 + next_random(random) % 2) * G1;
    }
}

static uint64_t one_map(struct pt_table *table, const struct shape *shape, uint64_t *random, struct range *made)
{
    choose(shape, random, &made->iova, &made->size);
    uint64_t phys = next_random(random) % 2 ? made->iova & (G1 * 1024 - 1) : next_random(random) % (1u << 28) * 4096;
    uint32_t perm = next_random(random) % 2 ? PT_READ : PT_READ | PT_WRITE;
    int error = pt_map_range(table, made->iova, phys, made->size, perm);
    CHECK(!error || error == -EADDRINUSE || error == -ENOMEM);
    return error ? 0 : made->size;
}

/* Something that was mapped, all of it or a part; or whatever lies somewhere. */
static uint64_t one_unmap(struct pt_table *table, const struct shape *shape, uint64_t *random, struct range range)
{
    uint64_t unmapped, kind = next_random(random) % 8;
    if (!range.size || kind == 0)
        choose(shape, random, &range.iova, &range.size);
    else if (kind == 1)
        range.size = (1 + next_random(random) % (range.size / 4096)) * 4096;
    CHECK(!pt_unmap_range(table, range.iova, range.size, &unmapped));
    return unmapped;
}

static void churn(const struct shape *shape, uint64_t operations)
{
    struct arena *a = new_arena();
    struct pt_config config = {.format = shape->format, .levels = shape->levels, .pgsize_bitmap = shape->sizes,
                               .space = &a->space, .owner = a, .alloc_page = take_page, .free_page = give_page};
    uint64_t random = 88172645463325252ull + (unsigned)shape->format, bytes = 0, unmapped, maps = 0, unmaps = 0;
    struct range recent[RECENT] = {{0, 0}};
    uint32_t most = 0;
    int error;
    struct pt_table *table = pt_create(&config, &error);
    CHECK(table);
    for (uint64_t n = 0; n < operations; n++) {
        uint64_t action = next_random(&random) % 64;
        if (n % 65536 == 0)
            a->limit = n / 65536 % 2 ? FEW : PAGES;
        if (action < 30) {
            struct range made;
            uint64_t mapped = one_map(table, shape, &random, &made);
            if (mapped)
                recent[maps % RECENT] = made;
            bytes += mapped;
            maps += mapped != 0;
        } else if (action < 62) {
            unmapped = one_unmap(table, shape, &random, recent[next_random(&random) % RECENT]);
            bytes -= unmapped;
            unmaps += unmapped != 0;
        } else {
            pt_release_detached(table);
        }
        most = a->used > most ? a->used : most;
        if (n % AUDIT_EVERY == 0)
            audit(a, table, shape->format, bytes);
    }
    for (unsigned base = 0; base < BASES; base++) {
        CHECK(!pt_unmap_range(table, shape->bases[base], 8 * G1, &unmapped));
        bytes -= unmapped;
    }
    CHECK(!bytes);
    audit(a, table, shape->format, 0);
    pt_release_detached(table);
    CHECK(a->used == 1); /* the root */
    pt_destroy(table);
    CHECK(!a->used && a->count == PAGES);
    printf("format %d: maps %llu, unmaps %llu, refused pages %llu, most pages %u\n", shape->format,
           (unsigned long long)maps, (unsigned long long)unmaps, (unsigned long long)a->refused, most);
    CHECK(!operations || (maps > operations / 20 && unmaps > operations / 20));
    free(a->space.window[0].ptr);
    free(a);
}

int main(int argc, char **argv)
{
    static const struct shape shapes[] = {
        {PT_X86_64, 4, 0, {0, 0x80000000, 1ull << 36, (1ull << 39) - 8 * G1, 1ull << 46, (1ull << 48) - 8 * G1}},
        {PT_X86_64, 5, 4096, {0, 0x80000000, 1ull << 36, (1ull << 48) - 8 * G1, 1ull << 50, (1ull << 57) - 8 * G1}},
        {PT_VTDSS, 4, 0, {0, 0x80000000, 1ull << 36, (1ull << 39) - 8 * G1, 1ull << 46, (1ull << 48) - 8 * G1}},
        {PT_AMDV1, 1, 0, {0, 0x80000000, 1ull << 36, (1ull << 48) - 8 * G1, 1ull << 57, (1ull << 63) - 8 * G1}},
    };
    uint64_t operations = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000;
    for (unsigned i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        churn(&shapes[i], operations);
    return 0;
}
