/*
 * The data path of an emulated Intel DSA: portals, work queues, engines, operations, completion (Intel DSA
 * architecture specification 1.2 chapters 3, 5 and 8).
 *
 * Registers and commands are Python's (device.py); it configures this through the functions below, from one thread.
 * Submissions come from any thread. All DSA engines of the device run on one pv_engine; each holds at most one
 * descriptor, so one that waits (block on fault) does not hold up the others.
 *
 * Not modelled: PASIDs (a descriptor's PASID is not looked at), traffic classes, steering tags, cache control
 * (accepted hints without effect), read buffer limits, interrupt message storage.
 */
#ifndef PVFIO_DSA_ENGINE_H
#define PVFIO_DSA_ENGINE_H

#include <stdint.h>

#include "abi/abi.h"
#include "silicon/bus.h"
#include "silicon/engine.h"
#include "silicon/mmio.h"
#include "silicon/msix.h"

/* cffi: begin */
struct pv_dsa;

struct pv_dsa_config {
    uint32_t wqs;
    uint32_t groups;
    uint32_t engines;
    uint32_t handles; /* size of the interrupt handle table */
    uint64_t gencap;
    uint64_t opcap[4];
};

struct pv_dsa_wq_config {
    uint32_t size;
    uint32_t threshold;
    uint32_t dedicated;
    uint32_t priority; /* 1..15 */
    uint32_t bof;
    uint32_t ats_disable;
    uint32_t max_xfer_shift;
    uint32_t max_batch_shift;
    uint64_t op_config[4];
};

/* NULL: out of memory. The device holds references to the bus and the MSI-X. */
struct pv_dsa *pv_dsa_create(const struct pv_dsa_config *config, struct pv_bus *bus, struct pv_msix *msix, int kind);
void pv_dsa_destroy(struct pv_dsa *dsa);
struct pv_engine *pv_dsa_engine(struct pv_dsa *dsa);
struct pv_mmio *pv_dsa_portals(struct pv_dsa *dsa);
/* The opcodes this engine implements, as OPCAP. */
void pv_dsa_opcodes(uint64_t opcap[4]);

/* Not zero: portals answer (PCI memory space enable). */
void pv_dsa_decode(struct pv_dsa *dsa, int on);

/* The group of every WQ and of every engine, -1: none. Takes effect for descriptors dispatched from now on. */
void pv_dsa_assign(struct pv_dsa *dsa, const int16_t *wq_groups, const int16_t *engine_groups);
/* 0, -EINVAL, -ENOMEM. */
int pv_dsa_wq_enable(struct pv_dsa *dsa, uint32_t wq, const struct pv_dsa_wq_config *config);
/* Takes no more submissions; what is queued goes on. */
void pv_dsa_wq_close(struct pv_dsa *dsa, uint32_t wq);
/* After it was drained or aborted. */
void pv_dsa_wq_disable(struct pv_dsa *dsa, uint32_t wq);
uint32_t pv_dsa_wq_occupancy(struct pv_dsa *dsa, uint32_t wq);

/* A mark behind everything submitted so far; whether everything before the mark is done. */
uint64_t pv_dsa_wq_mark(struct pv_dsa *dsa, uint32_t wq);
int pv_dsa_wq_drained(struct pv_dsa *dsa, uint32_t wq, uint64_t mark);
/* While on, the eventfd rings whenever a descriptor is done. */
void pv_dsa_watch(struct pv_dsa *dsa, int on);
int pv_dsa_watch_fd(struct pv_dsa *dsa);
/*
 * Forgets the descriptors of every WQ whose byte is not 0, queued and begun, without completion records. The caller
 * cancels DMA before and allows it after; work of other WQs that this interrupts goes on at the next kick.
 */
void pv_dsa_abort(struct pv_dsa *dsa, const uint8_t *wqs);
/* The same for the descriptors in shared WQs that carry a PASID. */
void pv_dsa_abort_pasid(struct pv_dsa *dsa, uint32_t pasid);

/* vector < 0: the handle is invalid. */
int pv_dsa_set_handle(struct pv_dsa *dsa, uint32_t handle, int vector);
void pv_dsa_set_genctrl(struct pv_dsa *dsa, uint32_t value);
/* Sets bits of INTCAUSE and fires vector 0. */
void pv_dsa_cause(struct pv_dsa *dsa, uint32_t bits);
uint32_t pv_dsa_intcause(struct pv_dsa *dsa);
void pv_dsa_intcause_clear(struct pv_dsa *dsa, uint32_t bits);
void pv_dsa_swerr(struct pv_dsa *dsa, struct dsa_swerr *out);
void pv_dsa_swerr_clear(struct pv_dsa *dsa, uint64_t bits);

/* Empties the event log and gives it a ring of `size` entries at the IOVA `base`; size 0: there is no log. */
void pv_dsa_log_enable(struct pv_dsa *dsa, uint64_t base, uint32_t size);
/* EVLSTATUS. */
uint64_t pv_dsa_log_status(struct pv_dsa *dsa);
/* The entry software reads next; one beyond the ring is ignored. */
void pv_dsa_log_head(struct pv_dsa *dsa, uint32_t head);
void pv_dsa_log_clear_pending(struct pv_dsa *dsa);

/* While on, portals take nothing and say nothing. */
void pv_dsa_halt(struct pv_dsa *dsa, int on);

/* The vector, < 0: none, and what WQCFG has: limit 15:0, interrupt enable 16. */
void pv_dsa_occupancy_watch(struct pv_dsa *dsa, uint32_t wq, int vector, uint32_t limit);
int pv_dsa_occupancy_pending(struct pv_dsa *dsa, uint32_t wq);
void pv_dsa_occupancy_clear(struct pv_dsa *dsa, uint32_t wq);

#define PV_DSA_ANY 0x100

/* How a descriptor that passed its checks ends instead of running. */
struct pv_dsa_injection {
    uint32_t status;
    uint32_t opcode, wq; /* of the descriptors meant; PV_DSA_ANY */
    uint32_t skip;       /* how many of them run before */
    uint32_t times;
    uint32_t bytes_completed;
    uint64_t fault_addr;
};

/* 0, -ENOSPC. */
int pv_dsa_inject(struct pv_dsa *dsa, const struct pv_dsa_injection *injection);
/* Forgets injections that have not happened. */
void pv_dsa_inject_clear(struct pv_dsa *dsa);
/* cffi: end */

#endif
