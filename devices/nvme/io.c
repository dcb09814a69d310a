/*
 * The NVM command set (NVM chapter 3): checks, and the commands that move blocks.
 *
 * Memory is copied straight between the namespace and the host (moves.c); an image goes through a buffer of ours, so that
 * no translation is held while a disk is waited for.
 */
#include "io.h"

#include <stdlib.h>
#include <string.h>

#include "bits.h"

enum { BYTE_NSID = 4, BYTE_SLBA = 40, BYTE_NLB = 48 };

uint32_t nvme_check_range(struct nvme_io *io, uint64_t lba, uint64_t blocks)
{
    uint64_t size = io->ns->format.blocks;
    return lba > size || blocks > size - lba ? nvme_field(io, BYTE_SLBA, NVME_SC_LBA_RANGE) : 0;
}

uint32_t nvme_check_writable(const struct nvme_io *io)
{
    if (io->ns->write_protected)
        return DNR(NVME_SC_NS_WRITE_PROTECTED);
    return io->ns->format.read_only ? DNR(NVME_SC_READ_ONLY) : 0;
}

bool nvme_usable(const struct nvme_namespace *ns, uint64_t lba, uint64_t blocks)
{
    if (!ns->unusable_blocks)
        return true;
    for (uint64_t at = lba, end = lba + blocks; at < end; at = nvme_next_word(at))
        if (ns->unusable[at / 64] & nvme_bits_from(at, end))
            return false;
    return true;
}

void nvme_make_usable(struct nvme_namespace *ns, uint64_t lba, uint64_t blocks)
{
    for (uint64_t at = lba, end = lba + blocks; ns->unusable_blocks && at < end; at = nvme_next_word(at)) {
        uint64_t bits = ns->unusable[at / 64] & nvme_bits_from(at, end);
        ns->unusable[at / 64] &= ~bits;
        ns->unusable_blocks -= (uint64_t)__builtin_popcountll(bits);
    }
}

uint32_t nvme_make_unusable(struct nvme_namespace *ns, uint64_t lba, uint64_t blocks)
{
    if (!ns->unusable && !(ns->unusable = calloc(ns->format.blocks / 64 + 1, sizeof(*ns->unusable))))
        return NVME_SC_INTERNAL;
    for (uint64_t at = lba, end = lba + blocks; at < end; at = nvme_next_word(at)) {
        uint64_t bits = nvme_bits_from(at, end) & ~ns->unusable[at / 64];
        ns->unusable[at / 64] |= bits;
        ns->unusable_blocks += (uint64_t)__builtin_popcountll(bits);
    }
    return 0;
}

/* Every command with a range of blocks and data. */
static uint32_t check_transfer(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    const struct pv_nvme_format *format = &io->ns->format;
    uint32_t status = nvme_check_range(io, io->lba, io->blocks);
    if (!status)
        status = nvme_pi_of(format, io->cmd, &io->pi);
    if (status)
        return status;
    /* Metadata between the data counts (Base 5.17.2.1, MDTS, where CTRATT.MEM is 0). */
    uint64_t n = nvme_bytes(io->ns, io->blocks);
    if (format->extended)
        n += io->blocks * nvme_host_metadata(format, &io->pi);
    return n > 4096ull << nvme->config.mdts_shift ? nvme_field(io, BYTE_NLB, NVME_SC_INVALID_FIELD) : 0;
}

uint32_t nvme_read_error(struct nvme_io *io)
{
    io->nvme->stats.media_errors++;
    return NVME_SC_READ_ERROR;
}

static uint32_t read_blocks(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    struct pv_nvme_backing *backing = io->ns->backing;
    uint64_t offset = nvme_bytes(io->ns, io->lba), left = nvme_bytes(io->ns, io->blocks);
    uint32_t status = nvme_map_data(nvme, io->cmd, left, &nvme->data);
    if (status)
        return status;
    if (backing->base)
        return nvme_move(io, backing->base + offset, left, true);
    while (left && !status) {
        uint64_t len = left < NVME_BOUNCE ? left : NVME_BOUNCE;
        if (pv_nvme_backing_read(backing, offset, nvme->bounce, len))
            return nvme_read_error(io);
        status = nvme_to_host(nvme, &nvme->data, nvme->bounce, len);
        offset += len;
        left -= len;
    }
    return status;
}

static uint32_t write_blocks(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    struct pv_nvme_backing *backing = io->ns->backing;
    uint64_t offset = nvme_bytes(io->ns, io->lba), left = nvme_bytes(io->ns, io->blocks);
    uint32_t status = nvme_map_data(nvme, io->cmd, left, &nvme->data);
    if (status)
        return status;
    if (backing->base)
        return nvme_move(io, backing->base + offset, left, false);
    while (left && !status) {
        uint64_t len = left < NVME_BOUNCE ? left : NVME_BOUNCE;
        status = nvme_from_host(nvme, &nvme->data, nvme->bounce, len);
        if (!status)
            status = pv_nvme_backing_write(backing, offset, nvme->bounce, len) ? NVME_SC_WRITE_FAULT : 0;
        offset += len;
        left -= len;
    }
    return status;
}

static uint32_t do_read(struct nvme_io *io)
{
    uint32_t status = check_transfer(io);
    if (status)
        return status;
    if (!nvme_usable(io->ns, io->lba, io->blocks))
        return nvme_read_error(io);
    status = io->ns->format.metadata ? nvme_read_metadata(io) : read_blocks(io);
    if (status)
        return status;
    io->nvme->stats.reads++;
    io->nvme->stats.read_bytes += nvme_bytes(io->ns, io->blocks);
    return 0;
}

