/*
 * What the files of the IOMMU share: its objects, and the fault log's entry.
 */
#ifndef PVFIO_IOMMU_PRIVATE_H
#define PVFIO_IOMMU_PRIVATE_H

#include <pthread.h>
#include <stdbool.h>

#include "iommu.h"
#include "section.h"
#include "tlb.h"
#include "walker.h"

#define MAX_DOMAIN_TAGS 65536

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
    uint64_t sequence;      /* of the IOTLB, as the open section read it */
    struct tlb tlb;
    pthread_mutex_t msi_lock;
    int *msi_fd;            /* by message data; -1: none */
};

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
