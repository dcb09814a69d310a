/*
 * Protection information of a command and of a block (see protection.c).
 */
#ifndef PVFIO_NVME_PROTECTION_H
#define PVFIO_NVME_PROTECTION_H

#include "nvme_engine.h"

/* What a command asks for. */
struct nvme_pi {
    uint32_t check; /* NVME_RW_PRCHK_* */
    uint32_t act;   /* not 0: the controller makes and removes it */
    uint32_t ref;   /* of the first block */
    uint16_t app, app_mask;
};

/* 0, or an NVMe status. */
uint32_t nvme_pi_of(const struct pv_nvme_format *format, const struct nvme_command *cmd, struct nvme_pi *pi);
/* The n-th block of a command: 0, or the status of the check it fails. */
uint32_t nvme_pi_check(const struct pv_nvme_format *format, const struct nvme_pi *pi, const uint8_t *block,
                       const uint8_t *metadata, uint64_t n);
/* Bytes of metadata a block that the host has: none where PRACT takes all of it (NVM 5.2.2). */
static inline uint32_t nvme_host_metadata(const struct pv_nvme_format *format, const struct nvme_pi *pi)
{
    return format->pi && pi->act && format->metadata == 8 ? 0 : format->metadata;
}
/* Makes the n-th block's. */
void nvme_pi_make(const struct pv_nvme_format *format, const struct nvme_pi *pi, const uint8_t *block,
                  uint8_t *metadata, uint64_t n);

#endif
