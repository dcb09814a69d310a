/*
 * What the files of the IOMMU share: its objects, and the fault log's entry.
 */
#ifndef PVFIO_IOMMU_PRIVATE_H
#define PVFIO_IOMMU_PRIVATE_H

#include <pthread.h>
#include <stdbool.h>

#include "atc.h"
#include "iommu.h"
#include "section.h"
#include "tlb.h"
#include "walker.h"

#define MAX_DOMAIN_TAGS 65536
#define IOVA_BITS 57

struct requester;

struct pv_domain {
    struct pv_iommu *iommu;
    uint32_t id;
    uint32_t references; /* the creator's and one a requester, under the IOMMU's lock */
    uint16_t tag; /* names the domain in IOTLBs */
    struct walk_context context;
    struct requester *first; /* the requesters attached */
};

struct pv_iommu {
    _Atomic uint32_t references;
    struct pv_memory *memory;
    struct walk_host host;
    pthread_mutex_t lock; /* domains and who is attached; held while an invalidation waits for sections */
    uint64_t *tags;       /* a bit per domain tag in use */
    struct requester *first; /* all requesters */

    pthread_mutex_t fault_lock;
    struct pv_fault fault[PV_FAULT_ROOM];
    uint32_t fault_first, fault_count;
    uint64_t faults_lost;
    int fault_fd;
};

struct requester {
    struct pv_bus bus;
    struct pv_iommu *iommu;
    uint64_t device_id;
    _Atomic(struct pv_domain *) domain;
    _Atomic uint32_t domain_id; /* for the fault log, which must not follow the pointer outside a section */
    struct requester *next; /* of the same domain */
    struct requester *next_of_all;
    _Atomic uint64_t section;
    _Atomic uint64_t announced; /* how many invalidations began */
    uint64_t sequence;      /* `announced` as the open section read it */
    struct tlb tlb;
    struct atc atc;         /* the device's own, beyond the IOMMU */
    pthread_mutex_t msi_lock;
    int *msi_fd;            /* by message data; -1: none */
};

/* A translation as the caches hold it: the page's host pointer and permissions in one word, and its size. */
struct translation {
    uint64_t data;
    unsigned lg2;
};

static inline bool pv_is_interrupt(uint64_t iova)
{
    return iova >= PV_MSI_START && iova <= PV_MSI_END;
}

/* A large page that reaches into the interrupt window ends there. */
static inline struct pv_span span_of(const struct translation *t, uint64_t iova)
{
    uint64_t size = 1ull << t->lg2, offset = iova & (size - 1), last = iova | (size - 1);
    if (iova < PV_MSI_START && last >= PV_MSI_START)
        last = PV_MSI_START - 1;
    return (struct pv_span){(uint8_t *)(uintptr_t)(t->data & ~4095ull) + offset, last - iova + 1};
}

/* What a requester gets, inside a section: from the IOTLB, else by a walk that fills it. -EFAULT, nothing is logged. */
int pv_translation(struct requester *r, uint64_t iova, uint32_t perm, struct translation *t);
/* An untranslated request: 0, or -EFAULT after the fault was logged. */
int pv_translate_untranslated(struct requester *r, uint64_t iova, uint32_t perm, struct pv_span *span);

static inline struct pv_iommu *iommu_get(struct pv_iommu *iommu)
{
    atomic_fetch_add(&iommu->references, 1);
    return iommu;
}

/* Fills in who and which domain, and logs. */
void pv_iommu_log(struct requester *r, struct pv_fault *fault);

/* With the IOMMU's lock held. True: it was the last reference, pv_domain_free once the lock is not held. */
bool pv_domain_drop(struct pv_domain *domain);
void pv_domain_free(struct pv_domain *domain);

#endif
