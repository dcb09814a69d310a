/*
 * What the files of the NVMe data path share (see nvme_engine.h).
 */
#ifndef PVFIO_NVME_PRIVATE_H
#define PVFIO_NVME_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "nvme_engine.h"

#define NVME_BURST 32                 /* commands fetched at once */
#define NVME_MAX_TRANSFER (4096u << PV_NVME_MAX_MDTS)
#define NVME_MAX_SEGMENTS (2 + (1u << PV_NVME_MAX_MDTS)) /* of a transfer: a page each, and a first one that is cut */
#define NVME_BOUNCE (128u << 10)
#define NVME_MOVES 16                 /* commands whose data moves together: as many of 4 KiB as a section takes */
#define NVME_MAX_WAITING 8192         /* commands in flight outside their queues */
#define NVME_LATER 0x10000u           /* not a status: the command completes later */
#define NVME_ENDED 0x20000u           /* beside a status: a rule ended the command, and it may be success */
#define NVME_DOORBELL_WORDS ((2 * PV_NVME_QUEUES + 63) / 64)
#define NVME_MAX_SGL_DESCRIPTORS 4096 /* of a command, whatever they describe */
#define DNR(status) ((status) | NVME_STATUS_DNR)

struct nvme_sq {
    bool live;
    uint32_t size, cq, priority;
    uint32_t head, tail;
    uint64_t base;
};

struct nvme_cq {
    bool live, interrupts, phase;
    bool starved; /* a submission queue waits for room */
    bool silent;  /* the next interrupt is lost */
    uint32_t size, vector;
    uint32_t head, tail;
    uint32_t users;   /* submission queues */
    uint32_t unrung;  /* completions that coalescing holds the interrupt of */
    uint64_t ring_at; /* when it rings at the latest */
    uint64_t base;
    /* Completions there was no room for, in order. */
    struct nvme_completion *backlog;
    uint32_t backlog_count, backlog_size;
};

/* A piece of a host buffer. */
struct nvme_segment {
    uint64_t iova;
    uint64_t len;
    bool bucket; /* discards what is read */
};

struct nvme_data {
    uint32_t count;
    uint32_t at;      /* where the next transfer goes on */
    uint64_t offset;
    struct nvme_segment segment[NVME_MAX_SEGMENTS];
};

struct nvme_namespace {
    struct pv_nvme_backing *backing;
    struct pv_nvme_format format;
    uint8_t *metadata;  /* of all blocks, where the format has it; in memory, and gone with the namespace */
    uint64_t *unusable; /* a bit a block: Write Uncorrectable; NULL: none */
    uint64_t unusable_blocks;
    bool write_protected;
    uint32_t refuse;
};

/* A command that waits: for a time, or for a sync. */
struct nvme_waiting {
    struct nvme_waiting *next, *previous;
    struct nvme_waiting *next_job;
    struct pv_nvme_backing *backing; /* what the sync worker syncs for it */
    struct nvme_command cmd;
    uint32_t sq;
    uint64_t due;    /* NVME_NEVER: somebody else ends it, or nobody */
    uint32_t status; /* NVME_LATER: run the command when due */
    bool synced;     /* the worker has it */
    bool orphan;     /* nobody waits for the worker's answer any more */
};
#define NVME_NEVER UINT64_MAX

/* Commands that have succeeded if only their data moves, and where their completions wait for that (moves.c). */
struct nvme_moves {
    uint32_t count;
    struct pv_transfer transfer[NVME_MOVES];
    struct nvme_move {
        const struct nvme_command *cmd;
        struct nvme_completion *end;
    } of[NVME_MOVES];
};

struct pv_nvme {
    struct pv_nvme_config config;
    struct pv_bus *bus;
    struct pv_msix *msix;
    struct pv_engine *engine;
    struct pv_mmio mmio;
    bool threaded;
    _Atomic bool ready;
    _Atomic uint32_t decode, enabled, fatal;
    int event_fd;
    _Atomic uint32_t events;