static uint32_t do_write(struct nvme_io *io)
{
    uint32_t status = nvme_check_writable(io);
    if (!status)
        status = check_transfer(io);
    if (!status)
        status = io->ns->format.metadata ? nvme_write_metadata(io) : write_blocks(io);
    if (status)
        return status;
    nvme_make_usable(io->ns, io->lba, io->blocks);
    io->nvme->stats.writes++;
    io->nvme->stats.written_bytes += nvme_bytes(io->ns, io->blocks);
    return nvme_written(io);
}

static uint32_t compare_blocks(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    const uint64_t half = NVME_BOUNCE / 2;
    uint64_t offset = nvme_bytes(io->ns, io->lba), left = nvme_bytes(io->ns, io->blocks);
    uint32_t status = nvme_map_data(nvme, io->cmd, left, &nvme->data);
    while (left && !status) {
        uint64_t len = left < half ? left : half;
        status = nvme_from_host(nvme, &nvme->data, nvme->bounce, len);
        if (!status && pv_nvme_backing_read(io->ns->backing, offset, nvme->bounce + half, len))
            status = nvme_read_error(io);
        if (!status && memcmp(nvme->bounce, nvme->bounce + half, len))
            status = DNR(NVME_SC_COMPARE_FAILED);
        offset += len;
        left -= len;
    }
    return status;
}

/* NVM 3.2.1 */
static uint32_t do_compare(struct nvme_io *io)
{
    uint32_t status = check_transfer(io);
    if (status)
        return status;
    if (!nvme_usable(io->ns, io->lba, io->blocks))
        return nvme_read_error(io);
    io->nvme->stats.reads++;
    io->nvme->stats.read_bytes += nvme_bytes(io->ns, io->blocks);
    return io->ns->format.metadata ? nvme_compare_metadata(io) : compare_blocks(io);
}

/* NVM 3.2.5: reads without a host. */
static uint32_t do_verify(struct nvme_io *io)
{
    struct pv_nvme *nvme = io->nvme;
    uint32_t status = nvme_check_range(io, io->lba, io->blocks);
    if (!status)
        status = nvme_pi_of(&io->ns->format, io->cmd, &io->pi);
    if (status)
        return status;
    if (!nvme_usable(io->ns, io->lba, io->blocks))
        return nvme_read_error(io);
    if (io->ns->format.metadata)
        return nvme_verify_metadata(io);
    uint64_t offset = nvme_bytes(io->ns, io->lba), left = nvme_bytes(io->ns, io->blocks);
    while (left && !io->ns->backing->base) {
        uint64_t len = left < NVME_BOUNCE ? left : NVME_BOUNCE;
        if (pv_nvme_backing_read(io->ns->backing, offset, nvme->bounce, len))
            return nvme_read_error(io);
        offset += len;
        left -= len;
    }
    return 0;
}

static uint32_t do_flush(struct nvme_io *io)
{
    return nvme_sync_later(io->nvme, io->request, io->ns->backing);
}

static uint32_t (*const commands[])(struct nvme_io *) = {
    [NVME_CMD_FLUSH] = do_flush,
    [NVME_CMD_WRITE] = do_write,
    [NVME_CMD_READ] = do_read,
    [NVME_CMD_WRITE_UNCOR] = nvme_write_uncorrectable,
    [NVME_CMD_COMPARE] = do_compare,
    [NVME_CMD_WRITE_ZEROES] = nvme_write_zeroes,
    [NVME_CMD_DSM] = nvme_dsm,
    [NVME_CMD_VERIFY] = do_verify,
    [NVME_CMD_COPY] = nvme_copy,
};

/* A number that no namespace can have, and one that none has now; the broadcast value is of the latter (Base 3.2.1). */
static uint32_t check_namespace(struct nvme_io *io)
{
    const struct pv_nvme *nvme = io->nvme;
    uint32_t nsid = io->cmd->nsid;
    if (!nsid || (nsid > nvme->config.namespaces && nsid != UINT32_MAX))
        return nvme_field(io, BYTE_NSID, NVME_SC_INVALID_NS);
    if (nsid == UINT32_MAX || !nvme->ns[nsid - 1].backing)
        return nvme_field(io, BYTE_NSID, NVME_SC_INVALID_FIELD);
    if (nvme->ns[nsid - 1].refuse)
        io->request->location = BYTE_NSID;
    return nvme->ns[nsid - 1].refuse;
}

uint32_t nvme_io(struct pv_nvme *nvme, struct nvme_request *request)
{
    const struct nvme_command *cmd = request->cmd;
    struct nvme_io io = {.nvme = nvme, .request = request, .cmd = cmd};
    if (cmd->opcode >= sizeof(commands) / sizeof(*commands) || !commands[cmd->opcode])
        return nvme_field(&io, 0, NVME_SC_INVALID_OPCODE);
    uint32_t status = check_namespace(&io);
    if (status)
        return status;
    if (nvme->refuse)
        return nvme->refuse;
    io.ns = &nvme->ns[cmd->nsid - 1];
    io.lba = nvme_slba(cmd);
    io.blocks = (cmd->cdw12 & NVME_RW_NLB_MASK) + 1ull;
    if (!io.ns->backing->base || io.ns->format.metadata)
        request->end = NULL; /* what goes block by block, or through a buffer, goes now */
    if (!request->end)
        nvme_settle(nvme);
    status = commands[cmd->opcode](&io);
    if (request->corrupt && (!status || status == NVME_LATER))
        nvme_corrupt(nvme, request);
    return status;
}
