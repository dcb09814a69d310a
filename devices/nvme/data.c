/*
 * Data pointers: PRP entries and lists (Base 4.1.1), scatter gather lists (Base 4.1.2), and moving bytes through them.
 *
 * A pointer is read as a whole before the first byte moves, so a malformed one moves none; one that does not translate
 * ends where it does not (Data Transfer Error). Neighbouring pages become one segment.
 */
#include <errno.h>
#include <string.h>

#include "nvme_private.h"

#define SGL_PER_READ 32
/* Bits 1:0 of every opcode (Base 3.3.3.1, Data Transfer). */
#define DIRECTION_MASK 3
#define DIRECTION_TO_HOST 2

static uint32_t add(struct nvme_data *data, uint64_t iova, uint64_t len, bool bucket)
{
    struct nvme_segment *last = data->count ? &data->segment[data->count - 1] : NULL;
    if (last && !bucket && !last->bucket && last->iova + last->len == iova) {
        last->len += len;
        return 0;
    }
    if (data->count == NVME_MAX_SEGMENTS)
        return DNR(NVME_SC_SGL_INVALID_COUNT);
    data->segment[data->count++] = (struct nvme_segment){iova, len, bucket};
    return 0;
}

static uint32_t map_list(struct pv_nvme *nvme, uint64_t list, uint64_t n, struct nvme_data *data)
{
    const uint64_t page = 1ull << nvme->page_shift;
    uint64_t entry[512];
    if (list & 7)
        return DNR(NVME_SC_PRP_INVALID_OFFSET);
    nvme_settle(nvme); /* into the list, perhaps */
    while (n) {
        uint64_t fit = (page - (list & (page - 1))) / 8, want = (n + page - 1) / page;
        bool chained = want > fit;
        uint64_t count = chained ? fit : want;
        if (count > 512) { /* pages of more than 4 KiB: the list is read in parts */
            count = 512;
            chained = false;
        }
        struct pv_dma dma;
        if (pv_bus_read(nvme->bus, list, entry, count * 8, &dma))
            return DNR(NVME_SC_DATA_XFER_ERROR);
        uint64_t pages = chained ? count - 1 : count;
        for (uint64_t i = 0; i < pages; i++) {
            uint64_t len = n < page ? n : page;
            if (entry[i] & (page - 1))
                return DNR(NVME_SC_PRP_INVALID_OFFSET);
            uint32_t error = add(data, entry[i], len, false);
            if (error)
                return error;
            n -= len;
        }
        if (chained && (entry[count - 1] & (page - 1)))
            return DNR(NVME_SC_PRP_INVALID_OFFSET);
        list = chained ? entry[count - 1] : list + count * 8;
    }
    return 0;
}

static uint32_t map_prp(struct pv_nvme *nvme, const struct nvme_command *cmd, uint64_t n, struct nvme_data *data)
{
    const uint64_t page = 1ull << nvme->page_shift;
    uint64_t first = page - (cmd->prp1 & (page - 1));
    if (cmd->prp1 & 3)
        return DNR(NVME_SC_PRP_INVALID_OFFSET);
    data->segment[data->count++] = (struct nvme_segment){cmd->prp1, n < first ? n : first, false};
    if (n <= first)
        return 0;
    n -= first;
    if (n > page)
        return map_list(nvme, cmd->prp2, n, data);
    if (cmd->prp2 & (page - 1))
        return DNR(NVME_SC_PRP_INVALID_OFFSET);
    return add(data, cmd->prp2, n, false);
}

/* A list on its way into `data`. */
struct sgl {
    struct nvme_data *data;
    uint64_t left;        /* bytes not described yet */
    uint64_t descriptors; /* read so far */
    bool to_host;
};

/* A bit bucket takes from what goes to the host, and gives nothing (Base 4.1.2.1). */
static uint32_t map_block(struct sgl *sgl, const struct nvme_sgl_desc *desc)
{
    bool bucket = desc->type >> NVME_SGL_TYPE_SHIFT == NVME_SGL_BIT_BUCKET;
    uint64_t len = desc->length < sgl->left ? desc->length : sgl->left;
    if (!len || (bucket && !sgl->to_host))
        return 0;
    sgl->left -= len;
    return add(sgl->data, desc->addr, len, bucket);
}

