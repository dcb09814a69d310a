/*
 * Which submission queue goes on (Base 3.4.4), fetching, fused pairs (Base 3.4.2), and ending commands.
 */
#include <stdlib.h>
#include <time.h>

#include "nvme_private.h"

static bool has_work(const struct pv_nvme *nvme, uint32_t id)
{
    return nvme->ready_sq[id / 64] >> id % 64 & 1;
}

/* The next one after the last that was served, of those that `wanted` says yes to; -1: none. */
static int next_ready(const struct pv_nvme *nvme, bool (*wanted)(const struct pv_nvme *nvme, uint32_t id))
{
    if (!(nvme->ready_sq[0] | nvme->ready_sq[1]))
        return -1;
    uint32_t id = nvme->next_sq;
    for (uint32_t i = 0; i < PV_NVME_QUEUES; i++, id++) {
        if (id >= PV_NVME_QUEUES)
            id = 0;
        if (has_work(nvme, id) && (!wanted || wanted(nvme, id)))
            return (int)id;
    }
    return -1;
}

static bool is_urgent(const struct pv_nvme *nvme, uint32_t id)
{
    return nvme->sq[id].priority == NVME_SQ_QPRIO_URGENT;
}

static bool has_credit(const struct pv_nvme *nvme, uint32_t id)
{
    return nvme->credit[nvme->sq[id].priority] != 0;
}

/* Weighted round robin: the admin queue, the urgent ones, then the rest by credit (Base 3.4.4.2). */
static int pick_weighted(struct pv_nvme *nvme, uint32_t *most)
{
    if (has_work(nvme, 0))
        return 0;
    int id = next_ready(nvme, is_urgent);
    if (id >= 0)
        return id;
    for (int round = 0; round < 2; round++) {
        id = next_ready(nvme, has_credit);
        if (id >= 0) {
            uint32_t credit = nvme->credit[nvme->sq[id].priority];
            if (*most > credit)
                *most = credit;
            return id;
        }
        for (int i = 0; i < 4; i++)
            nvme->credit[i] = nvme->weight[i];
    }
    return -1;
}

static int pick(struct pv_nvme *nvme, uint32_t *most)
{
    *most = nvme->burst;
    int id = nvme->ams == NVME_CC_AMS_WRRU ? pick_weighted(nvme, most) : next_ready(nvme, NULL);
    if (id >= 0)
        nvme->next_sq = (uint32_t)id + 1;
    return id;
}

/* A priority class pays for what was fetched. */
static void charge(struct pv_nvme *nvme, const struct nvme_sq *sq, uint32_t count)
{
    uint32_t *credit = &nvme->credit[sq->priority];
    *credit -= count < *credit ? count : *credit;
}

/* 0, or -errno and the controller is in fatal status: its queue cannot be read (Base 3.1.3.6, CFS). */
static int fetch(struct pv_nvme *nvme, const struct nvme_sq *sq, struct nvme_command *cmd, uint32_t count)
{
    uint32_t first = count < sq->size - sq->head ? count : sq->size - sq->head;
    struct pv_dma dma;
    int error = pv_bus_read(nvme->bus, sq->base + (uint64_t)sq->head * NVME_SQE_SIZE, cmd,
                            (uint64_t)first * NVME_SQE_SIZE, &dma);
    if (!error && first < count)
        error = pv_bus_read(nvme->bus, sq->base, cmd + first, (uint64_t)(count - first) * NVME_SQE_SIZE, &dma);
    if (error)
        nvme_fatal(nvme);
    return error;
}

static struct nvme_completion completion(const struct pv_nvme *nvme, uint32_t id, uint16_t cid, uint32_t status,
                                         uint64_t result)
{
    return (struct nvme_completion){.result = (uint32_t)result,
                                    .result_hi = (uint32_t)(result >> 32),
                                    .sq_head = (uint16_t)nvme->sq[id].head,
                                    .sq_id = (uint16_t)id,
                                    .cid = cid,
                                    .status = (uint16_t)status};
}

void nvme_end(struct pv_nvme *nvme, uint32_t id, uint16_t cid, uint32_t status, uint64_t result)
{
    if (id >= PV_NVME_QUEUES || !nvme->sq[id].live)
        return;
    struct nvme_completion entry = completion(nvme, id, cid, status, result);
    nvme_post(nvme, &nvme->cq[nvme->sq[id].cq], &entry, 1);
}

