/*
 * What the parts of the DSA's data path share: work queues, engines, the descriptor in hand, the face of an operation.
 *
 * Who writes what: submitters write a ring and its tail under the WQ's lock; the engine alone moves a head and the
 * slots; configuration changes only while the engine is paused.
 */
#ifndef PVFIO_DSA_PRIVATE_H
#define PVFIO_DSA_PRIVATE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "dsa_engine.h"

#define DSA_OPCODES 64
#define DSA_NO_SEQUENCE UINT64_MAX
#define DSA_BATCH_FETCH 32     /* descriptors of a batch read at once */
#define DSA_BATCH_TURN 64      /* members a batch runs before others get a turn */
#define DSA_CHUNK (1u << 20)   /* bytes an operation moves before it looks whether somebody waits for it */
#define DSA_PORTAL_SLOTS 64
#define DSA_INJECTIONS 16

/* What a piece of work answers; negative: -EFAULT or -ECANCELED from the bus. */
enum dsa_step {
    DSA_DONE,
    DSA_MORE,    /* call again */
    DSA_WAIT,    /* cannot go on now: a fault it blocks on, cancelled DMA, a drain */
    DSA_STOPPED, /* at a stop point */
};

enum dsa_phase { DSA_PHASE_RUN, DSA_PHASE_RECORD, DSA_PHASE_INTERRUPT };

struct dsa_lock {
    atomic_flag flag;
};

/* 8-byte stores on their way to a submission. */
struct dsa_portal_slot {
    uint64_t word[8];
    uint16_t page;
    uint16_t next;
};

struct dsa_wq {
    _Atomic uint64_t head; /* the engine's; apart from what submitters write */
    uint32_t priority, credit;
    uint8_t apart[64];
    struct dsa_lock lock;
    uint32_t state; /* IDXD_WQ_STATE_*: submissions are taken while enabled */
    _Atomic uint64_t tail;
    uint32_t size, threshold;
    bool dedicated, bof, ats_disable;
    uint64_t max_xfer;
    uint32_t max_batch;
    uint32_t flags; /* descriptor flags this WQ allows */
    uint64_t op_config[4];
    _Atomic uint32_t occupancy_limit; /* as WQCFG has it: limit 15:0, interrupt enable 16 */
    _Atomic int32_t occupancy_vector;
    _Atomic bool occupancy_pending;
    bool logged; /* a record went to the event log since the last drain; the engine's */
    struct dsa_hw_desc *ring;
    uint8_t *portal; /* of each descriptor in the ring: the page it came through */
    struct dsa_portal_slot slot[DSA_PORTAL_SLOTS];
};

struct dsa_op;

/* A descriptor in hand. */
struct dsa_work {
    struct dsa_hw_desc desc;
    struct dsa_completion_record record;
    const struct dsa_op *op;
    uint64_t done; /* bytes */
    struct pv_dma dma;
    enum dsa_phase phase;
    int vector;   /* to fire when done, < 0: none */
    uint32_t crc;
    uint32_t offset; /* of a delta record: the smallest the next one may have */
    bool seeded;
    bool in_batch;
    bool failed;  /* ended with another status than success, or could not say so */
    uint16_t batch_index;
};

struct dsa_batch {
    struct dsa_hw_desc fetched[DSA_BATCH_FETCH];
    uint32_t next;    /* member to run */
    uint32_t first, count; /* of the fetched ones */
    bool running;     /* `member` is in hand */
    bool failed;
    bool logged; /* a member's record went to the event log */
    struct dsa_work member;
};

/* The engine alone writes entries and moves the tail. */
struct dsa_event_log {
    struct dsa_lock lock;
    bool enabled, pending;
    uint64_t base;
    uint32_t size; /* entries */
    uint32_t head, tail;
};

/* One engine of the device. */
struct dsa_slot {
    int16_t group;
    uint8_t wq;
    uint8_t portal;
    _Atomic uint64_t sequence; /* of the descriptor in hand, DSA_NO_SEQUENCE: none */
    _Atomic uint32_t busy_wq;
    struct dsa_work work;
    struct dsa_batch batch;
};

struct dsa_group {
    uint8_t wq[256];
    uint32_t wqs, next;
};

