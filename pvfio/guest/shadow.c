/* The passes of shadow.h: one loop over places, a place being the span on which both tables say one thing. */
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "../pagetable/format.h"
#include "shadow.h"

enum pass { COMPARE, REMOVE, ADD };

/* What a table says about an IOVA, and about the bytes behind it up to the end of the entry that says so. */
struct saying {
    uint64_t gpa;
    uint64_t left; /* bytes, from the IOVA on */
    uint64_t size; /* of the page */
    uint32_t perm;
    bool present;
    bool dangling;
};

static uint64_t rest_of(uint64_t at, uint64_t size)
{
    return size - (at & (size - 1));
}

static struct saying ask_table(const struct pt_table *table, uint64_t at)
{
    struct pt_walk_entry steps[PT_MAX_LEVELS];
    struct saying said = {.left = PV_PAGE_SIZE};
    uint32_t count = pt_walk(table, at, steps);
    if (count == 0)
        return said;
    const struct pt_walk_entry *last = &steps[count - 1];
    said.size = 1ull << last->size_lg2;
    said.left = rest_of(at, said.size);
    said.present = last->present && last->leaf && !last->reserved;
    if (said.present) {
        said.gpa = last->addr + (at & (said.size - 1));
        said.perm = last->perm;
    }
    return said;
}

/* One entry of the user's table. False where its page is not memory that the parent lets a device read. */
static bool read_entry(const struct pv_shadow *shadow, uint64_t table, unsigned index, uint64_t *entry)
{
    struct saying page = ask_table(shadow->parent, table);
    if (!page.present || !(page.perm & PT_READ))
        return false;
    const uint8_t *memory = pv_space_ptr(shadow->space, page.gpa, PV_PAGE_SIZE);
    if (memory == NULL)
        return false;
    *entry = atomic_load_explicit((const _Atomic uint64_t *)(const void *)memory + index, memory_order_acquire);
    return true;
}

/* What the user's table and the parent say together. */
static struct saying ask_user(const struct pv_shadow *shadow, uint64_t at)
{
    uint64_t table = shadow->root;
    uint32_t perm = PT_READ | PT_WRITE;
    struct saying said = {0};
    for (unsigned level = shadow->levels; level > 0; level--) {
        uint64_t span = 1ull << pt_item_lg2(level);
        uint64_t raw;
        said.left = rest_of(at, span);
        if (!read_entry(shadow, table, pt_index(level, at), &raw)) {
            said.dangling = true;
            return said;
        }
        struct pt_entry entry = pt_decode(PT_X86_64, raw, level);
        if (!entry.present || entry.reserved)
            return said;
        perm &= entry.perm;
        if (!entry.leaf) {
            table = entry.addr;
            continue;
        }
        uint64_t middle = entry.addr + (at & (span - 1));
        struct saying below = ask_table(shadow->parent, middle);
        if (below.left < said.left)
            said.left = below.left;
        said.dangling = !below.present;
        said.perm = perm & below.perm;
        said.present = below.present && said.perm != 0;
        said.gpa = below.gpa;
        return said;
    }
    return said;
}

static int remove_page(const struct pv_shadow *shadow, uint64_t at, uint64_t size, struct pv_shadow_result *out)
{
    uint64_t start = at & ~(size - 1);
    uint64_t unmapped;
    int error = pt_unmap_range(shadow->table, start, size, &unmapped);
    if (error)
        return error;
    if (start < out->first)
        out->first = start;
    if (start + (size - 1) > out->last)
        out->last = start + (size - 1);
    return 0;
}

static bool same(const struct saying *want, const struct saying *have)
{
    return want->present && have->present && want->gpa == have->gpa && want->perm == have->perm;
}

static int settle(const struct pv_shadow *shadow, enum pass pass, uint64_t at, uint64_t size, const struct saying *want,
                  const struct saying *have, struct pv_shadow_result *out)
{
    out->dangling += want->dangling;
    if (same(want, have)) {
        out->same += size;
        return 0;
    }
    if (!have->present) {
        if (!want->present)
            return 0;
        out->missing += size;
        return pass == ADD ? pt_map_range(shadow->table, at, want->gpa, size, want->perm) : 0;
    }
    bool whole = !want->present && size == have->size;
    *(whole ? &out->stale : &out->changed) += size;
    return pass == REMOVE ? remove_page(shadow, at, have->size, out) : 0;
}

static int run(const struct pv_shadow *shadow, enum pass pass, uint64_t first, uint64_t last, uint64_t budget,
               struct pv_shadow_result *out)
{
    *out = (struct pv_shadow_result){.first = UINT64_MAX};
    uint64_t reach = (1ull << (12 + 9 * shadow->levels)) - 1;
    last = last < reach ? last : reach;
    for (uint64_t at = first & ~(uint64_t)(PV_PAGE_SIZE - 1); at <= last;) {
        if (budget-- == 0)
            return -ENOSPC;
        struct saying want = ask_user(shadow, at);
        struct saying have = ask_table(shadow->table, at);
        uint64_t size = want.left < have.left ? want.left : have.left;
        if (size - 1 > last - at)
            size = ((last - at) | (PV_PAGE_SIZE - 1)) + 1;
        int error = settle(shadow, pass, at, size, &want, &have, out);
        if (error)
            return error;
        if (size > UINT64_MAX - at)
            break;
        at += size;
    }
    return 0;
}

int pv_shadow_compare(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                      struct pv_shadow_result *out)
{
    return run(shadow, COMPARE, first, last, budget, out);
}

int pv_shadow_remove(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                     struct pv_shadow_result *out)
{
    return run(shadow, REMOVE, first, last, budget, out);
}

int pv_shadow_add(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                  struct pv_shadow_result *out)
{
    return run(shadow, ADD, first, last, budget, out);
}
