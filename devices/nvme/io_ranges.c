/*
 * Commands about ranges of blocks that move no host data: Write Zeroes, Write Uncorrectable, Dataset Management and
 * Copy (NVM 3.2.8, 3.2.7, 3.2.3, 3.2.2).
 *
 * Deallocated blocks read as zeroes (DLFEAT). Hints of Dataset Management are accepted without effect.
 */
#include <stdlib.h>
#include <string.h>

#include "io.h"

enum { BYTE_CDW11 = 44, BYTE_CDW12 = 48 };

static uint32_t zero(struct nvme_io *io, uint64_t lba, uint64_t blocks, bool discard)
{
    struct nvme_namespace *ns = io->ns;
    if (pv_nvme_backing_zero(ns->backing, nvme_bytes(ns, lba), nvme_bytes(ns, blocks), discard))
        return NVME_SC_WRITE_FAULT;
    /* Ones: an application tag that says not to check (NVM 5.2.1.4). */
    if (ns->metadata)
        memset(ns->metadata + lba * ns->format.metadata, ns->format.pi ? 0xff : 0, blocks * ns->format.metadata);
    nvme_make_usable(ns, lba, blocks);
    return 0;
}

static void make_protection(struct nvme_io *io)
{
    struct nvme_namespace *ns = io->ns;
    memset(io->nvme->bounce, 0, nvme_bytes(ns, 1));
    for (uint64_t i = 0; i < io->blocks; i++) {
        uint8_t *metadata = ns->metadata + (io->lba + i) * ns->format.metadata;
        memset(metadata, 0, ns->format.metadata);
        nvme_pi_make(&ns->format, &io->pi, io->nvme->bounce, metadata, i);
    }
}

uint32_t nvme_write_zeroes(struct nvme_io *io)
{
    uint32_t status = nvme_check_writable(io);
    if (!status)
        status = nvme_check_range(io, io->lba, io->blocks);
    if (!status)
        status = nvme_pi_of(&io->ns->format, io->cmd, &io->pi);
    if (!status)
        status = zero(io, io->lba, io->blocks, io->cmd->cdw12 & NVME_RW_DEAC);
    if (status)
        return status;
    if (io->pi.act)
        make_protection(io);
    io->nvme->stats.writes++;
    return nvme_written(io);
}

uint32_t nvme_write_uncorrectable(struct nvme_io *io)
{
    uint32_t status = nvme_check_writable(io);
    if (!status)
        status = nvme_check_range(io, io->lba, io->blocks);
    return status ? status : nvme_make_unusable(io->ns, io->lba, io->blocks);
}

uint32_t nvme_dsm(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    struct nvme_dsm_range range[NVME_DSM_MAX_RANGES];
    uint32_t count = (io->cmd->cdw10 & 0xff) + 1;
    bool deallocate = io->cmd->cdw11 & NVME_DSM_AD;
    uint32_t status = deallocate ? nvme_check_writable(io) : 0;
    if (!status)
        status = nvme_map_data(nvme, io->cmd, count * sizeof(*range), &nvme->data);
    if (!status)
        status = nvme_from_host(nvme, &nvme->data, (uint8_t *)range, count * sizeof(*range));
    for (uint32_t i = 0; i < count && !status; i++)
        status = nvme_check_range(io, range[i].slba, range[i].nlb);
    for (uint32_t i = 0; deallocate && i < count && !status; i++)
        status = zero(io, range[i].slba, range[i].nlb, true);
    return status;
}

/*
 * A block and its metadata, with protection: checked as PRINFOR says; then made anew, or taken along and checked as
 * PRINFOW says, which finds that it names another block (NVM 3.2.2 and 5.2.2).
 */