struct pv_dsa {
    struct pv_dsa_config config;
    struct pv_bus *bus;
    struct pv_msix *msix;
    struct pv_engine *engine;
    struct pv_mmio portals;
    bool threaded;
    _Atomic bool ready; /* `engine` is set: its thread may look before pv_engine_create has returned */
    uint32_t flags; /* descriptor flags GENCAP allows */
    _Atomic uint32_t decode;
    _Atomic uint32_t watch;
    int watch_fd;
    uint64_t wait_ns; /* how long to sleep when everything waits */
    uint32_t next_slot;
    _Atomic uint32_t genctrl, intcause;
    struct dsa_lock swerr_lock;
    struct dsa_swerr swerr;
    struct dsa_event_log log;
    _Atomic bool halted;
    _Atomic uint32_t injections; /* how many there are */
    struct dsa_lock injection_lock;
    struct pv_dsa_injection injection[DSA_INJECTIONS];
    _Atomic int32_t *vector_of; /* by interrupt handle */
    struct dsa_wq *wq;
    struct dsa_group *group;
    struct dsa_slot *slot;
};

/*
 * An operation. `run` works on from work->done and may be called many times; it answers DSA_DONE with the record filled
 * in (the status, if it is not success; what else the operation returns), or as enum dsa_step says.
 */
struct dsa_op {
    uint32_t flags;       /* descriptor flags, beyond the common ones */
    uint32_t optional;    /* those of them that exist only with the GENCAP bit `needs` */
    uint64_t needs;
    bool result;          /* returns something: needs a completion record */
    bool alone;           /* not in a batch */
    uint64_t reserved[6]; /* bits of words 2 to 7 that must be 0 */
    /* Its own checks, after the common ones: a completion status, 0: fine. */
    uint8_t (*check)(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc);
    int (*run)(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work);
};

const struct dsa_op *dsa_op(uint32_t opcode);

extern const struct dsa_op dsa_op_noop, dsa_op_batch, dsa_op_drain, dsa_op_memmove, dsa_op_memfill, dsa_op_compare,
    dsa_op_crcgen, dsa_op_copy_crc;
extern const struct dsa_op dsa_op_compval, dsa_op_cr_delta, dsa_op_ap_delta, dsa_op_dualcast, dsa_op_transl_fetch,
    dsa_op_cflush;
extern const struct dsa_op dsa_op_dif_check, dsa_op_dif_ins, dsa_op_dif_strp, dsa_op_dif_updt, dsa_op_dix_gen;

static inline uint32_t dsa_flags(const struct dsa_hw_desc *desc)
{
    return desc->flags_opcode & DSA_DESC_FLAGS_MASK;
}

static inline uint32_t dsa_opcode(const struct dsa_hw_desc *desc)
{
    return desc->flags_opcode >> DSA_DESC_OPCODE_SHIFT;
}

/* Takes `desc` in hand: checks it and sets the work up. */
void dsa_work_begin(struct pv_dsa *dsa, const struct dsa_slot *slot, struct dsa_work *work,
                    const struct dsa_hw_desc *desc);
/* Goes on with it: DSA_DONE when the record is written and the interrupt sent. */
int dsa_work_advance(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work);
/* The transfer size check most operations have. */
uint8_t dsa_check_xfer(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc);
/* Size and alignment in operations on delta records; `addresses` together, those that must be aligned. */
uint8_t dsa_check_delta(const struct pv_dsa *dsa, const struct dsa_wq *wq, const struct dsa_hw_desc *desc,
                        uint64_t addresses);
/* Whether two ranges share bytes, told by IOVA as hardware does. */
static inline bool dsa_ranges_overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return b - a < a_size || a - b < b_size;
}
static inline bool dsa_overlaps(const struct dsa_hw_desc *desc)
{
    return dsa_ranges_overlap(desc->src_addr, desc->xfer_size, desc->dst_addr, desc->xfer_size);
}
/* Bytes to do in this call of `run`. */
static inline uint64_t dsa_chunk(const struct dsa_work *work)
{
    uint64_t left = work->desc.xfer_size - work->done;
    return left < DSA_CHUNK ? left : DSA_CHUNK;
}
/* What `run` answers after a bus operation: accounts its bytes, and ends the operation once all are done. */
int dsa_account(struct dsa_work *work, int result);

int dsa_step(void *dsa);
void dsa_report_swerr(struct pv_dsa *dsa, const struct dsa_swerr *error);
/* Logs work whose end no completion record can tell. 0, -ENOSPC: no log, or none that takes it; -ECANCELED. */
int dsa_log_event(struct pv_dsa *dsa, struct dsa_slot *slot, struct dsa_work *work, const struct dsa_swerr *error);
/* Ends work as an injection wants it: true where one did. */
bool dsa_inject(struct pv_dsa *dsa, const struct dsa_slot *slot, struct dsa_work *work);
/* A descriptor left the WQ's queue. */
void dsa_occupancy(struct pv_dsa *dsa, struct dsa_wq *wq);
extern const struct pv_mmio_ops dsa_portal_ops;

void dsa_lock(struct dsa_lock *lock);
static inline void dsa_unlock(struct dsa_lock *lock)
{
    atomic_flag_clear_explicit(&lock->flag, memory_order_release);
}

#endif
