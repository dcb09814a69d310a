/*
 * Sections: the handshake between whoever uses a translation and whoever takes it back.
 *
 * A section counter is odd while a translation may be in use. Entering is a sequentially consistent exchange, so either the
 * one who invalidates sees the open section and waits for it, or the section sees what was invalidated. One
 * section at a time per counter; a section is short (PV_SECTION_BYTES) and never waits for anything.
 */
#ifndef PVFIO_SECTION_H
#define PVFIO_SECTION_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define PV_SPINS_BEFORE_YIELD 200

static inline void pv_relax(unsigned *spins)
{
    if (++*spins < PV_SPINS_BEFORE_YIELD)
        __builtin_ia32_pause();
    else
        sched_yield();
}

static inline void pv_section_enter(_Atomic uint64_t *section)
{
    unsigned spins = 0;
    for (;;) {
        uint64_t seen = atomic_load_explicit(section, memory_order_relaxed);
        if (!(seen & 1) && atomic_compare_exchange_weak(section, &seen, seen + 1))
            return;
        pv_relax(&spins);
    }
}

static inline void pv_section_leave(_Atomic uint64_t *section)
{
    uint64_t now = atomic_load_explicit(section, memory_order_relaxed);
    atomic_store_explicit(section, now + 1, memory_order_release);
}

/* Returns when every section that was open at the call is closed. Not from inside one. */
static inline void pv_section_wait(_Atomic uint64_t *section)
{
    atomic_thread_fence(memory_order_seq_cst);
    uint64_t seen = atomic_load(section);
    unsigned spins = 0;
    while (seen & 1 && atomic_load_explicit(section, memory_order_acquire) == seen)
        pv_relax(&spins);
}

#endif
