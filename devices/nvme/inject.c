/*
 * Fault injection: rules that match commands by their bytes, their queue, their number and chance.
 *
 * A part of the device, so that a driver meets faults where they would come from. Not here: slow or failing DMA (the
 * IOMMU's faults are real ones).
 */
#include <errno.h>
#include <string.h>

#include "nvme_private.h"

#define DEFAULT_SEED 0x9e3779b97f4a7c15ull

/* xorshift64* (Vigna 2016). */
static uint64_t chance(struct pv_nvme *nvme)
{
    uint64_t x = nvme->rules.random ? nvme->rules.random : DEFAULT_SEED;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    nvme->rules.random = x;
    return x * 0x2545f4914f6cdd1dull >> 16;
}

static bool matches(const struct pv_nvme_rule *rule, const struct nvme_request *request)
{
    const uint8_t *bytes = (const uint8_t *)request->cmd;
    if (rule->sq >= 0 && (uint32_t)rule->sq != request->sq)
        return false;
    for (unsigned i = 0; i < sizeof(rule->mask); i++)
        if ((bytes[i] ^ rule->match[i]) & rule->mask[i])
            return false;
    return true;
}

static bool acts(struct pv_nvme *nvme, unsigned i, const struct nvme_request *request)
{
    struct nvme_rules *rules = &nvme->rules;
    const struct pv_nvme_rule *rule = &rules->rule[i];
    if (!(rules->used >> i & 1) || !matches(rule, request) || (rule->times && rules->acted[i] >= rule->times) ||
        rules->matched[i]++ < rule->skip || (rule->per_mille < 1000 && chance(nvme) % 1000 >= rule->per_mille))
        return false;
    rules->acted[i]++;
    return true;
}

static uint32_t act(struct pv_nvme *nvme, const struct pv_nvme_rule *rule, struct nvme_request *request)
{
    uint64_t due = NVME_NEVER;
    switch (rule->action) {
    case PV_NVME_INJECT_DELAY:
        if (request->cmd->flags & NVME_CMD_FUSE_MASK)
            return 0;
        due = nvme_now() + rule->delay_ns;
        /* fallthrough */
    case PV_NVME_INJECT_DROP:
        return nvme_wait_until(nvme, request, due, NVME_LATER) ? NVME_LATER : NVME_SC_INTERNAL | NVME_ENDED;
    case PV_NVME_INJECT_STATUS:
        return (rule->status & (NVME_SC_MASK | NVME_STATUS_DNR)) | NVME_ENDED;
    case PV_NVME_INJECT_CORRUPT:
        request->corrupt = true;
        return 0;
    case PV_NVME_INJECT_LOSE_INTERRUPT:
        nvme->cq[nvme->sq[request->sq].cq].silent = true;
        return 0;
    case PV_NVME_INJECT_FATAL:
        nvme_fatal(nvme);
        return NVME_LATER;
    default:
        atomic_store(&nvme->gone, 1);
        nvme_event(nvme, PV_NVME_EVENT_VANISH);
        return NVME_LATER;
    }
}

uint32_t nvme_inject(struct pv_nvme *nvme, struct nvme_request *request)
{
    for (unsigned i = 0; i < PV_NVME_RULES; i++)
        if (acts(nvme, i, request))
            return act(nvme, &nvme->rules.rule[i], request);
    return 0;
}

/* One byte of what a read brought, in the host. */
static void corrupt_host(struct pv_nvme *nvme, uint64_t offset, uint8_t bit)
{
    for (uint32_t i = 0; i < nvme->data.count; i++) {
        const struct nvme_segment *s = &nvme->data.segment[i];
        struct pv_dma dma;
        uint8_t byte;
        if (offset >= s->len) {
            offset -= s->len;
            continue;
        }
        if (!s->bucket && !pv_bus_read(nvme->bus, s->iova + offset, &byte, 1, &dma)) {
            byte ^= bit;
            pv_bus_write(nvme->bus, s->iova + offset, &byte, 1, &dma);
        }
        return;
    }
}

void nvme_corrupt(struct pv_nvme *nvme, const struct nvme_request *request)
{
    const struct nvme_command *cmd = request->cmd;
    const struct nvme_namespace *ns = &nvme->ns[cmd->nsid - 1];
    uint64_t n = ((cmd->cdw12 & NVME_RW_NLB_MASK) + 1ull) << ns->format.lba_shift;
    uint64_t at = chance(nvme) % n, start = nvme_slba(cmd) << ns->format.lba_shift;
    uint8_t byte, bit = (uint8_t)(1u << chance(nvme) % 8);
    if (cmd->opcode == NVME_CMD_READ) {
        corrupt_host(nvme, at, bit);
    } else if (cmd->opcode == NVME_CMD_WRITE && !pv_nvme_backing_read(ns->backing, start + at, &byte, 1)) {
        byte ^= bit;
        pv_nvme_backing_write(ns->backing, start + at, &byte, 1);
    }
}

int pv_nvme_inject(struct pv_nvme *nvme, const struct pv_nvme_rule *rule)
{
    if (rule->action < PV_NVME_INJECT_DELAY || rule->action > PV_NVME_INJECT_VANISH || rule->sq < -1 ||
        rule->sq >= PV_NVME_QUEUES || rule->per_mille > 1000)
        return -EINVAL;
    pv_engine_pause(nvme->engine);
    int number = ~nvme->rules.used ? __builtin_ctz(~nvme->rules.used) : -ENOSPC;
    if (number >= 0) {
        nvme->rules.rule[number] = *rule;
        nvme->rules.matched[number] = nvme->rules.acted[number] = 0;
        nvme->rules.used |= 1u << number;
    }
    pv_engine_unpause(nvme->engine);
    return number;
}

uint64_t pv_nvme_injected(struct pv_nvme *nvme, int rule)
{
    if (rule < 0 || rule >= PV_NVME_RULES)
        return 0;
    pv_engine_pause(nvme->engine);
    uint64_t acted = nvme->rules.acted[rule];
    pv_engine_unpause(nvme->engine);
    return acted;
}

void pv_nvme_inject_clear(struct pv_nvme *nvme, int rule)
{
    if (rule < -1 || rule >= PV_NVME_RULES)
        return;
    pv_engine_pause(nvme->engine);
    nvme->rules.used &= rule < 0 ? 0 : ~(1u << rule);
    pv_engine_unpause(nvme->engine);
}

void pv_nvme_inject_seed(struct pv_nvme *nvme, uint64_t seed)
{
    pv_engine_pause(nvme->engine);
    nvme->rules.random = seed;
    pv_engine_unpause(nvme->engine);
}
