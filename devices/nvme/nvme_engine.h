/*
 * The data path of an emulated NVMe controller: doorbells, queues, data pointers, I/O commands, completion and
 * interrupts (NVM Express Base 2.0c, "Base"; NVM Command Set 1.0c, "NVM").
 *
 * Registers and admin commands are Python's (device.py): admin commands are fetched here, taken and completed there.
 * Configuration comes from one thread; doorbells from any. One pv_engine runs all queues. A command that waits (for a
 * sync of its image, an injected delay) holds nothing up and no translation.
 *
 * Not modelled: fabrics, the controller memory buffer, MSI (MSI-X and the pin only), SQ associations, predictable
 * latency, the atomicity of writes larger than a block against other commands (commands run one after the other).
 */
#ifndef PVFIO_NVME_ENGINE_H
#define PVFIO_NVME_ENGINE_H

#include <stdint.h>

#include "abi/abi.h"
#include "silicon/bus.h"
#include "silicon/engine.h"
#include "silicon/mmio.h"
#include "silicon/msix.h"

/* cffi: begin */
#define PV_NVME_QUEUES 65 /* the admin queue and 64 more */
#define PV_NVME_NAMESPACES 256
#define PV_NVME_ERRORS 64
#define PV_NVME_MAX_DSTRD 4
#define PV_NVME_MAX_MDTS 9
#define PV_NVME_MAX_METADATA 64 /* bytes a block */
/* Limits of Copy: blocks in a range, in all, ranges (zero-based). */
#define PV_NVME_COPY_MSSRL 4096
#define PV_NVME_COPY_MCL 65536
#define PV_NVME_COPY_MSRC 127

/* Why the event descriptor rings. */
#define PV_NVME_EVENT_ADMIN 0x01          /* an admin command waits */
#define PV_NVME_EVENT_FATAL 0x02          /* CSTS.CFS */
#define PV_NVME_EVENT_DOORBELL 0x04       /* a doorbell of a queue that is not there was written */
#define PV_NVME_EVENT_DOORBELL_VALUE 0x08 /* a doorbell was written with a value that cannot be */
#define PV_NVME_EVENT_PIN 0x10            /* the level of INTx may have changed */
#define PV_NVME_EVENT_TIMER 0x20          /* pv_nvme_due has changed (inline engines) */
#define PV_NVME_EVENT_VANISH 0x40         /* an injected surprise removal */

struct pv_nvme;
struct pv_nvme_backing;

struct pv_nvme_config {
    uint32_t dstrd;
    uint32_t mdts_shift; /* a power of two of 4 KiB, at most PV_NVME_MAX_MDTS */
    uint32_t namespaces; /* Identify Controller, NN: 1 to PV_NVME_NAMESPACES */
    uint32_t poll_doorbells; /* not 0: the doorbell page may be written without anybody telling us */
};

struct pv_nvme_stats {
    uint64_t reads, writes;             /* commands */
    uint64_t read_bytes, written_bytes;
    uint64_t media_errors;
    uint64_t busy_ns; /* sampled: exact over many commands */
};

/* How a namespace's blocks look. */
struct pv_nvme_format {
    uint64_t blocks;
    uint32_t lba_shift;
    uint32_t metadata; /* bytes a block */
    uint32_t extended; /* metadata at the end of each block, in transfers */
    uint32_t pi;       /* protection type 0 or 1 */
    uint32_t pi_first; /* in the first eight bytes of metadata */
    uint32_t read_only;
};

/* NULL: out of memory or a bad configuration. Holds references to the bus and the MSI-X. */
struct pv_nvme *pv_nvme_create(const struct pv_nvme_config *config, struct pv_bus *bus, struct pv_msix *msix, int kind);
void pv_nvme_destroy(struct pv_nvme *nvme);
struct pv_engine *pv_nvme_engine(struct pv_nvme *nvme);
/* Stores to doorbells, by their offset in BAR 0. */
struct pv_mmio *pv_nvme_mmio(struct pv_nvme *nvme);
/* Not zero: doorbells count (PCI memory space enable). */
void pv_nvme_decode(struct pv_nvme *nvme, int on);
/* The file whose pages from NVME_REG_DBS on are the doorbells, sealed; the controller's own. -1 unless they are polled. */
int pv_nvme_doorbell_fd(struct pv_nvme *nvme);
/*
 * Other pages, in another file: who mapped those before has no part in it any more. While the controller is disabled, and
 * nobody stores through pv_nvme_mmio. 0, or -ENOMEM (no room, no descriptor) and nothing happened.
 */
