/*
 * Device contexts, requesters, invalidation, the fault log and interrupt delivery (see iommu.h).
 *
 * Order of an invalidation, for every requester on the domain: announce it (sequence), drop the entries, wait for
 * the open section. A section that walked the old table either sees the announcement when it inserts, or its entry is
 * there to be dropped; a section that begins later finds neither.
 */
#include "iommu.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "section.h"
#include "tlb.h"
#include "walker.h"

#define FAULT_ROOM 512
#define MAX_MSI_DATA 4096
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

    pthread_mutex_t fault_lock;
    struct pv_fault fault[FAULT_ROOM];
    uint32_t fault_first, fault_count;
    uint64_t faults_lost;
    int fault_fd;
};

struct requester {
    struct pv_bus bus;
    struct pv_iommu *iommu;
    uint64_t device_id;
    _Atomic(struct pv_domain *) domain;
    struct requester *next; /* of the same domain */
    _Atomic uint64_t section;
    uint64_t sequence;      /* of the IOTLB, as the open section read it */
    struct tlb tlb;
    pthread_mutex_t msi_lock;
    int *msi_fd;            /* by message data; -1: none */
};

static struct pv_iommu *iommu_get(struct pv_iommu *iommu)
{
    atomic_fetch_add(&iommu->references, 1);
    return iommu;
}

static void log_fault(struct requester *r, struct pv_fault *fault)
{
    struct pv_iommu *iommu = r->iommu;
    struct pv_domain *domain = atomic_load(&r->domain);
    fault->device_id = r->device_id;
    fault->domain = domain ? domain->id : 0;
    pthread_mutex_lock(&iommu->fault_lock);
    if (iommu->fault_count == FAULT_ROOM) {
        iommu->faults_lost++;
    } else {
        iommu->fault[(iommu->fault_first + iommu->fault_count++) % FAULT_ROOM] = *fault;
        eventfd_write(iommu->fault_fd, 1);
    }
    pthread_mutex_unlock(&iommu->fault_lock);
}

/* With the requester's section open: the domain stays. */
static int log_reason(struct requester *r, uint64_t iova, uint32_t perm, uint8_t reason)
{
    struct pv_fault fault = {.iova = iova, .perm = (uint8_t)perm, .reason = reason};
    log_fault(r, &fault);
    return -EFAULT;
}

static const struct walk_context *context_of(const struct pv_domain *domain)
{
    static const struct walk_context blocked = {PV_DOMAIN_BLOCKED, 0, 0};
    return domain ? &domain->context : &blocked;
}

/* A large page that reaches into the interrupt window ends there. */
static inline struct pv_span span_of(uint8_t *ptr, uint64_t iova, unsigned lg2)
{
    uint64_t size = 1ull << lg2, last = iova | (size - 1);
    if (iova < PV_MSI_START && last >= PV_MSI_START)
        last = PV_MSI_START - 1;
    return (struct pv_span){ptr, last - iova + 1};
}

static int translate_miss(struct requester *r, struct pv_domain *domain, uint64_t iova, uint32_t perm,
                          struct pv_span *span)
{
    struct walk_result result;
    struct pv_fault fault = {.iova = iova, .perm = (uint8_t)perm};
    if (pv_walk(&r->iommu->host, context_of(domain), iova, perm, &result, &fault, NULL)) {
        log_fault(r, &fault);
        return -EFAULT;
    }
    uint64_t offset = iova & ((1ull << result.lg2) - 1);
    uint64_t data = (uint64_t)(uintptr_t)(result.ptr - offset) | result.perm;
    tlb_insert(&r->tlb, domain->tag, iova, result.lg2, data, r->sequence);
    *span = span_of(result.ptr, iova, result.lg2);
    return 0;
}

