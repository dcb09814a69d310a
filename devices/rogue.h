/*
 * The engine of a device that never stops: it writes numbered words into a window of IOVAs, round and round, and
 * takes an abort for an answer. What became of each write is kept in a log, so that whoever checks the memory can say
 * where every single one must be.
 *
 * Write n (from 0 on) puts n + 1, little-endian 64-bit, at `iova` + 8 * (n mod `words`). Not modelled: anything else
 * that a device is good for.
 */
#ifndef PVFIO_ROGUE_H
#define PVFIO_ROGUE_H

#include <stdint.h>

#include "silicon/bus.h"
#include "silicon/engine.h"

/* cffi: begin */
#define PV_ROGUE_LANDED 1
#define PV_ROGUE_ABORTED 2
#define PV_ROGUE_CANCELLED 3

struct pv_rogue;

/* Writes begun, and how they ended. */
struct pv_rogue_stats {
    uint64_t next;
    uint64_t landed;
    uint64_t aborted;
    uint64_t cancelled;
};

/* The log holds the results of the last 2^log_shift writes. It holds a reference to the bus. NULL: out of memory. */
struct pv_rogue *pv_rogue_create(struct pv_bus *bus, int kind, uint32_t log_shift);
void pv_rogue_destroy(struct pv_rogue *rogue);
struct pv_engine *pv_rogue_engine(struct pv_rogue *rogue);
/* Where it writes from the next write on; no words: it stops. Waits for the write in progress. */
void pv_rogue_aim(struct pv_rogue *rogue, uint64_t iova, uint64_t words);
void pv_rogue_stats(struct pv_rogue *rogue, struct pv_rogue_stats *out);
/* PV_ROGUE_* of write n at index n mod 2^log_shift; stands still while the engine is paused. */
const uint8_t *pv_rogue_log(struct pv_rogue *rogue);
/* cffi: end */

#endif
