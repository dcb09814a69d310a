/*
 * Domains, and invalidation (see iommu.h).
 *
 * Order of an invalidation, for every requester on the domain: announce it (sequence), drop the entries, those of the
 * IOTLB before the device's own (which could be filled from it again), wait for the open section. A section that walked
 * the old table either sees the announcement when it inserts, or its entry is there to be dropped; a section that begins
 * later finds neither.
 */
#include <errno.h>
#include <stdlib.h>

#include "iommu_private.h"

bool pv_domain_drop(struct pv_domain *domain)
{
    if (--domain->references)
        return false;
    /* Nothing is cached: leaving a domain cleared the requester's IOTLB. */
    domain->iommu->tags[domain->tag / 64] &= ~(1ull << domain->tag % 64);
    return true;
}

void pv_domain_free(struct pv_domain *domain)
{
    pv_iommu_destroy(domain->iommu);
    free(domain);
}

struct pv_domain *pv_domain_create(struct pv_iommu *iommu, uint32_t id)
{
    struct pv_domain *domain = calloc(1, sizeof(*domain));
    if (!domain)
        return NULL;
    domain->iommu = iommu;
    domain->id = id;
    domain->references = 1;
    pthread_mutex_lock(&iommu->lock);
    uint32_t tag = 1;
    while (tag < MAX_DOMAIN_TAGS && iommu->tags[tag / 64] >> tag % 64 & 1)
        tag = iommu->tags[tag / 64] == UINT64_MAX ? (tag / 64 + 1) * 64 : tag + 1;
    if (tag < MAX_DOMAIN_TAGS)
        iommu->tags[tag / 64] |= 1ull << tag % 64;
    pthread_mutex_unlock(&iommu->lock);
    if (tag >= MAX_DOMAIN_TAGS) {
        free(domain);
        return NULL;
    }
    domain->tag = (uint16_t)tag;
    iommu_get(iommu);
    return domain;
}

int pv_domain_configure(struct pv_domain *domain, uint32_t type, uint64_t root, uint32_t levels)
{
    if (type > PV_DOMAIN_PAGING || (type == PV_DOMAIN_PAGING && (root % PV_PAGE_SIZE || levels < 4 || levels > 5)))
        return -EINVAL;
    pthread_mutex_lock(&domain->iommu->lock);
    int error = domain->first ? -EBUSY : 0;
    if (!error)
        domain->context = (struct walk_context){type, levels, root};
    pthread_mutex_unlock(&domain->iommu->lock);
    return error;
}

int pv_domain_destroy(struct pv_domain *domain)
{
    struct pv_iommu *iommu = domain->iommu;
    pthread_mutex_lock(&iommu->lock);
    bool busy = domain->first != NULL, last = !busy && pv_domain_drop(domain);
    pthread_mutex_unlock(&iommu->lock);
    if (last)
        pv_domain_free(domain);
    return busy ? -EBUSY : 0;
}

void pv_domain_release(struct pv_domain *domain)
{
    struct pv_iommu *iommu = domain->iommu;
    pthread_mutex_lock(&iommu->lock);
    bool last = pv_domain_drop(domain);
    pthread_mutex_unlock(&iommu->lock);
    if (last)
        pv_domain_free(domain);
}

/* 2^lg2 bytes, 12 to 64, from `first` on. */
static void invalidate(struct pv_domain *domain, uint64_t first, unsigned lg2)
{
    uint64_t range = ats_range(first, lg2);
    pthread_mutex_lock(&domain->iommu->lock);
    for (struct requester *r = domain->first; r; r = r->next) {
        atomic_fetch_add(&r->announced, 1);
        atomic_fetch_add_explicit(&r->tlb.invalidations, 1, memory_order_relaxed);
        if (lg2 == 64)
            tlb_clear(&r->tlb);
        else
            tlb_drop(&r->tlb, domain->tag, first, first + (1ull << lg2) - 1);
        pv_atc_invalidate(r, range);
        pv_section_wait(&r->section);
    }
    pthread_mutex_unlock(&domain->iommu->lock);
}

/* All are told before one is waited for: their sections end meanwhile. */
void pv_iommu_invalidate_stage2(struct pv_iommu *iommu)
{
    pthread_mutex_lock(&iommu->lock);
    for (struct requester *r = iommu->first; r; r = r->next_of_all) {
        atomic_fetch_add(&r->announced, 1);
        atomic_fetch_add_explicit(&r->tlb.invalidations, 1, memory_order_relaxed);
        tlb_clear(&r->tlb);
        pv_atc_invalidate(r, ATS_EVERYTHING);
    }
    for (struct requester *r = iommu->first; r; r = r->next_of_all)
        pv_section_wait(&r->section);
    pthread_mutex_unlock(&iommu->lock);
}

void pv_iommu_invalidate_domain(struct pv_domain *domain)
{
    invalidate(domain, 0, 64);
}

void pv_iommu_invalidate_pages(struct pv_domain *domain, uint64_t page, uint32_t shift)
{
    unsigned lg2 = shift < 52 ? PV_PAGE_SHIFT + shift : 64;
    invalidate(domain, lg2 < 64 ? page << PV_PAGE_SHIFT >> lg2 << lg2 : 0, lg2);
}