static int requester_translate(struct pv_bus *bus, uint64_t iova, uint32_t perm, struct pv_span *span)
{
    struct requester *r = (struct requester *)bus;
    struct pv_domain *domain = atomic_load_explicit(&r->domain, memory_order_acquire);
    if (iova >= PV_MSI_START && iova <= PV_MSI_END)
        return log_reason(r, iova, perm, PV_FAULT_INTERRUPT_RANGE);
    uint64_t data;
    unsigned lg2;
    if (domain && !(iova >> IOVA_BITS) && tlb_find(&r->tlb, domain->tag, iova, &data, &lg2) && !(perm & ~data)) {
        uint64_t offset = iova & ((1ull << lg2) - 1);
        tlb_bump(&r->tlb.hits);
        *span = span_of((uint8_t *)(uintptr_t)(data & ~4095ull) + offset, iova, lg2);
        return 0;
    }
    tlb_bump(&r->tlb.misses);
    return translate_miss(r, domain, iova, perm, span);
}

static void requester_enter(struct pv_bus *bus)
{
    struct requester *r = (struct requester *)bus;
    pv_section_enter(&r->section);
    r->sequence = atomic_load(&r->tlb.sequence);
}

static void requester_leave(struct pv_bus *bus)
{
    pv_section_leave(&((struct requester *)bus)->section);
}

/* One more in an eventfd's counter. A full one stays full, whoever made it blocking: an engine must not wait for a user. */
static int ring(int fd)
{
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    if (poll(&ready, 1, 0) == 0)
        return 0;
    return eventfd_write(fd, 1);
}

/* A remappable or compatibility format message (VT-d 5.1): here, what the host registered for the data. */
static int requester_msi(struct pv_bus *bus, uint64_t addr, uint32_t data)
{
    struct requester *r = (struct requester *)bus;
    int sent = -EFAULT;
    if (addr >= PV_MSI_START && addr <= PV_MSI_END && data < MAX_MSI_DATA) {
        pthread_mutex_lock(&r->msi_lock);
        if (r->msi_fd[data] >= 0)
            sent = ring(r->msi_fd[data]) ? -EFAULT : 0;
        pthread_mutex_unlock(&r->msi_lock);
    }
    if (sent) {
        pv_section_enter(&r->section);
        log_reason(r, addr, PV_DMA_WRITE, PV_FAULT_INTERRUPT);
        pv_section_leave(&r->section);
    }
    return sent;
}

static void requester_destroy(struct pv_bus *bus)
{
    struct requester *r = (struct requester *)bus;
    pv_requester_attach(bus, NULL);
    for (uint32_t i = 0; i < MAX_MSI_DATA; i++)
        if (r->msi_fd[i] >= 0)
            close(r->msi_fd[i]);
    free(r->msi_fd);
    pthread_mutex_destroy(&r->msi_lock);
    pv_iommu_destroy(r->iommu);
    free(r);
}

static const struct pv_bus_ops requester_ops = {requester_translate, requester_enter, requester_leave, requester_msi,
                                                requester_destroy};

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
    pthread_mutex_init(&r->msi_lock, NULL);
    return &r->bus;
}

int pv_requester_set_msi(struct pv_bus *requester, uint32_t data, int eventfd)
{
    struct requester *r = (struct requester *)requester;
    if (data >= MAX_MSI_DATA)
        return -EINVAL;
    /* An eventfd of our own: whoever gave this one may close it, and its number may come back as another file. */
    int own = eventfd < 0 ? -1 : dup(eventfd);
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

/* With the IOMMU's lock held. True: it was the last, free the domain once the lock is not held. */
static bool drop_domain(struct pv_domain *domain)
{
    if (--domain->references)
        return false;
    /* Nothing is cached: leaving a domain cleared the requester's IOTLB. */
    domain->iommu->tags[domain->tag / 64] &= ~(1ull << domain->tag % 64);
    return true;
}

static void free_domain(struct pv_domain *domain)
{
    pv_iommu_destroy(domain->iommu);
    free(domain);
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
        atomic_store(&r->domain, domain);
        if (domain) {
            domain->references++;
            r->next = domain->first;
            domain->first = r;
        }
        atomic_fetch_add(&r->tlb.sequence, 1);
        tlb_clear(&r->tlb);
        pv_section_wait(&r->section);
        last = old && drop_domain(old);
    }
    pthread_mutex_unlock(&r->iommu->lock);
    if (last)
        free_domain(old);
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

/* Domains */

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
    bool busy = domain->first != NULL, last = !busy && drop_domain(domain);
    pthread_mutex_unlock(&iommu->lock);
    if (last)
        free_domain(domain);
    return busy ? -EBUSY : 0;
}

