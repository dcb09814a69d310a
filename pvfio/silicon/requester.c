/*
 * Requesters: device contexts, translation through the IOTLB, interrupt messages (see iommu.h).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "iommu_private.h"
#include "ring.h"

#define MAX_MSI_DATA 4096

static int log_reason(struct requester *r, uint64_t iova, uint32_t perm, uint8_t reason)
{
    struct pv_fault fault = {.iova = iova, .perm = (uint8_t)perm, .reason = reason};
    pv_iommu_log(r, &fault);
    return -EFAULT;
}

static const struct walk_context *context_of(const struct pv_domain *domain)
{
    static const struct walk_context blocked = {PV_DOMAIN_BLOCKED, 0, 0};
    return domain ? &domain->context : &blocked;
}

static inline bool iotlb_hit(struct requester *r, const struct pv_domain *domain, uint64_t iova, uint32_t perm,
                             struct translation *t)
{
    if (!domain || iova >> IOVA_BITS || !tlb_find(&r->tlb, domain->tag, iova, &t->data, &t->lg2) || perm & ~t->data)
        return false;
    tlb_bump(&r->tlb.hits);
    return true;
}

static int iotlb_fill(struct requester *r, const struct pv_domain *domain, uint64_t iova, uint32_t perm,
                      struct translation *t, struct pv_fault *fault)
{
    struct walk_result result;
    tlb_bump(&r->tlb.misses);
    if (pv_walk(&r->iommu->host, context_of(domain), iova, perm, &result, fault, NULL))
        return -EFAULT;
    uint64_t offset = iova & ((1ull << result.lg2) - 1);
    *t = (struct translation){(uint64_t)(uintptr_t)(result.ptr - offset) | result.perm, result.lg2};
    tlb_insert(&r->tlb, domain->tag, iova, t->lg2, t->data, &r->announced, r->sequence);
    return 0;
}

int pv_translation(struct requester *r, uint64_t iova, uint32_t perm, struct translation *t)
{
    const struct pv_domain *domain = atomic_load_explicit(&r->domain, memory_order_acquire);
    struct pv_fault fault;
    return iotlb_hit(r, domain, iova, perm, t) ? 0 : iotlb_fill(r, domain, iova, perm, t, &fault);
}

static int translate_miss(struct requester *r, const struct pv_domain *domain, uint64_t iova, uint32_t perm,
                          struct pv_span *span)
{
    struct translation t;
    struct pv_fault fault = {.iova = iova, .perm = (uint8_t)perm};
    if (iotlb_fill(r, domain, iova, perm, &t, &fault)) {
        pv_iommu_log(r, &fault);
        return -EFAULT;
    }
    *span = span_of(&t, iova);
    return 0;
}

int pv_translate_untranslated(struct requester *r, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    const struct pv_domain *domain = atomic_load_explicit(&r->domain, memory_order_acquire);
    struct translation t;
    if (pv_is_interrupt(iova))
        return log_reason(r, iova, perm, PV_FAULT_INTERRUPT_RANGE);
    if (!iotlb_hit(r, domain, iova, perm, &t))
        return translate_miss(r, domain, iova, perm, span);
    *span = span_of(&t, iova);
    return 0;
}

static int requester_translate(struct pv_bus *bus, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    struct requester *r = (struct requester *)bus;
    if (__builtin_expect(atomic_load_explicit(&r->atc.on, memory_order_relaxed), 0))
        return pv_atc_translate(r, iova, perm, span);
    return pv_translate_untranslated(r, iova, perm, span);
}

static void requester_enter(struct pv_bus *bus)
{
    struct requester *r = (struct requester *)bus;
    pv_section_enter(&r->section);
    r->sequence = atomic_load(&r->announced);
}

static void requester_leave(struct pv_bus *bus)
{
    pv_section_leave(&((struct requester *)bus)->section);
}

/* A remappable or compatibility format message (VT-d 5.1): here, what the host registered for the data. */
static int requester_msi(struct pv_bus *bus, uint64_t addr, uint32_t data)
{
    struct requester *r = (struct requester *)bus;
    int sent = -EFAULT;
    if (addr >= PV_MSI_START && addr <= PV_MSI_END && data < MAX_MSI_DATA) {
        pthread_mutex_lock(&r->msi_lock);
        if (r->msi_fd[data] >= 0)
            sent = pv_ring(r->msi_fd[data]);
        pthread_mutex_unlock(&r->msi_lock);
    }
    return sent ? log_reason(r, addr, PV_DMA_WRITE, PV_FAULT_INTERRUPT) : 0;
}

static void requester_ats(struct pv_bus *bus, bool on, uint32_t stu)
{
    pv_atc_control((struct requester *)bus, on, stu);
}

static void requester_destroy(struct pv_bus *bus)
{
    struct requester *r = (struct requester *)bus;
    pv_requester_attach(bus, NULL);
    pthread_mutex_lock(&r->iommu->lock);
    struct requester **at = &r->iommu->first;
    while (*at != r)
        at = &(*at)->next_of_all;
    *at = r->next_of_all;
    pthread_mutex_unlock(&r->iommu->lock);
    for (uint32_t i = 0; i < MAX_MSI_DATA; i++)
        if (r->msi_fd[i] >= 0)
            close(r->msi_fd[i]);
    free(r->msi_fd);
    pthread_mutex_destroy(&r->msi_lock);
    pv_iommu_destroy(r->iommu);
    free(r);
}

