/*
 * Protection information, type 1 with a 16-bit guard (NVM 5.2): checking and making the eight bytes of a block.
 */
#include "protection.h"

#include <string.h>

#include "silicon/crc16_t10.h"

#define UNCHECKED_APP_TAG 0xffff /* type 1: such a block is not checked (NVM 5.2.1.4) */

static uint16_t be16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)be16(p) << 16 | be16(p + 2);
}

static uint64_t tuple_offset(const struct pv_nvme_format *format)
{
    return format->pi_first ? 0 : format->metadata - sizeof(struct nvme_pi_tuple);
}

/* Over the data, and what metadata comes before the tuple (NVM 5.2.1.1). */
static uint16_t guard_of(const struct pv_nvme_format *format, const uint8_t *block, const uint8_t *metadata)
{
    uint16_t crc = pv_crc16_t10(0, block, 1ull << format->lba_shift);
    return pv_crc16_t10(crc, metadata, tuple_offset(format));
}

uint32_t nvme_pi_check(const struct pv_nvme_format *format, const struct nvme_pi *pi, const uint8_t *block,
                       const uint8_t *metadata, uint64_t n)
{
    const uint8_t *tuple = metadata + tuple_offset(format);
    uint16_t app = be16(tuple + 2);
    if (app == UNCHECKED_APP_TAG)
        return 0;
    if (pi->check & NVME_RW_PRCHK_GUARD && be16(tuple) != guard_of(format, block, metadata))
        return NVME_SC_GUARD_CHECK;
    if (pi->check & NVME_RW_PRCHK_APP && (app ^ pi->app) & pi->app_mask)
        return NVME_SC_APPTAG_CHECK;
    if (pi->check & NVME_RW_PRCHK_REF && be32(tuple + 4) != (uint32_t)(pi->ref + n))
        return NVME_SC_REFTAG_CHECK;
    return 0;
}

void nvme_pi_make(const struct pv_nvme_format *format, const struct nvme_pi *pi, const uint8_t *block,
                  uint8_t *metadata, uint64_t n)
{
    uint8_t *tuple = metadata + tuple_offset(format);
    uint16_t guard = guard_of(format, block, metadata);
    uint32_t ref = (uint32_t)(pi->ref + n);
    const uint8_t made[sizeof(struct nvme_pi_tuple)] = {(uint8_t)(guard >> 8),   (uint8_t)guard,
                                                        (uint8_t)(pi->app >> 8), (uint8_t)pi->app,
                                                        (uint8_t)(ref >> 24),    (uint8_t)(ref >> 16),
                                                        (uint8_t)(ref >> 8),     (uint8_t)ref};
    memcpy(tuple, made, sizeof(made));
}

uint32_t nvme_pi_of(const struct pv_nvme_format *format, const struct nvme_command *cmd, struct nvme_pi *pi)
{
    *pi = (struct nvme_pi){0};
    if (!format->pi)
        return 0;
    pi->check = cmd->cdw12 & (NVME_RW_PRCHK_GUARD | NVME_RW_PRCHK_APP | NVME_RW_PRCHK_REF);
    pi->act = cmd->cdw12 & NVME_RW_PRACT;
    pi->ref = cmd->cdw10;
    pi->app = (uint16_t)cmd->cdw15;
    pi->app_mask = (uint16_t)(cmd->cdw15 >> 16);
    /* Type 1: reference tags are the low part of the LBA; a command that has them checked says so (NVM 5.2.1.5). */
    if (pi->check & NVME_RW_PRCHK_REF && cmd->cdw14 != pi->ref)
        return NVME_SC_INVALID_PI | NVME_STATUS_DNR;
    return 0;
}
