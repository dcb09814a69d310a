/*
 * The hardware page walker (see walker.h): stage 1 in guest RAM, every table page of it reached through stage 2.
 *
 * Permissions of all levels and both stages are ANDed (Intel SDM 3A 4.6, VT-d 4.1 3.8, AMD IOMMU 2.2.3). Entries are read
 * as 64-bit atomics, once unless they change under the walker.
 *
 * The stage-2 leaf of a translation is marked by compare-and-swap, accessed always and dirty for a write, before the
 * translation is used (VT-d 4.1 3.7.2, AMD IOMMU 2.2.3). A translation of a clean leaf grants no writing, so a cached one
 * sends the first write here.
 *
 * Not modelled: accessed bits in entries that point to tables, updates of stage 1 (the guest writes its leaves marked),
 * paging-structure caches.
 */
#include "walker.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "../pagetable/format.h"

struct walk {
    const struct walk_host *host;
    struct pv_fault *fault;
    struct walk_recorder *recorder;
    bool mark;
};

static int abort_walk(struct walk *w, unsigned stage, unsigned level, unsigned reason)
{
    w->fault->stage = (uint8_t)stage;
    w->fault->level = (uint8_t)level;
    w->fault->reason = (uint8_t)reason;
    return -EFAULT;
}

static void record(struct walk *w, unsigned stage, unsigned depth, unsigned level, uint64_t table, uint64_t index,
                   uint64_t entry, const struct pt_entry *e)
{
    struct walk_recorder *r = w->recorder;
    if (!r || r->count >= r->max)
        return;
    r->steps[r->count++] = (struct pv_walk_step){.stage = (uint8_t)stage,
                                                 .level = (uint8_t)level,
                                                 .leaf = e->present && e->leaf,
                                                 .depth = (uint8_t)depth,
                                                 .table = table,
                                                 .index = index,
                                                 .entry = entry,
                                                 .output = e->present ? e->addr : 0};
}

static inline _Atomic uint64_t *entry_at(uint8_t *table, unsigned index)
{
    return (_Atomic uint64_t *)(void *)(table + 8 * index);
}

static inline uint64_t read_entry(uint8_t *table, unsigned index)
{
    return atomic_load_explicit(entry_at(table, index), memory_order_acquire);
}

/* Marks a stage-2 leaf as used. False: it is not what was read any more. */
static inline bool mark_leaf(int format, _Atomic uint64_t *at, uint64_t *entry, uint32_t perm)
{
    uint64_t marks = pt_accessed_bit(format) | (perm & PT_WRITE ? pt_dirty_bit(format) : 0);
    if (!(marks & ~*entry))
        return true;
    if (!atomic_compare_exchange_strong(at, entry, *entry | marks))
        return false;
    *entry |= marks;
    return true;
}

/* Bits of an address that a table of this many levels can translate. */
static inline unsigned input_bits(unsigned levels)
{
    unsigned bits = 12 + 9 * levels;
    return bits > 64 ? 64 : bits;
}

static inline int too_wide(uint64_t address, unsigned levels)
{
    unsigned bits = input_bits(levels);
    return bits < 64 && address >> bits;
}

/* GPA to HPA. *lg2 becomes the size of the stage 2 page, *granted its permissions. */
static int walk_stage2(struct walk *w, unsigned depth, uint64_t gpa, uint32_t perm, uint64_t *hpa, unsigned *lg2,
                       uint32_t *granted)
{
    const struct walk_host *host = w->host;
    uint64_t table = host->root;
    unsigned level = host->levels;
    uint32_t allowed = PT_READ | PT_WRITE;
    if (too_wide(gpa, level)) {
        w->fault->gpa = gpa;
        return abort_walk(w, 2, 0, PV_FAULT_ADDRESS_WIDTH);
    }
    for (;;) {
        uint8_t *page = pv_space_ptr(host->space, table, PV_PAGE_SIZE);
        unsigned index = pt_index(level, gpa);
        if (!page) {
            w->fault->gpa = gpa;
            return abort_walk(w, 2, level, PV_FAULT_TABLE);
        }
        uint64_t entry = read_entry(page, index);
        struct pt_entry e = pt_decode(host->format, entry, level);
        record(w, 2, depth, level, table, index, entry, &e);
        uint32_t here = allowed & e.perm;
        unsigned reason = 0;
        if (!e.present)
            reason = PV_FAULT_NOT_PRESENT;
        else if (e.reserved)
            reason = PV_FAULT_RESERVED;
        else if (perm & ~here)
            reason = PV_FAULT_PERMISSION;
        if (reason) {
            w->fault->gpa = gpa;
            return abort_walk(w, 2, level, reason);
        }
        if (e.leaf) {
            if (w->mark && !mark_leaf(host->format, entry_at(page, index), &entry, perm))
                continue; /* read it again */
            *hpa = e.addr + (gpa & ((1ull << e.size_lg2) - 1));
            *lg2 = e.size_lg2;
            *granted = entry & pt_dirty_bit(host->format) ? here : here & ~(uint32_t)PT_WRITE;
            return 0;
        }
        allowed = here;
        table = e.addr;
        level = e.next_level;
    }
}

