/*
 * Address Translation Services (see atc.h).
 */
#include "atc.h"

#include <errno.h>

#include "iommu_private.h"

/*
 * Keeps a completion, unless an Invalidate Request came since the section began: it may be about this one (10.3.3). The
 * completion may be the IOTLB's, so it is the announcement after the IOTLB was emptied that counts.
 */
static void keep(struct requester *r, uint64_t iova, const struct translation *t)
{
    tlb_insert(&r->atc.tlb, ATC_TAG, iova, t->lg2, t->data, &r->announced, r->sequence);
}

int pv_atc_translate(struct requester *r, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    struct atc *atc = &r->atc;
    struct translation t;
    /* Interrupt requests are never translated (10.1). */
    if (pv_is_interrupt(iova) || iova >> IOVA_BITS ||
        atomic_load_explicit(&r->bus.untranslated, memory_order_relaxed))
        return pv_translate_untranslated(r, iova, perm, span);
    if (tlb_find(&atc->tlb, ATC_TAG, iova, &t.data, &t.lg2) && !(perm & ~t.data)) {
        tlb_bump(&atc->tlb.hits);
        *span = span_of(&t, iova);
        return 0;
    }
    tlb_bump(&atc->tlb.misses);
    if (!atomic_load_explicit(&atc->allowed, memory_order_relaxed) || pv_translation(r, iova, perm, &t) ||
        t.lg2 < atomic_load_explicit(&atc->lg2, memory_order_relaxed)) {
        tlb_bump(&atc->untranslated);
        return pv_translate_untranslated(r, iova, perm, span);
    }
    keep(r, iova, &t);
    *span = span_of(&t, iova);
    return 0;
}

/* With the IOMMU's lock held. */
static void forget(struct requester *r)
{
    atomic_fetch_add(&r->announced, 1);
    tlb_clear(&r->atc.tlb);
    pv_section_wait(&r->section);
}

void pv_atc_control(struct requester *r, bool on, uint32_t stu)
{
    struct atc *atc = &r->atc;
    unsigned lg2 = ATS_STU_BASE + (stu & ATS_STU_MAX);
    pthread_mutex_lock(&r->iommu->lock);
    if (on != atomic_load(&atc->on) || lg2 != atomic_load(&atc->lg2)) {
        atomic_store(&atc->on, false);
        forget(r);
        atomic_store(&atc->lg2, lg2);
        atomic_store(&atc->on, on);
    }
    pthread_mutex_unlock(&r->iommu->lock);
}

void pv_atc_invalidate(struct requester *r, uint64_t range)
{
    struct atc *atc = &r->atc;
    if (!atomic_load(&atc->on))
        return;
    if (atc->lose) {
        atc->lose--;
        atomic_fetch_add_explicit(&atc->lost, 1, memory_order_relaxed);
        return;
    }
    atomic_fetch_add_explicit(&atc->tlb.invalidations, 1, memory_order_relaxed);
    /* Announced again: a section that began after the first time may still have found an entry the IOTLB had then. */
    atomic_fetch_add(&r->announced, 1);
    unsigned lg2 = ats_range_lg2(range), unit = atomic_load(&atc->lg2);
    if (lg2 < unit) /* the function knows nothing smaller */
        lg2 = unit;
    if (lg2 >= 64) {
        tlb_clear(&atc->tlb);
        return;
    }
    uint64_t first = range >> lg2 << lg2;
    tlb_drop(&atc->tlb, ATC_TAG, first, first + (1ull << lg2) - 1);
}

void pv_requester_allow_ats(struct pv_bus *requester, int allowed)
{
    struct requester *r = (struct requester *)requester;
    pthread_mutex_lock(&r->iommu->lock);
    atomic_store(&r->atc.allowed, allowed != 0);
    if (!allowed)
        forget(r);
    pthread_mutex_unlock(&r->iommu->lock);
}

void pv_requester_lose_invalidations(struct pv_bus *requester, uint32_t count)
{
    struct requester *r = (struct requester *)requester;
    pthread_mutex_lock(&r->iommu->lock);
    r->atc.lose = count;
    pthread_mutex_unlock(&r->iommu->lock);
}

void pv_requester_atc_stats(struct pv_bus *requester, struct pv_atc_stats *out)
{
    struct atc *atc = &((struct requester *)requester)->atc;
    *out = (struct pv_atc_stats){.hits = atomic_load(&atc->tlb.hits),
                                 .requests = atomic_load(&atc->tlb.misses),
                                 .untranslated = atomic_load(&atc->untranslated),
                                 .invalidations = atomic_load(&atc->tlb.invalidations),
                                 .lost = atomic_load(&atc->lost),
                                 .entries = tlb_entries(&atc->tlb)};
}