/* Descriptors of one segment; `next` is what its last one may lead to, `*more` whether it does. */
static uint32_t map_segment(struct pv_nvme *nvme, struct sgl *sgl, const struct nvme_sgl_desc *segment,
                            struct nvme_sgl_desc *next, bool *more)
{
    struct nvme_sgl_desc desc[SGL_PER_READ];
    bool last = segment->type >> NVME_SGL_TYPE_SHIFT == NVME_SGL_LAST_SEGMENT;
    uint64_t count = segment->length / sizeof(*desc);
    *more = false;
    if (!count || segment->length % sizeof(*desc))
        return DNR(NVME_SC_SGL_INVALID_LAST);
    sgl->descriptors += count;
    if (sgl->descriptors > NVME_MAX_SGL_DESCRIPTORS)
        return DNR(NVME_SC_SGL_INVALID_COUNT);
    for (uint64_t done = 0; done < count;) {
        uint64_t some = count - done < SGL_PER_READ ? count - done : SGL_PER_READ;
        struct pv_dma dma;
        if (pv_bus_read(nvme->bus, segment->addr + done * sizeof(*desc), desc, some * sizeof(*desc), &dma))
            return DNR(NVME_SC_DATA_XFER_ERROR);
        for (uint64_t i = 0; i < some; i++, done++) {
            uint8_t type = desc[i].type >> NVME_SGL_TYPE_SHIFT;
            if (desc[i].type & 0xf || type > NVME_SGL_LAST_SEGMENT)
                return DNR(NVME_SC_SGL_INVALID_TYPE);
            if (type >= NVME_SGL_SEGMENT) {
                if (last || done + 1 != count)
                    return DNR(NVME_SC_SGL_INVALID_LAST);
                *next = desc[i];
                *more = true;
                return 0;
            }
            uint32_t error = map_block(sgl, &desc[i]);
            if (error)
                return error;
        }
    }
    return last ? 0 : DNR(NVME_SC_SGL_INVALID_LAST);
}

static uint32_t map_sgl(struct pv_nvme *nvme, const struct nvme_command *cmd, uint64_t n, struct nvme_data *data)
{
    struct nvme_sgl_desc desc = {
        .addr = cmd->prp1, .length = (uint32_t)cmd->prp2, .type = (uint8_t)(cmd->prp2 >> 56)};
    uint8_t type = desc.type >> NVME_SGL_TYPE_SHIFT;
    struct sgl sgl = {.data = data, .left = n, .to_host = (cmd->opcode & DIRECTION_MASK) == DIRECTION_TO_HOST};
    if (desc.type & 0xf || type > NVME_SGL_LAST_SEGMENT || type == NVME_SGL_BIT_BUCKET)
        return DNR(NVME_SC_SGL_INVALID_TYPE);
    uint32_t error = 0;
    bool more = type >= NVME_SGL_SEGMENT;
    if (more)
        nvme_settle(nvme); /* into the segment, perhaps */
    else
        error = map_block(&sgl, &desc);
    while (more && !error) {
        struct nvme_sgl_desc at = desc;
        error = map_segment(nvme, &sgl, &at, &desc, &more);
    }
    if (error)
        return error;
    return sgl.left ? DNR(NVME_SC_SGL_INVALID_DATA) : 0;
}

uint32_t nvme_map_data(struct pv_nvme *nvme, const struct nvme_command *cmd, uint64_t n, struct nvme_data *data)
{
    data->count = data->at = 0;
    data->offset = 0;
    if (!n)
        return 0;
    uint8_t psdt = cmd->flags & NVME_CMD_PSDT_MASK;
    if (psdt == NVME_CMD_PSDT_MASK)
        return DNR(NVME_SC_INVALID_FIELD);
    return psdt == NVME_CMD_PRP ? map_prp(nvme, cmd, n, data) : map_sgl(nvme, cmd, n, data);
}

static inline uint32_t move(struct pv_nvme *nvme, struct nvme_data *data, uint8_t *bytes, uint64_t n, bool to_host)
{
    while (n) {
        if (data->at == data->count)
            return DNR(NVME_SC_INTERNAL);
        struct nvme_segment *s = &data->segment[data->at];
        uint64_t left = s->len - data->offset, len = n < left ? n : left;
        struct pv_dma dma;
        int error = 0;
        if (!s->bucket)
            error = to_host ? pv_bus_write(nvme->bus, s->iova + data->offset, bytes, len, &dma)
                            : pv_bus_read(nvme->bus, s->iova + data->offset, bytes, len, &dma);
        if (error)
            return DNR(NVME_SC_DATA_XFER_ERROR);
        bytes += len;
        n -= len;
        data->offset += len;
        if (data->offset == s->len) {
            data->at++;
            data->offset = 0;
        }
    }
    return 0;
}

uint32_t nvme_to_host(struct pv_nvme *nvme, struct nvme_data *data, const uint8_t *from, uint64_t n)
{
    return move(nvme, data, (uint8_t *)from, n, true);
}

uint32_t nvme_from_host(struct pv_nvme *nvme, struct nvme_data *data, uint8_t *to, uint64_t n)
{
    return move(nvme, data, to, n, false);
}

int pv_nvme_transfer(struct pv_nvme *nvme, const struct nvme_command *cmd, void *data, uint32_t n, int to_host,
                     uint64_t resets)
{
    struct nvme_data pointer;
    if (n > NVME_MAX_TRANSFER)
        return DNR(NVME_SC_INVALID_FIELD);
    pthread_mutex_lock(&nvme->lock);
    bool late = resets != nvme->resets;
    nvme->transfers += !late;
    pthread_mutex_unlock(&nvme->lock);
    if (late)
        return -ECANCELED;
    uint32_t status = nvme_map_data(nvme, cmd, n, &pointer);
    if (!status)
        status = to_host ? nvme_to_host(nvme, &pointer, data, n) : nvme_from_host(nvme, &pointer, data, n);
    pthread_mutex_lock(&nvme->lock);
    if (!--nvme->transfers)
        pthread_cond_broadcast(&nvme->transferred);
    pthread_mutex_unlock(&nvme->lock);
    return (int)status;
}
