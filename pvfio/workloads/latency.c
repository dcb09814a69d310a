/* Records of latencies (see latency.h). */
#include "latency.h"

#define EXACT 64    /* buckets of 1 ns */
#define EXACT_LG2 6
#define STEPS_LG2 5 /* buckets a power of two: 32 */
#define TOP_LG2 40

_Static_assert(PV_LATENCY_BUCKETS == EXACT + ((TOP_LG2 - EXACT_LG2) << STEPS_LG2), "every bucket has a floor");

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < EXACT)
        return (uint32_t)ns;
    if (ns >> TOP_LG2)
        return PV_LATENCY_BUCKETS - 1;
    unsigned lg2 = 63u - (unsigned)__builtin_clzll(ns);
    uint32_t step = (uint32_t)(ns >> (lg2 - STEPS_LG2)) & ((1u << STEPS_LG2) - 1);
    return EXACT + ((lg2 - EXACT_LG2) << STEPS_LG2) + step;
}

uint64_t pv_latency_floor(uint32_t bucket)
{
    if (bucket < EXACT)
        return bucket;
    if (bucket >= PV_LATENCY_BUCKETS)
        return 1ull << TOP_LG2;
    unsigned lg2 = ((bucket - EXACT) >> STEPS_LG2) + EXACT_LG2;
    uint64_t step = (bucket - EXACT) & ((1u << STEPS_LG2) - 1);
    return ((1ull << STEPS_LG2) + step) << (lg2 - STEPS_LG2);
}

void pv_latency_add_one(struct pv_latency *latency, uint64_t ns)
{
    if (latency->count == 0 || ns < latency->min)
        latency->min = ns;
    if (ns > latency->max)
        latency->max = ns;
    latency->count++;
    latency->sum += (double)ns;
    latency->sum_of_squares += (double)ns * (double)ns;
    latency->bucket[bucket_of(ns)]++;
}

void pv_latency_add(struct pv_latency *latency, const uint64_t *ns, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        pv_latency_add_one(latency, ns[i]);
}

void pv_latency_merge(struct pv_latency *into, const struct pv_latency *from)
{
    if (from->count == 0)
        return;
    if (into->count == 0 || from->min < into->min)
        into->min = from->min;
    if (from->max > into->max)
        into->max = from->max;
    into->count += from->count;
    into->sum += from->sum;
    into->sum_of_squares += from->sum_of_squares;
    for (uint32_t i = 0; i < PV_LATENCY_BUCKETS; i++)
        into->bucket[i] += from->bucket[i];
}

double pv_latency_quantile(const struct pv_latency *latency, double share)
{
    if (latency->count == 0)
        return 0;
    double wanted = share * (double)latency->count, seen = 0;
    for (uint32_t i = 0; i < PV_LATENCY_BUCKETS; i++) {
        seen += (double)latency->bucket[i];
        if (seen >= wanted && latency->bucket[i]) {
            double middle = i < EXACT ? i : (double)(pv_latency_floor(i) + pv_latency_floor(i + 1) - 1) / 2;
            double min = (double)latency->min, max = (double)latency->max;
            return middle < min ? min : middle > max ? max : middle;
        }
    }
    return (double)latency->max;
}