/* IOVA to GPA. */
static int walk_stage1(struct walk *w, const struct walk_context *context, uint64_t iova, uint32_t perm, uint64_t *gpa,
                       unsigned *lg2, uint32_t *granted)
{
    uint64_t table = context->root;
    unsigned level = context->levels;
    uint32_t allowed = PT_READ | PT_WRITE;
    if (too_wide(iova, level))
        return abort_walk(w, 1, 0, PV_FAULT_ADDRESS_WIDTH);
    for (;;) {
        uint64_t hpa;
        unsigned table_lg2;
        uint32_t table_granted;
        if (walk_stage2(w, 1, table, PT_READ, &hpa, &table_lg2, &table_granted))
            return -EFAULT;
        uint8_t *page = pv_space_ptr(w->host->space, hpa, PV_PAGE_SIZE);
        if (!page) {
            w->fault->gpa = table;
            return abort_walk(w, 1, level, PV_FAULT_TABLE);
        }
        unsigned index = pt_index(level, iova);
        uint64_t entry = read_entry(page, index);
        struct pt_entry e = pt_decode(PT_X86_64, entry, level);
        record(w, 1, 0, level, table, index, entry, &e);
        if (!e.present)
            return abort_walk(w, 1, level, PV_FAULT_NOT_PRESENT);
        if (e.reserved)
            return abort_walk(w, 1, level, PV_FAULT_RESERVED);
        allowed &= e.perm;
        if (perm & ~allowed)
            return abort_walk(w, 1, level, PV_FAULT_PERMISSION);
        if (e.leaf) {
            *gpa = e.addr + (iova & ((1ull << e.size_lg2) - 1));
            *lg2 = e.size_lg2;
            *granted = allowed;
            return 0;
        }
        table = e.addr;
        level = e.next_level;
    }
}

int pv_walk(const struct walk_host *host, const struct walk_context *context, uint64_t iova, uint32_t perm,
            struct walk_result *result, struct pv_fault *fault, struct walk_recorder *recorder)
{
    struct walk w = {host, fault, recorder, recorder == NULL};
    uint64_t gpa = iova;
    unsigned lg2 = 63, lg2_stage2;
    uint32_t perm1 = PT_READ | PT_WRITE, perm2;
    if (context->type == PV_DOMAIN_BLOCKED)
        return abort_walk(&w, 0, 0, PV_FAULT_BLOCKED);
    if (context->type == PV_DOMAIN_PAGING && walk_stage1(&w, context, iova, perm, &gpa, &lg2, &perm1))
        return -EFAULT;
    if (walk_stage2(&w, 0, gpa, perm, &result->hpa, &lg2_stage2, &perm2))
        return -EFAULT;
    result->lg2 = lg2 < lg2_stage2 ? lg2 : lg2_stage2;
    result->perm = perm1 & perm2;
    uint64_t offset = result->hpa & ((1ull << result->lg2) - 1);
    uint8_t *base = pv_space_ptr(host->space, result->hpa - offset, 1ull << result->lg2);
    if (!base) {
        /* A page larger than the memory behind it: the 4 KiB around the address still may be there. */
        result->lg2 = 12;
        offset = result->hpa & (PV_PAGE_SIZE - 1);
        base = pv_space_ptr(host->space, result->hpa - offset, PV_PAGE_SIZE);
    }
    if (!base) {
        fault->gpa = gpa;
        return abort_walk(&w, 2, 0, PV_FAULT_OUTPUT);
    }
    result->ptr = base + offset;
    return 0;
}