static bool same_range(const struct nvme_command *a, const struct nvme_command *b)
{
    return a->nsid == b->nsid && nvme_slba(a) == nvme_slba(b) && !((a->cdw12 ^ b->cdw12) & NVME_RW_NLB_MASK);
}

/* What is wrong with a pair; 0: it is compare and write of the same blocks. */
static uint32_t check_pair(const struct nvme_command *first, const struct nvme_command *second)
{
    if (first->opcode != NVME_CMD_COMPARE || second->opcode != NVME_CMD_WRITE || !same_range(first, second))
        return DNR(NVME_SC_INVALID_FIELD);
    return NVME_SC_SUCCESS;
}

/* Fetched commands of one queue, and the completions they give. */
struct burst {
    struct nvme_sq *sq;
    uint32_t id, count;
    struct nvme_command cmd[NVME_BURST];
    struct nvme_completion done[NVME_BURST];
    uint32_t completed;
};

/* Reads and writes that nobody watches: no rule, no other half. */
static bool may_move_later(const struct pv_nvme *nvme, const struct nvme_command *cmd)
{
    return (cmd->opcode == NVME_CMD_READ || cmd->opcode == NVME_CMD_WRITE) && !(cmd->flags & NVME_CMD_FUSE_MASK) &&
           !nvme->rules.used;
}

static uint32_t run_one(struct pv_nvme *nvme, struct burst *b, uint32_t i, uint32_t status)
{
    struct nvme_sq *sq = b->sq;
    struct nvme_request request = {.cmd = &b->cmd[i], .sq = b->id, .location = NVME_ERROR_LOCATION_NONE};
    if (may_move_later(nvme, request.cmd))
        request.end = &b->done[b->completed];
    sq->head = sq->head + 1 == sq->size ? 0 : sq->head + 1;
    if (!status && nvme->rules.used)
        status = nvme_inject(nvme, &request);
    if (!status)
        status = nvme_io(nvme, &request);
    if (status == NVME_LATER)
        return status;
    status &= ~NVME_ENDED;
    if (status) {
        nvme_settle(nvme); /* whose errors come before this one */
        nvme_note_error(nvme, &request, status);
    }
    b->done[b->completed++] = completion(nvme, b->id, b->cmd[i].cid, status, request.result);
    return status;
}

/* Two fused commands, or what is left of them; how many commands that was. */
static uint32_t run_fused(struct pv_nvme *nvme, struct burst *b, uint32_t i)
{
    uint8_t fuse = b->cmd[i].flags & NVME_CMD_FUSE_MASK;
    bool pair = fuse == NVME_CMD_FUSE_FIRST && i + 1 < b->count &&
                (b->cmd[i + 1].flags & NVME_CMD_FUSE_MASK) == NVME_CMD_FUSE_SECOND;
    if (!pair) {
        bool reserved = fuse == NVME_CMD_FUSE_MASK;
        run_one(nvme, b, i, DNR(reserved ? NVME_SC_INVALID_FIELD : NVME_SC_FUSED_MISSING));
        return 1;
    }
    uint32_t wrong = check_pair(&b->cmd[i], &b->cmd[i + 1]);
    uint32_t status = run_one(nvme, b, i, wrong);
    if (nvme_is_dead(nvme))
        return 2;
    run_one(nvme, b, i + 1, wrong ? wrong : status ? NVME_SC_FUSED_FAIL : 0);
    return 2;
}

static int run_admin(struct pv_nvme *nvme, struct burst *b)
{
    struct nvme_sq *sq = b->sq;
    for (uint32_t i = 0; i < b->count && !nvme_is_dead(nvme); i++) {
        if (!pv_engine_gate(nvme->engine))
            return PV_STEP_STOPPED;
        struct nvme_request request = {.cmd = &b->cmd[i], .location = NVME_ERROR_LOCATION_NONE};
        uint32_t status = nvme->rules.used ? nvme_inject(nvme, &request) : 0;
        if (!status && !nvme_hand_over(nvme, &b->cmd[i]))
            return PV_STEP_IDLE;
        sq->head = sq->head + 1 == sq->size ? 0 : sq->head + 1;
        if (status && status != NVME_LATER)
            nvme_end(nvme, 0, b->cmd[i].cid, status & ~NVME_ENDED, 0);
    }
    return PV_STEP_PROGRESS;
}

