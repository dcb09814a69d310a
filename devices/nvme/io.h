/*
 * A command of the NVM command set, its namespace and its blocks (see io.c).
 */
#ifndef PVFIO_NVME_IO_H
#define PVFIO_NVME_IO_H

#include "nvme_private.h"
#include "protection.h"

struct nvme_io {
    struct pv_nvme *nvme;
    struct nvme_request *request;
    const struct nvme_command *cmd;
    struct nvme_namespace *ns;
    uint64_t lba, blocks;
    struct nvme_pi pi;
};

static inline uint64_t nvme_bytes(const struct nvme_namespace *ns, uint64_t blocks)
{
    return blocks << ns->format.lba_shift;
}

/* Fails a command because of a field: the byte of the command it is in. */
static inline uint32_t nvme_field(struct nvme_io *io, uint32_t byte, uint32_t status)
{
    io->request->location = byte;
    return DNR(status);
}

/* A write is over: durable first, with Force Unit Access or without a write cache. */
static inline uint32_t nvme_written(struct nvme_io *io)
{
    bool durable = io->cmd->cdw12 & NVME_RW_FUA || io->nvme->write_through;
    return durable ? nvme_sync_later(io->nvme, io->request, io->ns->backing) : 0;
}

/* io.c */
uint32_t nvme_check_range(struct nvme_io *io, uint64_t lba, uint64_t blocks);
uint32_t nvme_check_writable(const struct nvme_io *io);
bool nvme_usable(const struct nvme_namespace *ns, uint64_t lba, uint64_t blocks);
void nvme_make_usable(struct nvme_namespace *ns, uint64_t lba, uint64_t blocks);
uint32_t nvme_make_unusable(struct nvme_namespace *ns, uint64_t lba, uint64_t blocks);
uint32_t nvme_read_error(struct nvme_io *io);

/*
 * moves.c: `n` bytes of nvme->data from or to a namespace's memory, now or with those of later commands; then, where they
 * do not move, the completion gets the status. 0 or a status.
 */
uint32_t nvme_move(struct nvme_io *io, uint8_t *memory, uint64_t n, bool to_host);

/* io_metadata.c: reads and writes of namespaces whose blocks have metadata, block by block. */
uint32_t nvme_read_metadata(struct nvme_io *io);
uint32_t nvme_write_metadata(struct nvme_io *io);
uint32_t nvme_compare_metadata(struct nvme_io *io);
uint32_t nvme_verify_metadata(struct nvme_io *io);

/* io_ranges.c */
uint32_t nvme_dsm(struct nvme_io *io);
uint32_t nvme_copy(struct nvme_io *io);
uint32_t nvme_write_zeroes(struct nvme_io *io);
uint32_t nvme_write_uncorrectable(struct nvme_io *io);

#endif
