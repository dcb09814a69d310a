/*
 * The page-table formats: how one 64-bit entry is read and written.
 *
 *   x86_64  4 or 5 levels   Intel SDM volume 3, 4.5; VT-d first stage, AMD guest (v2) tables
 *   vtdss   3, 4, 5 levels  Intel VT-d 9.8, second stage
 *   amdv1   1 to 6 levels   AMD IOMMU 2.2.3, host (v1) tables
 *
 * Levels count from 1, the table whose entries are 4 KiB pages. Everything here is a function of (format, entry,
 * level) alone and is used both by software that writes tables and by the hardware walker; with a constant format
 * it folds to a few instructions.
 *
 * Not modelled: sign-extended input addresses, protection keys, memory types, execute permission, guest/host
 * translation in one amdv1 entry, skipped amdv1 levels.
 */
#ifndef PVFIO_PAGETABLE_FORMAT_H
#define PVFIO_PAGETABLE_FORMAT_H

#include <stdbool.h>
#include <stdint.h>

#include "pagetable.h"

#define PT_ADDRESS 0x000ffffffffff000ull /* bits 51:12 in all formats */
#define PT_ENTRIES 512

#define PT_X86_P (1ull << 0)
#define PT_X86_RW (1ull << 1)
#define PT_X86_U (1ull << 2)
#define PT_X86_A (1ull << 5)
#define PT_X86_D (1ull << 6)
#define PT_X86_PS (1ull << 7)
#define PT_X86_PAT_LARGE (1ull << 12)
#define PT_X86_XD (1ull << 63)

#define PT_VTDSS_R (1ull << 0)
#define PT_VTDSS_W (1ull << 1)
#define PT_VTDSS_PS (1ull << 7)
#define PT_VTDSS_A (1ull << 8)
#define PT_VTDSS_D (1ull << 9)
#define PT_VTDSS_SNP (1ull << 11)

#define PT_AMDV1_PR (1ull << 0)
#define PT_AMDV1_A (1ull << 5)
#define PT_AMDV1_D (1ull << 6)
#define PT_AMDV1_NEXT_SHIFT 9
#define PT_AMDV1_NEXT_SIZE 7 /* the next-level value that says: size coded in the address */
#define PT_AMDV1_FC (1ull << 60)
#define PT_AMDV1_IR (1ull << 61)
#define PT_AMDV1_IW (1ull << 62)

/* What an entry says. Only `present` has a meaning where it is 0. */
struct pt_entry {
    uint64_t addr;      /* of the page (aligned to its size) or of the next table */
    uint8_t present;
    uint8_t leaf;
    uint8_t perm;       /* PT_READ | PT_WRITE this entry grants to a device */
    uint8_t size_lg2;   /* of the page; in a table entry, of what the entry covers */
    uint8_t next_level; /* level of the table pointed to; 0 in a leaf */
    uint8_t reserved;   /* malformed: reserved bits, or a size or level that cannot be here */
};

/* log2 of what one entry of a table of this level covers. */
static inline unsigned pt_item_lg2(unsigned level)
{
    return 12 + 9 * (level - 1);
}

/* amdv1's level 6 has the 7 bits up to bit 63. */
static inline unsigned pt_index(unsigned level, uint64_t iova)
{
    return (unsigned)(iova >> pt_item_lg2(level)) & (PT_ENTRIES - 1);
}

static inline bool pt_present(int format, uint64_t entry)
{
    return (entry & (format == PT_VTDSS ? PT_VTDSS_R | PT_VTDSS_W : 1ull)) != 0;
}

/* The bits of a leaf that walkers set (Intel SDM volume 3, 4.8; VT-d 4.1 3.7.2; AMD IOMMU 2.2.3). */
static inline uint64_t pt_accessed_bit(int format)
{
    return format == PT_X86_64 ? PT_X86_A : format == PT_VTDSS ? PT_VTDSS_A : PT_AMDV1_A;
}

static inline uint64_t pt_dirty_bit(int format)
{
    return format == PT_X86_64 ? PT_X86_D : format == PT_VTDSS ? PT_VTDSS_D : PT_AMDV1_D;
}

/* amdv1 with next level 7: a zero after k low ones is a page of 2^(13 + k) bytes. */
static inline unsigned pt_amdv1_coded_lg2(uint64_t entry)
{
    return 13 + (unsigned)__builtin_ctzll(~((entry & PT_ADDRESS) >> 12));
}

/* Page sizes a table of this level can hold as leaves, as a bitmap. amdv1: AMD IOMMU 2.2.3, Tables 14 and 15; 512G is
 * left out because hardware has it wrong; the top-most level holds no leaves. */
static inline uint64_t pt_level_sizes(int format, unsigned level)
{
    unsigned item = pt_item_lg2(level);
    if (format != PT_AMDV1)
        return level <= 3 ? 1ull << item : 0;
    if (level > 5)
        return 0;
    return ((1ull << (item + 9 > 52 ? 52 : item + 9)) - (1ull << item)) & ~(1ull << 39);
}