int pv_nvme_renew_doorbells(struct pv_nvme *nvme);

/* An eventfd, and what it rang for; taking clears. */
int pv_nvme_event_fd(struct pv_nvme *nvme);
uint32_t pv_nvme_events(struct pv_nvme *nvme);

/* CC.EN: the admin queues, the page size, the arbitration (NVME_CC_AMS_*). 0, -EINVAL. */
int pv_nvme_enable(struct pv_nvme *nvme, uint64_t asq, uint32_t asq_size, uint64_t acq, uint32_t acq_size,
                   uint32_t page_shift, uint32_t ams);
/*
 * Every queue goes, with what is in flight; no completion follows. It waits for the engine's step and for transfers under
 * way: cancel the bus meanwhile, or they may wait for somebody.
 */
void pv_nvme_disable(struct pv_nvme *nvme);
/* How often that happened. */
uint64_t pv_nvme_resets(struct pv_nvme *nvme);
/* All: 0, or an NVMe status (SCT and SC). Sizes are in entries. */
int pv_nvme_create_cq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, int interrupts, uint32_t vector);
int pv_nvme_create_sq(struct pv_nvme *nvme, uint32_t id, uint64_t base, uint32_t size, uint32_t cq, uint32_t priority);
int pv_nvme_delete_sq(struct pv_nvme *nvme, uint32_t id);
int pv_nvme_delete_cq(struct pv_nvme *nvme, uint32_t id);
/* Shadow doorbells and event indexes (Base 5.8); 0: none. 0, -EINVAL for a page that is not aligned. */
int pv_nvme_set_shadow(struct pv_nvme *nvme, uint64_t shadow, uint64_t event_index);
/* Arbitration burst (a power of two, 7: no limit) and weights, zero-based (Base 5.27.1.1). */
void pv_nvme_set_arbitration(struct pv_nvme *nvme, uint32_t burst, uint32_t low, uint32_t medium, uint32_t high);
/* Coalescing (Base 5.27.1.6): threshold zero-based, time in 100 us; and which vectors it is off for. */
void pv_nvme_set_coalescing(struct pv_nvme *nvme, uint32_t threshold, uint32_t time);
void pv_nvme_set_vector_coalescing(struct pv_nvme *nvme, uint32_t vector, int on);

/* Admin commands that wait, oldest first; how many were taken. */
uint32_t pv_nvme_take_admin(struct pv_nvme *nvme, struct nvme_command *out, uint32_t max);
/* Completes an admin command that was taken. */
void pv_nvme_complete(struct pv_nvme *nvme, uint16_t cid, uint32_t status, uint64_t result);
/* Ends a command that has not completed yet with Abort Requested. 1: it was there, 0: not; nor one that was handed over. */
int pv_nvme_abort(struct pv_nvme *nvme, uint32_t sq, uint16_t cid);
/*
 * Moves `n` bytes between `data` and the data pointer of a command that was taken after so many resets, beside the engine
 * and in any thread. 0, an NVMe status, or -ECANCELED: there was a reset since.
 */
int pv_nvme_transfer(struct pv_nvme *nvme, const struct nvme_command *cmd, void *data, uint32_t n, int to_host,
                     uint64_t resets);

/* INTx instead of MSI-X; the level it would have; INTMS and INTMC. */
void pv_nvme_set_pin(struct pv_nvme *nvme, int on);
int pv_nvme_pin(struct pv_nvme *nvme);
void pv_nvme_mask_pin(struct pv_nvme *nvme, uint32_t mask);

/*
 * Makes a namespace, attached, or takes it away (backing NULL). One that was there goes on being refused and protected as
 * it was. Pauses the engine. 0, -EINVAL, -ENOMEM.
 */
int pv_nvme_set_namespace(struct pv_nvme *nvme, uint32_t nsid, struct pv_nvme_backing *backing,
                          const struct pv_nvme_format *format);
