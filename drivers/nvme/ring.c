/* The driver's side of a pair of queues: see ring.h. */
#include "ring.h"

#include <errno.h>
#include <string.h>

#include "abi/abi.h"
#include "vfio/wait.h"

#define SQE_WORDS (NVME_SQE_SIZE / 8)
#define CQE_WORDS (NVME_CQE_SIZE / 4)
#define DW3 3
#define WORD_ADDRESS 3
#define WORD_LBA 5
#define CID_SHIFT 16 /* of word 0 of a command */
#define STATUS_SHIFT (NVME_CQE_STATUS_SHIFT + 16)

static uint16_t take_cid(struct pv_nvme_ring *ring, int64_t now)
{
    uint16_t cid = ring->free[--ring->room];
    ring->outstanding++;
    ring->since[cid] = now;
    return cid;
}

/* The entry at the tail, which moves on; word 0 gets the identifier. */
static inline void put(struct pv_nvme_ring *ring, uint64_t words[SQE_WORDS], uint64_t word0, uint16_t cid)
{
    words[0] = (word0 & ~0xFFFF0000ull) | (uint64_t)cid << CID_SHIFT;
    memcpy(ring->sq + (uint64_t)ring->tail * SQE_WORDS, words, NVME_SQE_SIZE);
    ring->tail = ring->tail + 1 < ring->entries ? ring->tail + 1 : 0;
}

static int tell(struct pv_nvme_ring *ring, struct pv_mmio *mmio)
{
    int error = mmio ? pv_mmio_store(mmio, ring->sq_doorbell, 4, ring->tail) : -ENOTTY;
    if (!error)
        ring->told = ring->tail;
    return error;
}

int pv_nvme_post(struct pv_nvme_ring *ring, struct pv_mmio *mmio, const uint8_t *entry, uint32_t n, const uint64_t *lbas,
                 const uint64_t *addresses, int64_t now, int64_t *cids)
{
    uint64_t words[SQE_WORDS];
    if (n > ring->room)
        return -EAGAIN;
    memcpy(words, entry, sizeof(words));
    uint64_t word0 = words[0];
    for (uint32_t i = 0; i < n; i++) {
        uint16_t cid = take_cid(ring, now);
        cids[i] = cid;
        words[WORD_ADDRESS] = addresses[i];
        words[WORD_LBA] = lbas[i];
        put(ring, words, word0, cid);
    }
    return tell(ring, mmio);
}

int pv_nvme_post_one(struct pv_nvme_ring *ring, struct pv_mmio *mmio, const uint8_t *entry, uint64_t lba, uint64_t address,
                     int64_t now)
{
    int64_t cid;
    int error = pv_nvme_post(ring, mmio, entry, 1, &lba, &address, now, &cid);
    if (error == -EAGAIN)
        return error;
    return (int)cid | (error ? PV_NVME_UNTOLD : 0);
}

int pv_nvme_put(struct pv_nvme_ring *ring, const uint8_t *entry, int64_t now)
{
    uint64_t words[SQE_WORDS];
    if (!ring->room)
        return -EAGAIN;
    memcpy(words, entry, sizeof(words));
    uint16_t cid = take_cid(ring, now);
    put(ring, words, words[0], cid);
    return cid;
}

/* The completion at the head, which is there; -EPROTO leaves it. */
static inline int64_t take(struct pv_nvme_ring *ring)
{
    uint32_t dw3 = __atomic_load_n(ring->cq + (uint64_t)ring->head * CQE_WORDS + DW3, __ATOMIC_RELAXED);
    uint16_t cid = (uint16_t)dw3;
    if (cid >= ring->depth || !ring->since[cid])
        return -EPROTO;
    ring->since[cid] = 0;
    ring->outstanding--;
    ring->unacknowledged++;
    ring->head++;
    if (ring->head == ring->cq_entries) {
        ring->head = 0;
        ring->phase ^= 1;
    }
    return (int64_t)(dw3 >> STATUS_SHIFT) << 16 | cid;
}

static uint64_t wait_for(const struct pv_nvme_ring *ring, uint32_t most, uint32_t least, uint64_t wait_ns)
{
    uint32_t limit = ring->cq_entries - ring->head;
    if (limit > ring->outstanding)
        limit = ring->outstanding;
    if (limit > most)
        limit = most;
    const uint8_t *phases = (const uint8_t *)(ring->cq + (uint64_t)ring->head * CQE_WORDS + DW3) + 2;
    return pv_wait_run(phases, NVME_CQE_SIZE, limit, NVME_CQE_PHASE, ring->phase ? NVME_CQE_PHASE : 0, least, wait_ns);
}

static void free_cid(struct pv_nvme_ring *ring, uint16_t cid)
{
    ring->free[ring->room++] = cid;
}

static int64_t tell_bit(const struct pv_nvme_ring *ring)
{
    return ring->unacknowledged >= ring->most_unacknowledged ? PV_NVME_TELL : 0;
}

int64_t pv_nvme_reap(struct pv_nvme_ring *ring, uint32_t most, uint32_t least, uint64_t wait_ns, int release, int64_t *cids,
                     uint16_t *status)
{
    int64_t ready = (int64_t)wait_for(ring, most, least, wait_ns), count = 0, failed = 0;
    for (; count < ready; count++) {
        int64_t done = take(ring);
        if (done < 0) {
            if (!count)
                return done;
            break; /* those before it are good */
        }
        cids[count] = done & 0xFFFF;
        status[count] = (uint16_t)(done >> 16);
        failed += status[count] != 0;
        if (release)
            free_cid(ring, (uint16_t)done);
    }
    return count | failed << 16 | tell_bit(ring);
}

int64_t pv_nvme_reap_one(struct pv_nvme_ring *ring, uint64_t wait_ns)
{
    if (!wait_for(ring, 1, 1, wait_ns))
        return -EAGAIN;
    int64_t done = take(ring);
    if (done < 0)
        return done;
    free_cid(ring, (uint16_t)done);
    return done | tell_bit(ring);
}

int pv_nvme_release(struct pv_nvme_ring *ring, const int64_t *cids, uint32_t n)
{
    if (n > ring->depth - ring->outstanding - ring->room)
        return -EINVAL;
    for (uint32_t i = 0; i < n; i++)
        if (cids[i] < 0 || cids[i] >= ring->depth)
            return -EINVAL;
    for (uint32_t i = 0; i < n; i++)
        free_cid(ring, (uint16_t)cids[i]);
    return 0;
}