    _Atomic uint32_t *doorbell;
    uint64_t doorbell_bytes;
    int doorbell_fd;      /* -1: nobody maps them */
    uint64_t complain_at; /* before that, no word of doorbells that cannot be */
    _Atomic uint64_t rung[4]; /* SQs, then CQs, 128 bits each */
    uint32_t heard[2 * PV_NVME_QUEUES];
    uint64_t shadow, event_index;
    bool switches; /* the engine will use these instead, once it has heard what was rung before */
    uint64_t next_shadow, next_event_index;
    uint64_t fresh[NVME_DOORBELL_WORDS]; /* shadow doorbells to be stored, a bit each */

    uint32_t page_shift;
    uint32_t ams, burst, weight[4], credit[4];
    uint64_t ready_sq[2]; /* SQs that have work */
    uint32_t next_sq;
    bool held; /* completions wait for bus mastering */
    struct nvme_sq sq[PV_NVME_QUEUES];
    struct nvme_cq cq[PV_NVME_QUEUES];
    uint32_t coalesce_threshold;
    uint64_t coalesce_ns;
    uint64_t uncoalesced[32]; /* vectors that coalescing is off for */
    _Atomic uint32_t pin, pin_mask;

    struct nvme_rules {
        struct pv_nvme_rule rule[PV_NVME_RULES];
        uint64_t matched[PV_NVME_RULES], acted[PV_NVME_RULES];
        uint32_t used; /* a bit a rule */
        uint64_t random;
    } rules;
    _Atomic uint32_t gone;

    struct nvme_namespace ns[PV_NVME_NAMESPACES];
    uint32_t refuse;
    bool write_through;
    struct pv_nvme_stats stats;
    struct nvme_data data;
    struct nvme_moves moves; /* empty between steps */
    uint8_t *bounce;

    struct nvme_waiting *waiting, *waiting_last; /* by due time; those without one last */
    uint32_t waiting_count;
    _Atomic uint64_t due;
    struct nvme_sync *sync;

    pthread_mutex_t lock; /* of what follows */
    uint64_t resets;
    uint32_t transfers; /* pv_nvme_transfer calls under way */
    pthread_cond_t transferred;
    struct nvme_command *admin; /* a ring of NVME_AQA_MAX */
    uint32_t admin_head, admin_count;
    struct nvme_answer {
        struct nvme_answer *next;
        uint32_t status;
        uint16_t cid;
        uint64_t result;
    } *answers, **answers_end;
    struct nvme_waiting *synced, **synced_end; /* back from the sync worker */
    _Atomic uint32_t inbox;                    /* answers and synced commands */
    struct nvme_error_log_entry error[PV_NVME_ERRORS];
    uint64_t errors;
};

/* A command on its way through the data path. */
struct nvme_request {
    const struct nvme_command *cmd;
    uint32_t sq;
    uint32_t location; /* parameter error location: byte 7:0, bit 10:8 */
    uint64_t result;
    bool corrupt;      /* an injected flip of a bit */
    struct nvme_completion *end; /* where its completion will wait, if the data may move later; else NULL */
};

extern const struct pv_mmio_ops nvme_mmio_ops;

uint64_t nvme_now(void);

static inline uint64_t nvme_slba(const struct nvme_command *cmd)
{
    return (uint64_t)cmd->cdw11 << 32 | cmd->cdw10;
}

/* How far it is from one entry of a ring to another. */
static inline uint32_t nvme_ahead(uint32_t from, uint32_t to, uint32_t size)
{
    return to >= from ? to - from : to + size - from;
}

/* In fatal status, or removed: nothing goes on. */
static inline bool nvme_is_dead(const struct pv_nvme *nvme)
{
    return atomic_load_explicit(&nvme->fatal, memory_order_relaxed) ||
           atomic_load_explicit(&nvme->gone, memory_order_relaxed);
}

/* controller.c */
void nvme_event(struct pv_nvme *nvme, uint32_t event);
void nvme_fatal(struct pv_nvme *nvme);

/* doorbell.c: the page(s); false: no room. */
bool nvme_make_doorbells(struct pv_nvme *nvme);
void nvme_drop_doorbells(struct pv_nvme *nvme);
/* What was rung since the last call; whether anything was. */
bool nvme_hear(struct pv_nvme *nvme);
/* schedule.c: the same for who has paused the engine, if it would listen; the engine is to be kicked then. */
void nvme_catch_up(struct pv_nvme *nvme);
/*
 * Where there are shadow doorbells: that of a queue, and its event index, will be stored by the engine before it does
 * anything else, and so before the command that made the queue completes.
 */
