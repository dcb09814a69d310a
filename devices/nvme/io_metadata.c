/*
 * Reads, writes, compares and verifies of blocks with metadata (NVM 5.1), block by block.
 *
 * Metadata is kept apart from the data; the format says how the host sees it, at the end of each block or in a buffer of
 * its own. With PRACT and eight bytes of metadata the host does not see it at all (NVM 5.2.2).
 */
#include <string.h>

#include "io.h"

enum { BYTE_FLAGS = 1, BYTE_MPTR = 16 };

/* Where a command's metadata is in the host. */
struct view {
    uint32_t bytes; /* a block; 0: the host does not see it */
    bool extended;
    uint64_t iova;  /* of the buffer, where it is not extended */
};

static struct view view_of(const struct nvme_io *io)
{
    const struct pv_nvme_format *f = &io->ns->format;
    return (struct view){nvme_host_metadata(f, &io->pi), f->extended, io->cmd->metadata};
}

static uint32_t map(struct nvme_io *io, const struct view *view)
{
    uint64_t per_block = nvme_bytes(io->ns, 1) + (view->extended ? view->bytes : 0);
    /* No metadata SGLs (Identify Controller, SGLS). */
    bool segment = (io->cmd->flags & NVME_CMD_PSDT_MASK) == NVME_CMD_SGL_METASEG;
    if (view->bytes && !view->extended && segment)
        return nvme_field(io, BYTE_FLAGS, NVME_SC_INVALID_FIELD);
    if (view->bytes && !view->extended && view->iova & 3)
        return nvme_field(io, BYTE_MPTR, NVME_SC_INVALID_FIELD);
    return nvme_map_data(io->nvme, io->cmd, io->blocks * per_block, &io->nvme->data);
}

static uint32_t metadata_to_host(struct nvme_io *io, const struct view *view, const uint8_t *metadata, uint64_t i)
{
    struct pv_dma dma;
    if (!view->bytes)
        return 0;
    if (view->extended)
        return nvme_to_host(io->nvme, &io->nvme->data, metadata, view->bytes);
    int error = pv_bus_write(io->nvme->bus, view->iova + i * view->bytes, metadata, view->bytes, &dma);
    return error ? DNR(NVME_SC_DATA_XFER_ERROR) : 0;
}

static uint32_t metadata_from_host(struct nvme_io *io, const struct view *view, uint8_t *metadata, uint64_t i)
{
    struct pv_dma dma;
    if (!view->bytes)
        return 0;
    if (view->extended)
        return nvme_from_host(io->nvme, &io->nvme->data, metadata, view->bytes);
    int error = pv_bus_read(io->nvme->bus, view->iova + i * view->bytes, metadata, view->bytes, &dma);
    return error ? DNR(NVME_SC_DATA_XFER_ERROR) : 0;
}

/* The i-th block in the bounce buffer, its protection checked; `*metadata` is where its metadata is kept. */
static uint32_t load(struct nvme_io *io, uint64_t i, uint8_t **metadata)
{
    struct nvme_namespace *ns = io->ns;
    *metadata = ns->metadata + (io->lba + i) * ns->format.metadata;
    if (pv_nvme_backing_read(ns->backing, nvme_bytes(ns, io->lba + i), io->nvme->bounce, nvme_bytes(ns, 1)))
        return nvme_read_error(io);
    return io->pi.check ? nvme_pi_check(&ns->format, &io->pi, io->nvme->bounce, *metadata, i) : 0;
}

uint32_t nvme_read_metadata(struct nvme_io *io)
{
    struct view view = view_of(io);
    uint32_t status = map(io, &view);
    for (uint64_t i = 0; i < io->blocks && !status; i++) {
        uint8_t *metadata;
        status = load(io, i, &metadata);
        if (!status)
            status = nvme_to_host(io->nvme, &io->nvme->data, io->nvme->bounce, nvme_bytes(io->ns, 1));
        if (!status)
            status = metadata_to_host(io, &view, metadata, i);
    }
    return status;
}

uint32_t nvme_write_metadata(struct nvme_io *io)
{
    struct nvme_namespace *ns = io->ns;
    struct view view = view_of(io);
    uint32_t status = map(io, &view);
    for (uint64_t i = 0; i < io->blocks && !status; i++) {
        uint8_t metadata[PV_NVME_MAX_METADATA] = {0};
        status = nvme_from_host(io->nvme, &io->nvme->data, io->nvme->bounce, nvme_bytes(ns, 1));
        if (!status)
            status = metadata_from_host(io, &view, metadata, i);
        if (!status && io->pi.act)
            nvme_pi_make(&ns->format, &io->pi, io->nvme->bounce, metadata, i);
        else if (!status && io->pi.check)
            status = nvme_pi_check(&ns->format, &io->pi, io->nvme->bounce, metadata, i);
        if (status)
            break;
        if (pv_nvme_backing_write(ns->backing, nvme_bytes(ns, io->lba + i), io->nvme->bounce, nvme_bytes(ns, 1)))
            return NVME_SC_WRITE_FAULT;
        memcpy(ns->metadata + (io->lba + i) * ns->format.metadata, metadata, ns->format.metadata);
    }
    return status;
}

uint32_t nvme_compare_metadata(struct nvme_io *io)
{
    struct nvme_namespace *ns = io->ns;
    struct view view = view_of(io);
    uint8_t *host = io->nvme->bounce + NVME_BOUNCE / 2;
    uint32_t status = map(io, &view);
    for (uint64_t i = 0; i < io->blocks && !status; i++) {
        uint8_t *metadata, given[PV_NVME_MAX_METADATA];
        status = load(io, i, &metadata);
        if (!status)
            status = nvme_from_host(io->nvme, &io->nvme->data, host, nvme_bytes(ns, 1));
        if (!status)
            status = metadata_from_host(io, &view, given, i);
        if (!status && (memcmp(host, io->nvme->bounce, nvme_bytes(ns, 1)) || memcmp(given, metadata, view.bytes)))
            status = DNR(NVME_SC_COMPARE_FAILED);
    }
    return status;
}

uint32_t nvme_verify_metadata(struct nvme_io *io)
{
    uint32_t status = 0;
    for (uint64_t i = 0; i < io->blocks && !status; i++) {
        uint8_t *metadata;
        status = load(io, i, &metadata);
    }
    return status;
}