/* While not 0, commands for a namespace end with this status (detached, being formatted); it keeps everything. */
void pv_nvme_refuse_namespace(struct pv_nvme *nvme, uint32_t nsid, uint32_t status);
/* Off: writes complete once they are durable (Base 5.27.1.4). A reset of the controller turns it on. */
void pv_nvme_set_write_cache(struct pv_nvme *nvme, int on);
void pv_nvme_write_protect(struct pv_nvme *nvme, uint32_t nsid, int on);
/* While on, I/O commands end with this status (sanitize, format); 0: off. */
void pv_nvme_refuse_io(struct pv_nvme *nvme, uint32_t status);
void pv_nvme_get_stats(struct pv_nvme *nvme, struct pv_nvme_stats *out);

/* The error log, newest first; how many entries there are. And one more entry from the admin side. */
uint32_t pv_nvme_errors(struct pv_nvme *nvme, struct nvme_error_log_entry *out, uint32_t max, uint64_t *total);
void pv_nvme_log_error(struct pv_nvme *nvme, const struct nvme_error_log_entry *entry);

/* What a rule does to the commands it matches. */
#define PV_NVME_INJECT_DELAY 1          /* begins delay_ns later; not of a fused pair, which is one operation */
#define PV_NVME_INJECT_DROP 2           /* never completes; an abort finds it */
#define PV_NVME_INJECT_STATUS 3         /* ends with `status` (0: it lies), nothing done */
#define PV_NVME_INJECT_CORRUPT 4        /* one bit of a read's or write's data flips, and it succeeds */
#define PV_NVME_INJECT_LOSE_INTERRUPT 5 /* completes without its interrupt */
#define PV_NVME_INJECT_FATAL 6          /* the controller goes into fatal status */
#define PV_NVME_INJECT_VANISH 7         /* surprise removal */
#define PV_NVME_RULES 32

struct pv_nvme_rule {
    uint8_t match[64]; /* of the command, where mask has ones */
    uint8_t mask[64];
    int32_t sq;           /* -1: any */
    uint32_t action;
    uint64_t skip, times; /* matches to let pass, then to act on; times 0: all */
    uint32_t per_mille;   /* of what matches; 1000: all */
    uint32_t status;
    uint64_t delay_ns;
};

/* A number for the rule, -EINVAL, -ENOSPC. The first rule that acts decides. */
int pv_nvme_inject(struct pv_nvme *nvme, const struct pv_nvme_rule *rule);
/* How many commands it acted on. */
uint64_t pv_nvme_injected(struct pv_nvme *nvme, int rule);
/* Forgets one, or all (-1). */
void pv_nvme_inject_clear(struct pv_nvme *nvme, int rule);
/* What chance is made of: the same seed, rules and commands give the same faults. */
void pv_nvme_inject_seed(struct pv_nvme *nvme, uint64_t seed);

/* When an inline engine wants to be kicked, CLOCK_MONOTONIC ns; 0: not. */
uint64_t pv_nvme_due(struct pv_nvme *nvme);

/* Backings. `size` is a multiple of 4096, of an image of 512. NULL with errno. The creator holds one reference. */
struct pv_nvme_backing *pv_nvme_memory(uint64_t size);
/*
 * An image. The descriptor is duplicated. `volatile_cache`: writes stay in a cache of ours until a sync, as in a drive
 * with a volatile write cache whose power may fail.
 */
struct pv_nvme_backing *pv_nvme_file(int fd, uint64_t size, int read_only, int volatile_cache);
struct pv_nvme_backing *pv_nvme_backing_get(struct pv_nvme_backing *backing);
void pv_nvme_backing_put(struct pv_nvme_backing *backing);
/* All 0 or -errno. */
int pv_nvme_backing_sync(struct pv_nvme_backing *backing);
int pv_nvme_backing_zero(struct pv_nvme_backing *backing, uint64_t offset, uint64_t n, int discard);
int pv_nvme_backing_read(struct pv_nvme_backing *backing, uint64_t offset, void *data, uint64_t n);
int pv_nvme_backing_write(struct pv_nvme_backing *backing, uint64_t offset, const void *data, uint64_t n);
/* Where its bytes are, for as long as somebody holds it; NULL: in an image. */
uint8_t *pv_nvme_backing_memory(struct pv_nvme_backing *backing);
/* Bytes that take room. */
uint64_t pv_nvme_backing_used(struct pv_nvme_backing *backing);
/* cffi: end */

#endif