/* The level of the table that holds leaves of this size. */
static inline unsigned pt_level_of(unsigned size_lg2)
{
    return (size_lg2 - 12) / 9 + 1;
}

static inline struct pt_entry pt_decode_amdv1(uint64_t entry, unsigned level)
{
    unsigned item = pt_item_lg2(level);
    unsigned next = (unsigned)(entry >> PT_AMDV1_NEXT_SHIFT) & 7;
    bool present = (entry & PT_AMDV1_PR) != 0;
    struct pt_entry e = {.addr = entry & PT_ADDRESS, .present = present, .size_lg2 = (uint8_t)item};
    e.perm = (uint8_t)((entry & PT_AMDV1_IR ? PT_READ : 0) | (entry & PT_AMDV1_IW ? PT_WRITE : 0));
    if (next != 0 && next != PT_AMDV1_NEXT_SIZE) {
        e.next_level = (uint8_t)next;
        e.reserved = next != level - 1;
        return e;
    }
    unsigned lg2 = next == 0 ? item : pt_amdv1_coded_lg2(entry);
    e.leaf = 1;
    if (!(pt_level_sizes(PT_AMDV1, level) >> lg2 & 1)) {
        e.reserved = 1;
        return e;
    }
    e.size_lg2 = (uint8_t)lg2;
    uint64_t low = e.addr & ((1ull << lg2) - 1);
    if (next == 0)
        e.reserved = low != 0;
    e.addr -= low;
    return e;
}

/* What a hardware walker makes of `entry`, read from a table of `level`. */
static inline struct pt_entry pt_decode(int format, uint64_t entry, unsigned level)
{
    if (format == PT_AMDV1)
        return pt_decode_amdv1(entry, level);
    unsigned item = pt_item_lg2(level);
    struct pt_entry e = {.addr = entry & PT_ADDRESS, .present = pt_present(format, entry), .size_lg2 = (uint8_t)item};
    if (format == PT_VTDSS) {
        e.perm = (uint8_t)((entry & PT_VTDSS_R ? PT_READ : 0) | (entry & PT_VTDSS_W ? PT_WRITE : 0));
    } else if (entry & PT_X86_U) { /* requests without PASID are user requests (VT-d 3.6.1) */
        e.perm = (uint8_t)(PT_READ | (entry & PT_X86_RW ? PT_WRITE : 0));
    }
    e.leaf = level == 1 || (entry & PT_X86_PS); /* PS is bit 7 in both formats */
    if (!e.leaf) {
        e.next_level = (uint8_t)(level - 1);
        return e;
    }
    uint64_t low = e.addr & ((1ull << item) - 1);
    e.addr -= low;
    e.reserved = level > 3 || (format == PT_X86_64 ? low & ~PT_X86_PAT_LARGE : low) != 0;
    return e;
}

/* An entry of a table of `level` that points to the table at `phys`: all permissions, the leaf decides. */
static inline uint64_t pt_make_table(int format, unsigned level, uint64_t phys)
{
    if (format == PT_X86_64)
        return phys | PT_X86_P | PT_X86_RW | PT_X86_U | PT_X86_A;
    if (format == PT_VTDSS)
        return phys | PT_VTDSS_R | PT_VTDSS_W;
    return phys | PT_AMDV1_PR | PT_AMDV1_IR | PT_AMDV1_IW | (uint64_t)(level - 1) << PT_AMDV1_NEXT_SHIFT;
}

/* The bits of a leaf but for its address. x86_64 has no read bit: write implies read. Its leaves are born accessed,
 * and the writable ones dirty, so that no walker has to write them. */
static inline uint64_t pt_leaf_attributes(int format, unsigned level, unsigned size_lg2, unsigned perm)
{
    if (format == PT_AMDV1) {
        uint64_t entry = PT_AMDV1_PR | PT_AMDV1_FC;
        entry |= (perm & PT_READ ? PT_AMDV1_IR : 0) | (perm & PT_WRITE ? PT_AMDV1_IW : 0);
        if (size_lg2 != pt_item_lg2(level)) /* the ones below bit size_lg2 - 1, down to bit 12 */
            entry |= (uint64_t)PT_AMDV1_NEXT_SIZE << PT_AMDV1_NEXT_SHIFT | ((1ull << (size_lg2 - 1)) - 4096);
        return entry;
    }
    uint64_t large = level > 1 ? PT_X86_PS : 0;
    if (format == PT_VTDSS)
        return large | (perm & PT_READ ? PT_VTDSS_R : 0) | (perm & PT_WRITE ? PT_VTDSS_W : 0);
    return large | PT_X86_P | PT_X86_U | PT_X86_A | (perm & PT_WRITE ? PT_X86_RW | PT_X86_D : 0);
}

static inline uint64_t pt_make_leaf(int format, unsigned level, unsigned size_lg2, uint64_t phys, unsigned perm)
{
    return phys | pt_leaf_attributes(format, level, size_lg2, perm);
}

#endif
