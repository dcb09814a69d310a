/*
 * The data of reads and writes of memory: what one burst moves goes together (pv_bus_transfer), a quarter less time a
 * command than each on its own where memory is far.
 *
 * A command whose data waits has passed every check; only its move can fail, and then its completion, which waits too,
 * gets the status. Commands of one burst take effect in their order: whatever is not a plain move settles the others first.
 * Not here: images, blocks with metadata, data in several pieces, remote memory; those move at once.
 */
#include "io.h"

/* What was counted when the command passed its checks. */
static void uncount(struct pv_nvme_stats *stats, const struct pv_transfer *transfer)
{
    bool read = transfer->perm == PV_DMA_WRITE;
    *(read ? &stats->reads : &stats->writes) -= 1;
    *(read ? &stats->read_bytes : &stats->written_bytes) -= transfer->n;
}

static void fail(struct pv_nvme *nvme, uint32_t i)
{
    const struct nvme_move *move = &nvme->moves.of[i];
    const struct nvme_request request = {
        .cmd = move->cmd, .sq = move->end->sq_id, .location = NVME_ERROR_LOCATION_NONE};
    move->end->status = (uint16_t)DNR(NVME_SC_DATA_XFER_ERROR);
    uncount(&nvme->stats, &nvme->moves.transfer[i]);
    nvme_note_error(nvme, &request, move->end->status);
}

void nvme_settle(struct pv_nvme *nvme)
{
    uint32_t count = nvme->moves.count;
    if (!count)
        return;
    pv_bus_transfer(nvme->bus, nvme->moves.transfer, count);
    nvme->moves.count = 0;
    for (uint32_t i = 0; i < count; i++)
        if (nvme->moves.transfer[i].result)
            fail(nvme, i);
}

uint32_t nvme_move(struct nvme_io *io, uint8_t *memory, uint64_t n, bool to_host)
{
    struct pv_nvme *nvme = io->nvme;
    struct nvme_moves *moves = &nvme->moves;
    const struct nvme_segment *host = nvme->data.segment;
    /* A write that makes blocks usable again does so once it has written them. */
    bool later = io->request->end && nvme->data.count == 1 && !host->bucket && !pv_bus_is_remote(nvme->bus) &&
                 (to_host || !io->ns->unusable_blocks);
    if (!later || moves->count == NVME_MOVES)
        nvme_settle(nvme);
    if (!later)
        return to_host ? nvme_to_host(nvme, &nvme->data, memory, n) : nvme_from_host(nvme, &nvme->data, memory, n);
    moves->transfer[moves->count] = (struct pv_transfer){
        .iova = host->iova, .bytes = memory, .n = n, .perm = to_host ? PV_DMA_WRITE : PV_DMA_READ};
    moves->of[moves->count++] = (struct nvme_move){io->cmd, io->request->end};
    return 0;
}