static uint32_t copy_protected(struct nvme_io *io, const struct nvme_copy_range *range, uint64_t from, uint64_t to)
{
    struct nvme_namespace *ns = io->ns;
    uint8_t *block = io->nvme->bounce, metadata[PV_NVME_MAX_METADATA];
    const uint32_t checks = NVME_RW_PRCHK_GUARD | NVME_RW_PRCHK_APP | NVME_RW_PRCHK_REF;
    struct nvme_pi source = {io->cmd->cdw12 >> 12 << NVME_RW_PRINFO_SHIFT & checks, 0, (uint32_t)from, range->elbat,
                             range->elbatm};
    struct nvme_pi target = io->pi;
    target.ref = (uint32_t)to;
    if (pv_nvme_backing_read(ns->backing, nvme_bytes(ns, from), block, nvme_bytes(ns, 1)))
        return nvme_read_error(io);
    memcpy(metadata, ns->metadata + from * ns->format.metadata, ns->format.metadata);
    uint32_t status = nvme_pi_check(&ns->format, &source, block, metadata, 0);
    if (!status && target.act)
        nvme_pi_make(&ns->format, &target, block, metadata, 0);
    else if (!status)
        status = nvme_pi_check(&ns->format, &target, block, metadata, 0);
    if (status)
        return status;
    if (pv_nvme_backing_write(ns->backing, nvme_bytes(ns, to), block, nvme_bytes(ns, 1)))
        return NVME_SC_WRITE_FAULT;
    memcpy(ns->metadata + to * ns->format.metadata, metadata, ns->format.metadata);
    return 0;
}

/* One range, forward, in pieces: where it overlaps its destination, some of it may have been overwritten before. */
static uint32_t copy_blocks(struct nvme_io *io, const struct nvme_copy_range *range, uint64_t to)
{
    struct nvme_namespace *ns = io->ns;
    uint64_t from = range->slba, blocks = range->nlb + 1ull;
    uint32_t status = 0;
    for (uint64_t i = 0; ns->format.pi && i < blocks && !status; i++)
        status = copy_protected(io, range, from + i, to + i);
    if (ns->format.pi)
        return status;
    uint64_t source = nvme_bytes(ns, from), target = nvme_bytes(ns, to), left = nvme_bytes(ns, blocks);
    while (left) {
        uint64_t len = left < NVME_BOUNCE ? left : NVME_BOUNCE;
        if (pv_nvme_backing_read(ns->backing, source, io->nvme->bounce, len))
            return nvme_read_error(io);
        if (pv_nvme_backing_write(ns->backing, target, io->nvme->bounce, len))
            return NVME_SC_WRITE_FAULT;
        source += len;
        target += len;
        left -= len;
    }
    if (ns->metadata)
        memmove(ns->metadata + to * ns->format.metadata, ns->metadata + from * ns->format.metadata,
                blocks * ns->format.metadata);
    return 0;
}

static uint32_t check_copy(struct nvme_io *io, const struct nvme_copy_range *range, uint32_t count)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t blocks = range[i].nlb + 1ull;
        total += blocks;
        uint32_t status = blocks > PV_NVME_COPY_MSSRL ? nvme_field(io, 0, NVME_SC_CMD_SIZE_LIMIT_EXCEEDED)
                                                      : nvme_check_range(io, range[i].slba, blocks);
        if (status)
            return status;
        if (!nvme_usable(io->ns, range[i].slba, blocks))
            return nvme_read_error(io);
    }
    if (total > PV_NVME_COPY_MCL)
        return nvme_field(io, BYTE_CDW12, NVME_SC_CMD_SIZE_LIMIT_EXCEEDED);
    io->blocks = total;
    return nvme_check_range(io, io->lba, total);
}

uint32_t nvme_copy(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    struct nvme_copy_range range[PV_NVME_COPY_MSRC + 1];
    uint32_t count = (io->cmd->cdw12 & NVME_COPY_NR_MASK) + 1;
    uint32_t status = nvme_check_writable(io);
    if (status)
        return status;
    if (io->cmd->cdw12 >> NVME_COPY_DESFMT_SHIFT & 0xf)
        return nvme_field(io, BYTE_CDW12, NVME_SC_INVALID_FIELD);
    if (count > PV_NVME_COPY_MSRC + 1)
        return nvme_field(io, BYTE_CDW12, NVME_SC_CMD_SIZE_LIMIT_EXCEEDED);
    status = nvme_map_data(nvme, io->cmd, count * sizeof(*range), &nvme->data);
    if (!status)
        status = nvme_from_host(nvme, &nvme->data, (uint8_t *)range, count * sizeof(*range));
    if (!status)
        status = check_copy(io, range, count);
    if (!status)
        status = nvme_pi_of(&io->ns->format, io->cmd, &io->pi);
    uint64_t to = io->lba;
    for (uint32_t i = 0; i < count && !status; i++) {
        status = copy_blocks(io, &range[i], to);
        to += range[i].nlb + 1ull;
        if (status)
            io->request->result = i; /* the range that was not copied whole (NVM 3.2.2.2) */
    }
    if (status)
        return status;
    nvme_make_usable(io->ns, io->lba, io->blocks);
    nvme->stats.writes++;
    return nvme_written(io);
}
