/*
 * What happens to a device rather than by it: completion codes the host side asks for, the halt state.
 *
 * An injection replaces the running of a descriptor that passed its checks; record, interrupt, SWERR and event log then
 * are those of any other end.
 */
#include <errno.h>

#include "dsa_private.h"

int pv_dsa_inject(struct pv_dsa *dsa, const struct pv_dsa_injection *injection)
{
    int result = -ENOSPC;
    dsa_lock(&dsa->injection_lock);
    uint32_t count = atomic_load(&dsa->injections);
    if (count < DSA_INJECTIONS && injection->times) {
        dsa->injection[count] = *injection;
        atomic_store(&dsa->injections, count + 1);
        result = 0;
    }
    dsa_unlock(&dsa->injection_lock);
    return result;
}

void pv_dsa_inject_clear(struct pv_dsa *dsa)
{
    dsa_lock(&dsa->injection_lock);
    atomic_store(&dsa->injections, 0);
    dsa_unlock(&dsa->injection_lock);
}

static bool meant(const struct pv_dsa_injection *one, uint32_t opcode, uint32_t wq)
{
    return (one->opcode == PV_DSA_ANY || one->opcode == opcode) && (one->wq == PV_DSA_ANY || one->wq == wq);
}

/* Under the lock: the first injection that now happens to such a descriptor. */
static bool take(struct pv_dsa *dsa, uint32_t opcode, uint32_t wq, struct pv_dsa_injection *out)
{
    uint32_t count = atomic_load(&dsa->injections);
    for (uint32_t i = 0; i < count; i++) {
        struct pv_dsa_injection *one = &dsa->injection[i];
        if (!meant(one, opcode, wq) || (one->skip && one->skip--))
            continue;
        *out = *one;
        if (!--one->times) {
            for (uint32_t next = i + 1; next < count; next++)
                dsa->injection[next - 1] = dsa->injection[next];
            atomic_store(&dsa->injections, count - 1);
        }
        return true;
    }
    return false;
}

bool dsa_inject(struct pv_dsa *dsa, const struct dsa_slot *slot, struct dsa_work *work)
{
    struct pv_dsa_injection one;
    dsa_lock(&dsa->injection_lock);
    bool found = take(dsa, dsa_opcode(&work->desc), slot->wq, &one);
    dsa_unlock(&dsa->injection_lock);
    if (!found)
        return false;
    work->record.status = (uint8_t)one.status;
    work->record.bytes_completed = one.bytes_completed;
    work->record.fault_addr = one.fault_addr;
    return true;
}

void pv_dsa_halt(struct pv_dsa *dsa, int on)
{
    atomic_store(&dsa->halted, on != 0);
}
