/*
 * A shadow of a user-managed stage 1 over a parent table: one table that says what both say together.
 *
 * The user's table is in x86-64 format, in memory that the parent maps; its root, the addresses in its entries and its
 * pages are IOVAs of the parent. Every entry is read once, with one 64-bit load, from memory that its owner and devices
 * may change meanwhile: what was read is checked, and a pass is bounded by `budget` places, however the table is
 * knotted. An entry that is malformed, or leads where the parent has nothing, counts as not present.
 *
 * Not modelled: accessed and dirty bits in the user's table (never written), access rights other than R/W and U/S,
 * execute permission, caching of intermediate entries.
 */
#ifndef PVFIO_SHADOW_H
#define PVFIO_SHADOW_H

#include <stdint.h>

#include "../pagetable/pagetable.h"

/* cffi: begin */
struct pv_shadow {
    struct pt_table *table;        /* the shadow */
    const struct pt_table *parent; /* IOVA of the parent to GPA */
    const struct pv_space *space;  /* guest memory */
    uint64_t root;                 /* IOVA of the parent */
    uint32_t levels;               /* 4 or 5 */
};

/* What a pass found, or did. */
struct pv_shadow_result {
    uint64_t same;    /* bytes on which both agree */
    uint64_t missing; /* bytes to add */
    uint64_t stale;   /* bytes to remove, whole shadow pages */
    uint64_t changed; /* bytes to replace, or to remove from inside a shadow page */
    uint64_t dangling; /* places where the user's table leads where the parent has nothing */
    uint64_t first;   /* of the IOVAs removed; first > last: none */
    uint64_t last;
};

/* Compares [first, last] and changes nothing. 0, or -ENOSPC: the budget is used up. */
int pv_shadow_compare(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                      struct pv_shadow_result *out);
/* Removes every shadow page of [first, last] that does not say what the two tables say now. The caller flushes. */
int pv_shadow_remove(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                     struct pv_shadow_result *out);
/* Adds what is missing in [first, last]; what differs stays. 0, -ENOSPC, or what pt_map_range gives. */
int pv_shadow_add(const struct pv_shadow *shadow, uint64_t first, uint64_t last, uint64_t budget,
                  struct pv_shadow_result *out);
/* cffi: end */

#endif
