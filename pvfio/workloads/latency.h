/*
 * A record of latencies in constant space: how many, their sum and sum of squares, and a histogram whose buckets are
 * 1 ns wide below 64 ns and a 32nd of a power of two wide above, so that a quantile is right within 3 %.
 *
 * Not modelled: latencies of 2^40 ns (18 minutes) and more, which all share the last bucket.
 */
#ifndef PVFIO_WORKLOADS_LATENCY_H
#define PVFIO_WORKLOADS_LATENCY_H

#include <stdint.h>

/* cffi: begin */
#define PV_LATENCY_BUCKETS 1152

/* All zero: empty. */
struct pv_latency {
    uint64_t count;
    uint64_t min; /* ns; 0 while empty */
    uint64_t max;
    double sum;
    double sum_of_squares;
    uint64_t bucket[1152];
};

void pv_latency_add(struct pv_latency *latency, const uint64_t *ns, uint64_t count);
void pv_latency_merge(struct pv_latency *into, const struct pv_latency *from);
/* The smallest latency of a bucket, in ns; for PV_LATENCY_BUCKETS and above, where the last one ends. */
uint64_t pv_latency_floor(uint32_t bucket);
/* The latency that a share (0 to 1) of the record does not exceed, taken as the middle of its bucket; 0: empty. */
double pv_latency_quantile(const struct pv_latency *latency, double share);
/* cffi: end */

void pv_latency_add_one(struct pv_latency *latency, uint64_t ns);

#endif
