/*
 * The IOMMU as the hardware sees it: device contexts, the two-stage walker, the IOTLB, the fault log and
 * interrupt messages.
 *
 * A requester (one per device) has one domain: blocked, identity or paging. A paging domain's stage 1 is an
 * x86-64 table in guest RAM, its table pages reached through stage 2; stage 2 (vtdss or amdv1) is the machine's.
 * The IOTLB is sliced by requester, set-associative, tagged by domain id, and holds every page size. It is
 * honest: it forgets only what it is told to forget (or has no room for). So is the translation cache of a device that
 * has ATS enabled (atc.h), which is told after the IOTLB. Invalidation returns only when no section of a requester on
 * that domain that could have seen the old translation is open.
 *
 * The walker sets accessed and dirty bits in stage 2. The IOTLB lets no write pass to a page whose stage-2 leaf was clean
 * when it was cached; so after the host has cleared dirty bits it invalidates stage 2, and every later write marks again.
 *
 * Not modelled: PASIDs, page requests (PRI), posted interrupts, interrupt remapping tables (a message is matched
 * against what the host registered).
 */
#ifndef PVFIO_IOMMU_H
#define PVFIO_IOMMU_H

#include "../memory/memory.h"
#include "bus.h"

/* cffi: begin */
#define PV_DOMAIN_BLOCKED 0
#define PV_DOMAIN_IDENTITY 1
#define PV_DOMAIN_PAGING 2

#define PV_FAULT_BLOCKED 1         /* the domain blocks all DMA, or the device is in none */
#define PV_FAULT_NOT_PRESENT 2     /* an entry on the way is not present */
#define PV_FAULT_PERMISSION 3      /* the entries on the way do not allow it */
#define PV_FAULT_RESERVED 4        /* an entry has reserved bits set or a size its level cannot have */
#define PV_FAULT_ADDRESS_WIDTH 5   /* the IOVA is wider than the table */
#define PV_FAULT_TABLE 6           /* a stage-1 table page is not guest memory */
#define PV_FAULT_OUTPUT 7          /* the translation leads outside memory */
#define PV_FAULT_INTERRUPT_RANGE 8 /* not a 4-byte write, into the interrupt window */
#define PV_FAULT_INTERRUPT 9       /* an interrupt message nothing accepts */

#define PV_FAULT_ROOM 512 /* faults the log holds */

#define PV_MSI_START 0xfee00000
#define PV_MSI_END 0xfeefffff

struct pv_iommu;
struct pv_domain;

struct pv_fault {
    uint64_t device_id;
    uint64_t iova;
    uint64_t gpa;     /* stage 2 faults: what stage 2 was asked for */
    uint32_t domain;
    uint8_t stage;    /* 0 device context or interrupt, 1, 2 */
    uint8_t level;    /* of the entry at fault, 1 = the lowest; 0 where no entry is */
    uint8_t perm;     /* what was asked for: PV_DMA_READ, PV_DMA_WRITE */
    uint8_t reason;
};

/* One entry a translation read. */
struct pv_walk_step {
    uint8_t stage;
    uint8_t level;
    uint8_t leaf;
    uint8_t depth;      /* 0: the walk itself; 1: stage 2 walked to reach a stage-1 table page */
    uint64_t table;     /* where the table page is: GPA for stage 1, HPA for stage 2 */
    uint64_t index;
    uint64_t entry;
    uint64_t output;    /* address the entry leads to */
};

struct pv_tlb_stats {
    uint64_t hits;
    uint64_t misses;
    uint64_t invalidations;
    uint64_t entries;
};

/* Of a device's own translation cache. */
struct pv_atc_stats {
    uint64_t hits;          /* Translated Requests without a Translation Request before */
    uint64_t requests;      /* Translation Requests */
    uint64_t untranslated;  /* of them, those that led to no entry */
    uint64_t invalidations; /* Invalidate Requests that arrived */
    uint64_t lost;          /* and that did not */
    uint64_t entries;
};

struct pv_iommu *pv_iommu_create(struct pv_memory *memory, int stage2_format, uint64_t stage2_root, uint32_t stage2_levels);
/* Drops the creator's reference; domains and requesters hold one each, and the IOMMU holds the memory. */
void pv_iommu_destroy(struct pv_iommu *iommu);

struct pv_domain *pv_domain_create(struct pv_iommu *iommu, uint32_t id);
/* Only while no requester is attached. */
int pv_domain_configure(struct pv_domain *domain, uint32_t type, uint64_t root, uint32_t levels);
/* Ends the creator's hold on the domain: 0, or -EBUSY and nothing happens while a requester is attached. */
int pv_domain_destroy(struct pv_domain *domain);
/* The same whatever is attached: the domain goes with its last requester. */
void pv_domain_release(struct pv_domain *domain);

struct pv_bus *pv_requester_create(struct pv_iommu *iommu, uint64_t device_id);
/* NULL: blocked. When it returns no DMA of the requester lands through the domain it had. */
int pv_requester_attach(struct pv_bus *requester, struct pv_domain *domain);
void pv_requester_tlb_stats(struct pv_bus *requester, struct pv_tlb_stats *out);
/* Whether the device context lets Translation Requests through. Off at first; off empties the device's cache. */
void pv_requester_allow_ats(struct pv_bus *requester, int allowed);
void pv_requester_atc_stats(struct pv_bus *requester, struct pv_atc_stats *out);
/* Fault injection: the next Invalidate Requests never arrive, and the IOMMU takes them for completed. */
void pv_requester_lose_invalidations(struct pv_bus *requester, uint32_t count);
/* Registers (or, with eventfd -1, removes) what a message with that data rings. */
int pv_requester_set_msi(struct pv_bus *requester, uint32_t data, int eventfd);

void pv_iommu_invalidate_domain(struct pv_domain *domain);
/* Pages [page << 12, (page << 12) + (4096 << shift)), page rounded down to that size. */
void pv_iommu_invalidate_pages(struct pv_domain *domain, uint64_t page, uint32_t shift);

/* Every translation of every domain: stage 2 has changed. When it returns none from before is in use. */
void pv_iommu_invalidate_stage2(struct pv_iommu *iommu);

/* Translates without side effects (no IOTLB, no log, no marks). 0 and *hpa, or -EFAULT and *fault. steps may be NULL. */
int pv_requester_walk(struct pv_bus *requester, uint64_t iova, uint32_t perm, uint64_t *hpa, struct pv_fault *fault,
                      struct pv_walk_step *steps, uint32_t max_steps, uint32_t *nsteps);

/* An eventfd that rings when a fault is logged; the log itself, oldest first; how many were lost for lack of room. */
int pv_iommu_fault_fd(struct pv_iommu *iommu);
uint32_t pv_iommu_faults(struct pv_iommu *iommu, struct pv_fault *out, uint32_t max, uint64_t *lost);
/* cffi: end */

#endif