/* A driver that polls goes on with the first half of a burst while the other half runs; one interrupt serves a burst. */
#define POST_AT_LEAST 8

static bool is_half(const struct burst *b)
{
    return b->completed >= POST_AT_LEAST && b->completed >= b->count / 2;
}

static void post(struct pv_nvme *nvme, struct burst *b)
{
    nvme_settle(nvme);
    if (b->completed)
        nvme_post(nvme, &nvme->cq[b->sq->cq], b->done, b->completed);
    b->completed = 0;
}

static int run_io(struct pv_nvme *nvme, struct burst *b)
{
    int result = PV_STEP_PROGRESS;
    for (uint32_t i = 0; i < b->count && !nvme_is_dead(nvme);) {
        if (!pv_engine_gate(nvme->engine)) {
            result = PV_STEP_STOPPED;
            break;
        }
        if (b->cmd[i].flags & NVME_CMD_FUSE_MASK) {
            i += run_fused(nvme, b, i);
            continue;
        }
        run_one(nvme, b, i++, 0);
        if (pv_engine_pausing(nvme->engine))
            break;
        if (is_half(b) && !nvme->cq[b->sq->cq].interrupts)
            post(nvme, b);
    }
    post(nvme, b);
    return result;
}

/* One more than the burst where that would cut a fused pair in two. */
static uint32_t whole_pairs(struct pv_nvme *nvme, struct burst *b, uint32_t waiting)
{
    if ((b->cmd[b->count - 1].flags & NVME_CMD_FUSE_MASK) != NVME_CMD_FUSE_FIRST || waiting == b->count)
        return b->count;
    if (b->count > 1)
        return b->count - 1; /* the pair begins the next burst */
    return fetch(nvme, b->sq, b->cmd, 2) ? 0 : 2;
}

static int run_burst(struct pv_nvme *nvme, uint32_t id, uint32_t most)
{
    struct burst b; /* the arrays are large: not cleared */
    b.sq = &nvme->sq[id];
    b.id = id;
    b.completed = 0;
    struct nvme_cq *cq = &nvme->cq[b.sq->cq];
    uint32_t waiting = nvme_ahead(b.sq->head, b.sq->tail, b.sq->size), room = id ? nvme_cq_room(cq) : NVME_BURST;
    b.count = waiting < most ? waiting : most;
    if (b.count > room)
        b.count = room;
    int result = PV_STEP_PROGRESS;
    if (!b.count) {
        cq->starved |= waiting != 0;
    } else if (fetch(nvme, b.sq, b.cmd, b.count)) {
        return PV_STEP_IDLE;
    } else if (!id) {
        result = run_admin(nvme, &b);
    } else {
        b.count = whole_pairs(nvme, &b, waiting);
        charge(nvme, b.sq, b.count);
        result = run_io(nvme, &b);
    }
    if (b.sq->head == b.sq->tail || !b.count)
        nvme->ready_sq[id / 64] &= ~(1ull << id % 64);
    return result;
}

/* Moves once a tick, and costs next to nothing; over many bursts the ticks that fall into them add up to their time. */
static uint64_t coarse_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void nvme_catch_up(struct pv_nvme *nvme)
{
    if (atomic_load_explicit(&nvme->ready, memory_order_acquire) && atomic_load(&nvme->enabled) && !nvme_is_dead(nvme) &&
        !atomic_load_explicit(&nvme->bus->cancel, memory_order_relaxed))
        nvme_hear(nvme);
}

int nvme_step(void *device)
{
    struct pv_nvme *nvme = device;
    if (!atomic_load_explicit(&nvme->ready, memory_order_acquire) || !atomic_load(&nvme->enabled))
        return PV_STEP_OFF;
    if (nvme_is_dead(nvme)) {
        nvme_set_due(nvme);
        return PV_STEP_OFF;
    }
    if (atomic_load_explicit(&nvme->bus->cancel, memory_order_relaxed))
        return PV_STEP_IDLE;
    if (nvme->held)
        nvme_release_held(nvme);
    bool any = nvme_hear(nvme);
    any |= nvme_run_waiting(nvme);
    uint32_t most;
    int id = pick(nvme, &most);
    if (id >= 0) {
        uint64_t begin = coarse_now();
        int result = run_burst(nvme, (uint32_t)id, most);
        nvme->stats.busy_ns += coarse_now() - begin;
        return result;
    }
    return any ? PV_STEP_PROGRESS : PV_STEP_IDLE;
}
