/*
 * The IOMMU itself, and its fault log (see iommu.h).
 */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "iommu_private.h"

void pv_iommu_log(struct requester *r, struct pv_fault *fault)
{
    struct pv_iommu *iommu = r->iommu;
    fault->device_id = r->device_id;
    fault->domain = atomic_load_explicit(&r->domain_id, memory_order_relaxed);
    pthread_mutex_lock(&iommu->fault_lock);
    if (iommu->fault_count == PV_FAULT_ROOM) {
        iommu->faults_lost++;
    } else {
        iommu->fault[(iommu->fault_first + iommu->fault_count++) % PV_FAULT_ROOM] = *fault;
        eventfd_write(iommu->fault_fd, 1);
    }
    pthread_mutex_unlock(&iommu->fault_lock);
}

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
        iommu->fault_first = (iommu->fault_first + 1) % PV_FAULT_ROOM;
        iommu->fault_count--;
    }
    if (!iommu->fault_count)
        eventfd_read(iommu->fault_fd, &rang);
    *lost = iommu->faults_lost;
    pthread_mutex_unlock(&iommu->fault_lock);
    return count;
}
