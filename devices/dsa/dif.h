/*
 * Data Integrity Fields: the 8 bytes that protect a block, big-endian: guard (CRC-16/T10-DIF of the data), application
 * tag, reference tag.
 */
#ifndef PVFIO_DSA_DIF_H
#define PVFIO_DSA_DIF_H

#include <stdbool.h>

#include "abi/abi.h"

#define DSA_DIF_SIZE 8
#define DSA_DIF_BLOCK_MAX 4104

/* The tags of a run of blocks. */
struct dsa_dif_tags {
    uint32_t ref;
    uint16_t app, mask; /* mask: bits of the application tag that do not count */
    bool ref_fixed, app_incrementing;
};

/* What a descriptor asks for. */
struct dsa_dif {
    uint32_t block;    /* bytes of data */
    uint32_t from, to; /* bytes a block has in the source and in the destination */
    uint8_t flags, src_flags, dest_flags;
    bool checks;       /* the source has fields */
    bool writes;       /* the destination has */
    struct dsa_dif_tags src, dest;
};

struct dsa_dif dsa_dif_of(const struct dsa_hw_desc *desc);
/* A DIF status, 0: good. `n` is the block's number. `*guarded`: the guard was computed, and is the field's. */
uint8_t dsa_dif_check(const struct dsa_dif *dif, const uint8_t *data, const uint8_t *field, uint64_t n, bool *guarded);
/* Fills in the field of block `n`; `field` holds what may be passed through, a good guard if it is `guarded`. */
void dsa_dif_write(const struct dsa_dif *dif, const uint8_t *data, uint8_t *field, uint64_t n, bool guarded);
/* The tags of block `n` in a completion record: what would go on from there. */
void dsa_dif_report(const struct dsa_dif *dif, uint64_t n, struct dsa_completion_record *record);

#endif
