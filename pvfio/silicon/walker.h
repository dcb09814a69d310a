/*
 * The two-stage walk as a function: from an IOVA and a domain to host memory, with every entry it read on request.
 */
#ifndef PVFIO_WALKER_H
#define PVFIO_WALKER_H

#include "iommu.h"

/* Stage 2 and the host's address space: the same for every domain. */
struct walk_host {
    const struct pv_space *space;
    int format;
    uint32_t levels;
    uint64_t root;
};

/* What a device context points to. */
struct walk_context {
    uint32_t type;
    uint32_t levels;
    uint64_t root;
};

struct walk_result {
    uint64_t hpa;
    uint8_t *ptr;
    unsigned lg2; /* the page around the IOVA that is contiguous in both stages */
    uint32_t perm; /* what may be cached: no writing while the stage-2 leaf is clean */
};

struct walk_recorder {
    struct pv_walk_step *steps;
    uint32_t max, count;
};

/*
 * 0, or -EFAULT with fault's gpa, stage, level and reason filled in. Without a recorder it is a device's walk and marks
 * stage 2 accessed and dirty; with one it only looks.
 */
int pv_walk(const struct walk_host *host, const struct walk_context *context, uint64_t iova, uint32_t perm,
            struct walk_result *result, struct pv_fault *fault, struct walk_recorder *recorder);

#endif