void nvme_begin_shadow(struct pv_nvme *nvme, uint32_t index);

/* schedule.c */
int nvme_step(void *device);
/* One completion of a queue's command; nothing where the queue is gone. */
void nvme_end(struct pv_nvme *nvme, uint32_t sq, uint16_t cid, uint32_t status, uint64_t result);

/* admin.c: gives an admin command to Python; false: there is no room. */
bool nvme_hand_over(struct pv_nvme *nvme, const struct nvme_command *cmd);
/* Completes what Python has answered. */
void nvme_take_answers(struct pv_nvme *nvme);
/* Forgets commands and answers. */
void nvme_drop_admin(struct pv_nvme *nvme);

/* waiting.c, all with the engine's step to themselves. NULL: too many wait. */
struct nvme_waiting *nvme_wait_until(struct pv_nvme *nvme, const struct nvme_request *request, uint64_t due,
                                     uint32_t status);
/* Ends what waits of one queue, or of all (sq < 0), with a status; 0: without a completion. */
void nvme_end_waiting(struct pv_nvme *nvme, int sq, uint32_t status);
/* What is due, and what came back from the sync worker. */
bool nvme_run_waiting(struct pv_nvme *nvme);
/* The earliest time at which something is to be done, told to whoever wakes the engine; none of a dead controller. */
void nvme_set_due(struct pv_nvme *nvme);

/* sync.c: a sync of the backing in the background, then the command completes. 0, or a status. */
uint32_t nvme_sync_later(struct pv_nvme *nvme, const struct nvme_request *request, struct pv_nvme_backing *backing);
void nvme_sync_destroy(struct pv_nvme *nvme);

/* complete.c: `count` completions of one submission queue, whose status has no phase yet. */
void nvme_post(struct pv_nvme *nvme, struct nvme_cq *cq, const struct nvme_completion *entry, uint32_t count);
/* Room for more completions after what waits for room. */
uint32_t nvme_cq_room(const struct nvme_cq *cq);
/* The driver has taken completions: what waited goes out. */
void nvme_cq_moved(struct pv_nvme *nvme, struct nvme_cq *cq);
/* After DMA was cancelled and is possible again. */
void nvme_release_held(struct pv_nvme *nvme);
/* Interrupts that coalescing holds and whose time has come; when the next one is due, NVME_NEVER: none. */
uint64_t nvme_ring_due(struct pv_nvme *nvme, uint64_t now);
void nvme_note_error(struct pv_nvme *nvme, const struct nvme_request *request, uint32_t status);

/* data.c: all 0 or an NVMe status. */
uint32_t nvme_map_data(struct pv_nvme *nvme, const struct nvme_command *cmd, uint64_t n, struct nvme_data *data);
uint32_t nvme_to_host(struct pv_nvme *nvme, struct nvme_data *data, const uint8_t *from, uint64_t n);
uint32_t nvme_from_host(struct pv_nvme *nvme, struct nvme_data *data, uint8_t *to, uint64_t n);

/* inject.c: what a rule does to a command before it runs: 0 (it runs), a status with NVME_ENDED, or NVME_LATER. */
uint32_t nvme_inject(struct pv_nvme *nvme, struct nvme_request *request);
/* After it ran well, where it is to be corrupted. */
void nvme_corrupt(struct pv_nvme *nvme, const struct nvme_request *request);

/* io.c: a status, or NVME_LATER. */
uint32_t nvme_io(struct pv_nvme *nvme, struct nvme_request *request);

/* moves.c: what waits moves now. Before anything else looks at a namespace or at a completion of the commands before. */
void nvme_settle(struct pv_nvme *nvme);

/* backing.c */
struct pv_nvme_backing {
    _Atomic uint32_t references;
    uint8_t *base; /* memory, else NULL: read and written through the functions */
    int fd;
    uint64_t size;
    bool read_only;
    struct nvme_cache *cache;
};

#endif
