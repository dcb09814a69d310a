/*
 * One Data Integrity Field: checked and written (Intel DSA 1.2 8.3.13 to 8.3.17).
 *
 * The guard covers the data, not the tags. Bits of the application tag that its mask has set are not compared, and
 * written as 0. A field of ones says "not written yet": depending on the flags such a block is not checked, or wrong.
 */
#include "dif.h"

#include "silicon/crc16_t10.h"

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static void put16(uint8_t *p, uint16_t value)
{
    p[0] = (uint8_t)(value >> 8);
    p[1] = (uint8_t)value;
}

static uint32_t ref_of(const struct dsa_dif_tags *tags, uint64_t n)
{
    return tags->ref_fixed ? tags->ref : tags->ref + (uint32_t)n;
}

static uint16_t app_of(const struct dsa_dif_tags *tags, uint64_t n)
{
    return tags->app_incrementing ? (uint16_t)(tags->app + n) : tags->app;
}

static uint16_t guard_of(const struct dsa_dif *dif, const uint8_t *data)
{
    uint16_t seed = dif->flags & DSA_DIF_FLAG_INVERT_CRC_SEED ? 0xffff : 0;
    uint16_t crc = pv_crc16_t10(seed, data, dif->block);
    return dif->flags & DSA_DIF_FLAG_INVERT_CRC_RESULT ? (uint16_t)~crc : crc;
}

struct dsa_dif dsa_dif_of(const struct dsa_hw_desc *desc)
{
    static const uint16_t sizes[] = {512, 520, 4096, DSA_DIF_BLOCK_MAX};
    uint32_t opcode = desc->flags_opcode >> DSA_DESC_OPCODE_SHIFT;
    bool update = opcode == DSA_OPCODE_DIF_UPDT, dix = opcode == DSA_OPCODE_DIX_GEN;
    struct dsa_dif dif = {
        .block = sizes[desc->dif_upd_flags & DSA_DIF_FLAG_BLOCK_SIZE_MASK],
        .flags = desc->dif_upd_flags,
        .src_flags = desc->src_upd_flags,
        .dest_flags = desc->upd_dest_flags,
        .checks = opcode == DSA_OPCODE_DIF_CHECK || opcode == DSA_OPCODE_DIF_STRP || update,
        .writes = opcode == DSA_OPCODE_DIF_INS || dix || update,
        .src = {desc->src_ref_tag_seed, desc->src_app_tag_seed, desc->src_app_tag_mask,
                desc->src_upd_flags & DSA_DIF_SRC_FLAG_REF_TAG_FIXED,
                desc->src_upd_flags & DSA_DIF_SRC_FLAG_APP_TAG_INC},
        .dest = {desc->dest_ref_tag_seed, desc->dest_app_tag_seed, desc->dest_app_tag_mask,
                 desc->upd_dest_flags & DSA_DIF_DEST_FLAG_REF_TAG_FIXED,
                 desc->upd_dest_flags & DSA_DIF_DEST_FLAG_APP_TAG_INC},
    };
    dif.from = dif.block + (dif.checks ? DSA_DIF_SIZE : 0);
    if (opcode != DSA_OPCODE_DIF_CHECK)
        dif.to = (dix ? 0 : dif.block) + (dif.writes ? DSA_DIF_SIZE : 0);
    return dif;
}

uint8_t dsa_dif_check(const struct dsa_dif *dif, const uint8_t *data, const uint8_t *field, uint64_t n, bool *guarded)
{
    uint16_t guard = get16(field), app = get16(field + 2);
    uint32_t ref = get32(field + 4);
    *guarded = false;
    bool app_f = app == 0xffff, tags_f = app_f && ref == 0xffffffff, all_f = tags_f && guard == 0xffff;
    if (all_f && dif->src_flags & DSA_DIF_SRC_FLAG_ALL_F)
        return dif->src_flags & DSA_DIF_SRC_FLAG_ALL_F_ERR ? DSA_DIF_STATUS_ALL_F : 0;
    if ((tags_f && dif->src_flags & DSA_DIF_SRC_FLAG_APP_REF_TAG_F) ||
        (app_f && dif->src_flags & DSA_DIF_SRC_FLAG_APP_TAG_F))
        return 0;
    uint8_t status = 0;
    if (!(dif->src_flags & DSA_DIF_SRC_FLAG_GUARD_DISABLE)) {
        *guarded = guard == guard_of(dif, data);
        status |= *guarded ? 0 : DSA_DIF_STATUS_GUARD;
    }
    if ((app ^ app_of(&dif->src, n)) & ~dif->src.mask & 0xffff)
        status |= DSA_DIF_STATUS_APP_TAG;
    if (!(dif->src_flags & DSA_DIF_SRC_FLAG_REF_TAG_DISABLE) && ref != ref_of(&dif->src, n))
        status |= DSA_DIF_STATUS_REF_TAG;
    return status;
}

void dsa_dif_write(const struct dsa_dif *dif, const uint8_t *data, uint8_t *field, uint64_t n, bool guarded)
{
    uint32_t ref = ref_of(&dif->dest, n);
    if (!guarded && !(dif->dest_flags & DSA_DIF_DEST_FLAG_GUARD_PASS))
        put16(field, guard_of(dif, data));
    if (!(dif->dest_flags & DSA_DIF_DEST_FLAG_APP_TAG_PASS))
        put16(field + 2, app_of(&dif->dest, n) & (uint16_t)~dif->dest.mask);
    if (!(dif->dest_flags & DSA_DIF_DEST_FLAG_REF_TAG_PASS)) {
        put16(field + 4, (uint16_t)(ref >> 16));
        put16(field + 6, (uint16_t)ref);
    }
}

void dsa_dif_report(const struct dsa_dif *dif, uint64_t n, struct dsa_completion_record *record)
{
    if (dif->checks) {
        record->dif_upd_src_ref_tag = ref_of(&dif->src, n);
        record->dif_upd_src_app_tag_mask = dif->src.mask;
        record->dif_upd_src_app_tag = app_of(&dif->src, n);
    }
    if (dif->writes) {
        record->dif_upd_dest_ref_tag = ref_of(&dif->dest, n);
        record->dif_upd_dest_app_tag_mask = dif->dest.mask;
        record->dif_upd_dest_app_tag = app_of(&dif->dest, n);
    }
}