void pv_domain_release(struct pv_domain *domain)
{
    struct pv_iommu *iommu = domain->iommu;
    pthread_mutex_lock(&iommu->lock);
    bool last = drop_domain(domain);
    pthread_mutex_unlock(&iommu->lock);
    if (last)
        free_domain(domain);
}

static void invalidate(struct pv_domain *domain, uint64_t first, uint64_t last)
{
    pthread_mutex_lock(&domain->iommu->lock);
    for (struct requester *r = domain->first; r; r = r->next) {
        atomic_fetch_add(&r->tlb.sequence, 1);
        atomic_fetch_add_explicit(&r->tlb.invalidations, 1, memory_order_relaxed);
        if (first == 0 && last == UINT64_MAX)
            tlb_clear(&r->tlb);
        else
            tlb_drop(&r->tlb, domain->tag, first, last);
        pv_section_wait(&r->section);
    }
    pthread_mutex_unlock(&domain->iommu->lock);
}

void pv_iommu_invalidate_domain(struct pv_domain *domain)
{
    invalidate(domain, 0, UINT64_MAX);
}

void pv_iommu_invalidate_pages(struct pv_domain *domain, uint64_t page, uint32_t shift)
{
    if (shift >= 52) {
        invalidate(domain, 0, UINT64_MAX);
        return;
    }
    uint64_t size = (uint64_t)PV_PAGE_SIZE << shift;
    uint64_t first = page << PV_PAGE_SHIFT & ~(size - 1);
    invalidate(domain, first, first + size - 1);
}

/* The IOMMU */

struct pv_iommu *pv_iommu_create(struct pv_memory *memory, int stage2_format, uint64_t stage2_root, uint32_t stage2_levels)
{
    struct pv_iommu *iommu = calloc(1, sizeof(*iommu));
    uint64_t *tags = calloc(MAX_DOMAIN_TAGS / 64, sizeof(*tags));
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!iommu || !tags || fd < 0) {
        free(iommu);
        free(tags);
        if (fd >= 0)
            close(fd);
        return NULL;
    }
    atomic_init(&iommu->references, 1);
    iommu->memory = pv_memory_get(memory);
    iommu->host = (struct walk_host){pv_memory_host_space(memory), stage2_format, stage2_levels, stage2_root};
    iommu->tags = tags;
    iommu->fault_fd = fd;
    pthread_mutex_init(&iommu->lock, NULL);
    pthread_mutex_init(&iommu->fault_lock, NULL);
    return iommu;
}

void pv_iommu_destroy(struct pv_iommu *iommu)
{
    if (!iommu || atomic_fetch_sub(&iommu->references, 1) > 1)
        return;
    close(iommu->fault_fd);
    pv_memory_destroy(iommu->memory);
    pthread_mutex_destroy(&iommu->lock);
    pthread_mutex_destroy(&iommu->fault_lock);
    free(iommu->tags);
    free(iommu);
}

int pv_iommu_fault_fd(struct pv_iommu *iommu)
{
    return iommu->fault_fd;
}

uint32_t pv_iommu_faults(struct pv_iommu *iommu, struct pv_fault *out, uint32_t max, uint64_t *lost)
{
    uint32_t count = 0;
    eventfd_t rang;
    pthread_mutex_lock(&iommu->fault_lock);
    while (count < max && iommu->fault_count) {
        out[count++] = iommu->fault[iommu->fault_first];
        iommu->fault_first = (iommu->fault_first + 1) % FAULT_ROOM;
        iommu->fault_count--;
    }
    if (!iommu->fault_count)
        eventfd_read(iommu->fault_fd, &rang);
    *lost = iommu->faults_lost;
    pthread_mutex_unlock(&iommu->fault_lock);
    return count;
}