static const struct pv_bus_ops requester_ops = {
    .translate = requester_translate,
    .enter = requester_enter,
    .leave = requester_leave,
    .msi = requester_msi,
    .ats = requester_ats,
    .destroy = requester_destroy,
};

struct pv_bus *pv_requester_create(struct pv_iommu *iommu, uint64_t device_id)
{
    struct requester *r = calloc(1, sizeof(*r));
    int *fds = malloc(MAX_MSI_DATA * sizeof(*fds));
    if (!r || !fds) {
        free(r);
        free(fds);
        return NULL;
    }
    for (uint32_t i = 0; i < MAX_MSI_DATA; i++)
        fds[i] = -1;
    r->bus.ops = &requester_ops;
    atomic_init(&r->bus.references, 1);
    r->iommu = iommu_get(iommu);
    r->device_id = device_id;
    r->msi_fd = fds;
    atomic_init(&r->atc.lg2, ATS_STU_BASE);
    pthread_mutex_init(&r->msi_lock, NULL);
    pthread_mutex_lock(&iommu->lock);
    r->next_of_all = iommu->first;
    iommu->first = r;
    pthread_mutex_unlock(&iommu->lock);
    return &r->bus;
}

int pv_requester_set_msi(struct pv_bus *requester, uint32_t data, int eventfd)
{
    struct requester *r = (struct requester *)requester;
    if (data >= MAX_MSI_DATA)
        return -EINVAL;
    /* An eventfd of our own: whoever gave this one may close it, and its number may come back as another file. */
    int own = eventfd < 0 ? -1 : fcntl(eventfd, F_DUPFD_CLOEXEC, 0);
    if (eventfd >= 0 && own < 0)
        return -errno;
    pthread_mutex_lock(&r->msi_lock);
    int old = r->msi_fd[data];
    r->msi_fd[data] = own;
    pthread_mutex_unlock(&r->msi_lock);
    if (old >= 0)
        close(old);
    return 0;
}

static void unlink_requester(struct requester *r, struct pv_domain *domain)
{
    struct requester **at = &domain->first;
    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    r->next = NULL;
}

int pv_requester_attach(struct pv_bus *requester, struct pv_domain *domain)
{
    struct requester *r = (struct requester *)requester;
    if (domain && domain->iommu != r->iommu)
        return -EINVAL;
    bool last = false;
    pthread_mutex_lock(&r->iommu->lock);
    struct pv_domain *old = atomic_load(&r->domain);
    if (old != domain) {
        if (old)
            unlink_requester(r, old);
        atomic_store(&r->domain_id, domain ? domain->id : 0);
        atomic_store(&r->domain, domain);
        if (domain) {
            domain->references++;
            r->next = domain->first;
            domain->first = r;
        }
        atomic_fetch_add(&r->announced, 1);
        tlb_clear(&r->tlb);
        pv_atc_invalidate(r, ATS_EVERYTHING);
        pv_section_wait(&r->section);
        last = old && pv_domain_drop(old);
    }
    pthread_mutex_unlock(&r->iommu->lock);
    if (last)
        pv_domain_free(old);
    return 0;
}

void pv_requester_tlb_stats(struct pv_bus *requester, struct pv_tlb_stats *out)
{
    struct tlb *tlb = &((struct requester *)requester)->tlb;
    *out = (struct pv_tlb_stats){.hits = atomic_load(&tlb->hits),
                                 .misses = atomic_load(&tlb->misses),
                                 .invalidations = atomic_load(&tlb->invalidations),
                                 .entries = tlb_entries(tlb)};
}

int pv_requester_walk(struct pv_bus *requester, uint64_t iova, uint32_t perm, uint64_t *hpa, struct pv_fault *fault,
                      struct pv_walk_step *steps, uint32_t max_steps, uint32_t *nsteps)
{
    struct requester *r = (struct requester *)requester;
    struct walk_recorder recorder = {steps, steps ? max_steps : 0, 0};
    struct walk_result result;
    *fault = (struct pv_fault){.device_id = r->device_id, .iova = iova, .perm = (uint8_t)perm};
    pthread_mutex_lock(&r->iommu->lock); /* so that the domain stays */
    struct pv_domain *domain = atomic_load(&r->domain);
    int error = -EFAULT;
    fault->domain = domain ? domain->id : 0;
    if (iova >= PV_MSI_START && iova <= PV_MSI_END)
        fault->reason = PV_FAULT_INTERRUPT_RANGE;
    else
        error = pv_walk(&r->iommu->host, context_of(domain), iova, perm, &result, fault, &recorder);
    pthread_mutex_unlock(&r->iommu->lock);
    if (!error)
        *hpa = result.hpa;
    *nsteps = recorder.count;
    return error;
}
