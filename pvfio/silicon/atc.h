/*
 * Address Translation Services: a device's own translation cache (ATC, device TLB) and what it says to the IOMMU.
 *
 * While ATS is enabled the device sends a Translation Request for an address it does not know, keeps the Translation
 * Completion, and from then on issues Translated Requests, which the IOMMU lets pass unseen. So only an Invalidate
 * Request, its own eviction, a change of the enable bit or a reset make it forget: what the IOTLB has dropped long ago
 * it still uses. The IOMMU answers Translation Requests through its own IOTLB, only from devices whose context allows
 * ATS; it logs no fault for one it refuses. The device then sends the access untranslated, and that is aborted and
 * logged as without ATS. A completion below the Smallest Translation Unit is used the same way: not at all.
 * References are to PCI Express 4.0, chapter 10.
 *
 * Not modelled: PASIDs, the Page Request Interface, ITags and the time-out of an Invalidate Completion, several
 * translations in one completion, a device that makes translated addresses up.
 */
#ifndef PVFIO_ATC_H
#define PVFIO_ATC_H

#include <stdbool.h>

#include "bus.h"
#include "tlb.h"

#define ATS_SIZE_BIT 0x800ull /* S: the address says the size (10.2.3.2, 10.3.1) */
#define ATS_STU_BASE 12       /* a Smallest Translation Unit field of 0: 4096 bytes */
#define ATS_STU_MAX 31
#define ATC_TAG 0 /* a function without PASIDs has one address space and knows no domains */

struct requester;

struct atc {
    _Atomic bool on;      /* the function's enable bit */
    _Atomic bool allowed; /* the device context lets Translation Requests through */
    _Atomic uint32_t lg2; /* of the Smallest Translation Unit */
    uint32_t lose;        /* fault injection: so many Invalidate Requests are lost; under the IOMMU's lock */
    _Atomic uint64_t untranslated, lost;
    struct tlb tlb;       /* its counts: hits, Translation Requests, Invalidate Requests */
};

/*
 * The address and S fields of an Invalidate Request for 2^lg2 bytes (12 to 64) at an address aligned to them: with S
 * set, the lowest address bit from 12 on that is clear says the size.
 */
static inline uint64_t ats_range(uint64_t address, unsigned lg2)
{
    return lg2 <= 12 ? address : address | ((1ull << (lg2 - 1)) - 4096) | ATS_SIZE_BIT;
}

static inline unsigned ats_range_lg2(uint64_t range)
{
    if (!(range & ATS_SIZE_BIT))
        return 12;
    unsigned lg2 = 13 + (unsigned)__builtin_ctzll(~(range >> 12));
    return lg2 < 64 ? lg2 : 64;
}

#define ATS_EVERYTHING ats_range(0, 64)

/* Inside a section, ATS on: 0, or -EFAULT after the fault was logged. */
int pv_atc_translate(struct requester *r, uint64_t iova, uint32_t perm, struct pv_span *span);
/* What the function's ATS control register says. Returns when no access uses what is forgotten. */
void pv_atc_control(struct requester *r, bool on, uint32_t stu);
/*
 * An Invalidate Request. The IOMMU's lock is held, the IOTLB is empty of the range and the requester's sequence is up;
 * the Invalidate Completion is the end of the section the caller waits for next (10.3.3).
 */
void pv_atc_invalidate(struct requester *r, uint64_t range);

#endif
