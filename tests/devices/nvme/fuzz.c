/*
 * Random commands, doorbells, data pointers, configuration and faults against the NVMe data path: fuzz SECONDS SEED.
 *
 * Meant to run under the address and undefined behaviour sanitizers. After every round, whatever it did, a reset makes
 * the controller read and write again. Prints how many rounds and operations there were; the seed makes them again for
 * inline engines.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "devices/nvme/nvme_engine.h"

#define BASE 0x100000ull
#define PAGES 192u
#define SIZE (PAGES * 4096ull)
#define ENTRIES 16u
#define QUEUES 4u
#define NAMESPACES 4u
#define ROUND_SECONDS 60

/* A round takes milliseconds. One that hangs says which it is, and where the caller stands. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "handle_abort=1";
}

const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "handle_abort=1";
}

static volatile sig_atomic_t running;

static void hangs(int number)
{
    char text[] = "round 0000000000 of the campaign hangs\n";
    long round = running;
    (void)number;
    for (char *digit = text + 15; round; round /= 10)
        *digit-- = (char)('0' + round % 10);
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
        _exit(3);
    abort();
}

/* What driver and device share is theirs to race for; everything else is not. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "race:pv_bus_walk\nrace:pv_bus_transfer\n";
}

struct fuzz {
    uint64_t random, operations;
    uint8_t *memory;
    struct pv_bus *bus;
    struct pv_msix *msix;
    struct pv_nvme *nvme;
    int file;
};

static uint64_t draw(struct fuzz *f, uint64_t n)
{
    f->random ^= f->random >> 12;
    f->random ^= f->random << 25;
    f->random ^= f->random >> 27;
    return (f->random * 0x2545f4914f6cdd1dull >> 11) % n;
}

static uint64_t any_word(struct fuzz *f)
{
    static const uint64_t edges[] = {0, 1, 0xffff, 0xffffffff, UINT64_MAX, UINT64_MAX - 4095, 1ull << 63, 1ull << 52};
    uint64_t word = draw(f, 1ull << 32) << 32 | draw(f, 1ull << 32);
    return draw(f, 4) ? word >> draw(f, 64) : edges[draw(f, 8)];
}

static uint64_t any_address(struct fuzz *f)
{
    uint64_t at = BASE + draw(f, PAGES + 4) * 4096;
    switch (draw(f, 8)) {
    case 0:
        return any_word(f);
    case 1:
        return at + draw(f, 4096);
    case 2:
        return at + draw(f, 512) * 8;
    default:
        return at;
    }
}

/* A queue's place: the first pages of memory. */
static uint64_t ring(uint32_t queue, int completion)
{
    return BASE + (2 * queue + (uint32_t)completion) * 4096ull;
}

static void enable(struct fuzz *f)
{
    pv_nvme_disable(f->nvme);
    memset(f->memory, 0, 2 * (QUEUES + 1) * 4096);
    if (pv_nvme_enable(f->nvme, ring(0, 0), ENTRIES, ring(0, 1), ENTRIES, 12 + draw(f, 8) / 7, (uint32_t)draw(f, 2)))
        pv_nvme_enable(f->nvme, ring(0, 0), ENTRIES, ring(0, 1), ENTRIES, 12, 0);
    for (uint32_t i = 1; i <= QUEUES; i++) {
        pv_nvme_create_cq(f->nvme, i, ring(i, 1), ENTRIES, 1, i);
        pv_nvme_create_sq(f->nvme, i, ring(i, 0), ENTRIES, (uint32_t)(1 + draw(f, i)), (uint32_t)draw(f, 4));
    }
}

static void namespace(struct fuzz *f)
{
    static const uint32_t metadata[] = {0, 0, 8, 8, 16, 64};
    uint64_t size = (1 + draw(f, 64)) * 4096;
    struct pv_nvme_backing *backing = NULL;
    struct pv_nvme_format format = {.lba_shift = 9 + (uint32_t)draw(f, 4), .metadata = metadata[draw(f, 6)]};
    format.blocks = draw(f, 8) ? size >> format.lba_shift : any_word(f);
    format.extended = (uint32_t)draw(f, 2);
    format.pi = format.metadata >= 8 && draw(f, 2);
    format.pi_first = (uint32_t)draw(f, 2);
    format.read_only = !draw(f, 6);
    if (draw(f, 3))
        backing = draw(f, 2) ? pv_nvme_memory(size) : pv_nvme_file(f->file, size, !draw(f, 4), (int)draw(f, 2));
    pv_nvme_set_namespace(f->nvme, (uint32_t)draw(f, NAMESPACES + 2), backing, &format);
    pv_nvme_backing_put(backing);
}

static void command(struct fuzz *f, struct nvme_command *cmd)
{
    static const uint8_t opcodes[] = {0, 1, 2, 4, 5, 8, 9, 0xc, 0x19};
    uint64_t *words = (uint64_t *)(void *)cmd;
    if (!draw(f, 10)) {
        for (int i = 0; i < 8; i++)
            words[i] = any_word(f);
        return;
    }
    uint64_t lba = draw(f, 4) ? draw(f, 64) : any_word(f), control = draw(f, 3) ? 0 : any_word(f) << 16;
    *cmd = (struct nvme_command){
        .opcode = draw(f, 40) ? opcodes[draw(f, sizeof(opcodes))] : (uint8_t)any_word(f),
        .flags = (uint8_t)(draw(f, 6) ? draw(f, 3) << 6 : any_word(f)),
        .cid = (uint16_t)draw(f, 65536),
        .nsid = (uint32_t)(draw(f, 20) ? 1 + draw(f, NAMESPACES) : any_word(f)),
        .metadata = any_address(f),
        .prp1 = any_address(f),
        .prp2 = draw(f, 3) ? any_address(f) : any_word(f) << 32 | draw(f, 65536),
        .cdw10 = (uint32_t)lba,
        .cdw11 = (uint32_t)(lba >> 32),
        .cdw12 = (uint32_t)(control | (draw(f, 4) ? draw(f, 16) : any_word(f) & 0xffff)),
        .cdw13 = (uint32_t)any_word(f),
        .cdw14 = (uint32_t)(draw(f, 2) ? lba : any_word(f)),
        .cdw15 = (uint32_t)any_word(f),
    };
    if (cmd->opcode == NVME_CMD_DSM)
        cmd->cdw10 = (uint32_t)draw(f, 256), cmd->cdw11 = (uint32_t)draw(f, 8);
}

/* One that a whole controller carries out, as most are that a driver sends. */
static void plain_command(struct fuzz *f, struct nvme_command *cmd)
{
    *cmd = (struct nvme_command){.opcode = draw(f, 2) ? NVME_CMD_READ : NVME_CMD_WRITE,
                                 .cid = (uint16_t)draw(f, 65536),
                                 .nsid = 1 + (uint32_t)draw(f, NAMESPACES),
                                 .metadata = any_address(f),
                                 .prp1 = BASE + draw(f, PAGES) * 4096,
                                 .prp2 = BASE + draw(f, PAGES) * 4096,
                                 .cdw10 = (uint32_t)draw(f, 16),
                                 .cdw12 = draw(f, 4) ? 0 : (uint32_t)draw(f, 8)};
}

/* Lists of what commands point to: addresses, descriptors, ranges. */
static void scribble(struct fuzz *f)
{
    uint64_t page = 2 * (QUEUES + 1) + draw(f, PAGES - 2 * (QUEUES + 1));
    uint64_t *words = (uint64_t *)(void *)(f->memory + page * 4096), kind = draw(f, 4), first = draw(f, 512);
    for (uint64_t i = first; i < 512 && i < first + 64; i++) {
        if (kind == 0)
            words[i] = any_address(f) & (draw(f, 8) ? ~4095ull : ~0ull);
        else if (kind == 1)
            words[i] = i & 1 ? draw(f, 6) << 60 | draw(f, 512) * 16 : any_address(f);
        else if (kind == 2)
            words[i] = draw(f, 128) << (i & 1 ? 0 : 32);
        else
            words[i] = any_word(f);
    }
}

static void ring_doorbell(struct fuzz *f, uint32_t index, uint64_t value)
{
    struct pv_mmio *mmio = pv_nvme_mmio(f->nvme);
    pv_mmio_store(mmio, NVME_REG_DBS + 4ull * index, 4, value);
}

static void submit(struct fuzz *f)
{
    uint32_t queue = (uint32_t)(draw(f, 8) ? 1 + draw(f, QUEUES) : 0);
    struct nvme_command *sq = (void *)(f->memory + (ring(queue, 0) - BASE));
    bool plain = draw(f, 2);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        if (plain && draw(f, 12))
            plain_command(f, &sq[i]);
        else
            command(f, &sq[i]);
    }
    ring_doorbell(f, 2 * queue, draw(f, ENTRIES));
    ring_doorbell(f, 2 * (uint32_t)(1 + draw(f, QUEUES)) + 1, draw(f, ENTRIES + 1));
}

static void fault(struct fuzz *f)
{
    struct pv_nvme_rule rule = {.sq = (int32_t)draw(f, 6) - 1,
                                .action = (uint32_t)draw(f, 8),
                                .times = draw(f, 4),
                                .skip = draw(f, 4),
                                .per_mille = (uint32_t)draw(f, 1001),
                                .status = (uint32_t)any_word(f),
                                .delay_ns = draw(f, 200000)};
    rule.mask[0] = draw(f, 2) ? 0xff : 0;
    rule.match[0] = (uint8_t)draw(f, 16);
    if (rule.action != PV_NVME_INJECT_VANISH) /* there is no way back from that */
        pv_nvme_inject(f->nvme, &rule);
    if (!draw(f, 4))
        pv_nvme_inject_clear(f->nvme, (int)draw(f, 34) - 1);
    if (draw(f, 2)) /* while there are none, commands of a burst move together */
        pv_nvme_inject_clear(f->nvme, -1);
}

static void admin(struct fuzz *f)
{
    struct nvme_command taken[8];
    uint8_t page[4096] = {0};
    uint32_t count = pv_nvme_take_admin(f->nvme, taken, 8);
    for (uint32_t i = 0; i < count; i++) {
        pv_nvme_transfer(f->nvme, &taken[i], page, (uint32_t)draw(f, sizeof(page) + 1), (int)draw(f, 2),
                         pv_nvme_resets(f->nvme));
        pv_nvme_complete(f->nvme, taken[i].cid, 0, 0);
    }
}

static void configure(struct fuzz *f)
{
    uint32_t queue = (uint32_t)draw(f, QUEUES + 2);
    switch (draw(f, 10)) {
    case 0:
        pv_nvme_set_shadow(f->nvme, any_address(f), any_address(f));
        break;
    case 1:
        pv_nvme_set_arbitration(f->nvme, (uint32_t)draw(f, 8), (uint32_t)draw(f, 256), (uint32_t)draw(f, 256), 0);
        break;
    case 2:
        pv_nvme_set_coalescing(f->nvme, (uint32_t)draw(f, 256), (uint32_t)draw(f, 3));
        break;
    case 3:
        pv_nvme_delete_sq(f->nvme, queue);
        break;
    case 4:
        pv_nvme_delete_cq(f->nvme, queue);
        break;
    case 5:
        pv_nvme_create_cq(f->nvme, queue, any_address(f), (uint32_t)draw(f, 20), (int)draw(f, 2), (uint32_t)any_word(f));
        break;
    case 6:
        pv_nvme_create_sq(f->nvme, queue, any_address(f), (uint32_t)draw(f, 20), (uint32_t)draw(f, 6), 0);
        break;
    case 7:
        pv_nvme_set_pin(f->nvme, (int)draw(f, 2));
        pv_nvme_pin(f->nvme);
        break;
    case 8:
        pv_nvme_write_protect(f->nvme, queue, (int)draw(f, 2));
        pv_nvme_set_vector_coalescing(f->nvme, (uint32_t)any_word(f), (int)draw(f, 2));
        break;
    default:
        pv_table_bus_unmap(f->bus, BASE + draw(f, PAGES) * 4096, 4096);
    }
}

static void operation(struct fuzz *f)
{
    uint64_t what = draw(f, 64);
    f->operations++;
    if (what < 24)
        submit(f);
    else if (what < 40)
        scribble(f);
    else if (what < 44)
        ring_doorbell(f, (uint32_t)draw(f, 140), any_word(f));
    else if (what < 46)
        pv_mmio_store(pv_nvme_mmio(f->nvme), any_word(f), 1u << draw(f, 4), any_word(f));
    else if (what < 50)
        admin(f);
    else if (what < 53)
        configure(f);
    else if (what < 55)
        namespace(f);
    else if (what < 57)
        fault(f);
    else if (what < 59)
        pv_nvme_abort(f->nvme, (uint32_t)draw(f, 6), (uint16_t)draw(f, 65536));
    else if (what < 60)
        enable(f);
    else
        pv_engine_kick(pv_nvme_engine(f->nvme));
    pv_nvme_events(f->nvme);
}

static void map_all(struct fuzz *f)
{
    for (uint64_t i = 0; i < PAGES; i++)
        pv_table_bus_map(f->bus, BASE + i * 4096, 4096, f->memory + i * 4096, PV_DMA_READ | PV_DMA_WRITE);
}

/* A whole controller again, that writes a block and reads it back. */
static int works(struct fuzz *f)
{
    const struct pv_nvme_format format = {.blocks = 16, .lba_shift = 12};
    struct pv_nvme_backing *backing = pv_nvme_memory(16 * 4096);
    struct nvme_command *sq = (void *)(f->memory + (ring(1, 0) - BASE));
    uint8_t *data = f->memory + 100 * 4096;
    int good = 0;
    map_all(f); /* what is mapped stays so */
    pv_nvme_inject_clear(f->nvme, -1);
    pv_nvme_set_namespace(f->nvme, 1, backing, &format);
    pv_nvme_backing_put(backing);
    pv_nvme_write_protect(f->nvme, 1, 0);
    pv_nvme_disable(f->nvme);
    memset(f->memory, 0, 2 * (QUEUES + 1) * 4096);
    pv_nvme_enable(f->nvme, ring(0, 0), ENTRIES, ring(0, 1), ENTRIES, 12, 0);
    pv_nvme_create_cq(f->nvme, 1, ring(1, 1), ENTRIES, 1, 1);
    pv_nvme_create_sq(f->nvme, 1, ring(1, 0), ENTRIES, 1, 0);
    memset(data, 0x5a, 4096);
    memset(data + 4096, 0, 4096);
    for (int i = 0; i < 2; i++)
        sq[i] = (struct nvme_command){.opcode = i ? NVME_CMD_READ : NVME_CMD_WRITE, .nsid = 1, .cdw10 = 3,
                                      .prp1 = BASE + (100 + (uint64_t)i) * 4096};
    ring_doorbell(f, 2, 2);
    for (int i = 0; i < 2000 && !good; i++) {
        /* As it is stored: a sanitizer sees an order only between accesses of the same eight bytes. */
        const struct nvme_completion *cq = (const void *)(f->memory + (ring(1, 1) - BASE));
        uint64_t last = __atomic_load_n((const uint64_t *)(const void *)&cq[1] + 1, __ATOMIC_ACQUIRE);
        good = last >> 48 == NVME_CQE_PHASE && cq[0].status == NVME_CQE_PHASE;
        if (!good)
            usleep(1000);
    }
    return good && !memcmp(data, data + 4096, 4096);
}

static int round_of(struct fuzz *f, int kind)
{
    const struct pv_nvme_config config = {.mdts_shift = 3, .namespaces = NAMESPACES};
    f->memory = aligned_alloc(4096, SIZE);
    memset(f->memory, 0, SIZE);
    f->bus = pv_table_bus_create(-1);
    f->msix = pv_msix_create(f->bus, 8);
    f->nvme = pv_nvme_create(&config, f->bus, f->msix, kind);
    pv_nvme_decode(f->nvme, 1);
    map_all(f);
    enable(f);
    for (int i = 0; i < 4; i++)
        namespace(f);
    for (int i = 0; i < 400; i++)
        operation(f);
    int good = works(f);
    pv_nvme_destroy(f->nvme);
    pv_msix_destroy(f->msix);
    pv_bus_destroy(f->bus);
    free(f->memory);
    return good;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1, rounds = 0;
    struct fuzz f = {.file = memfd_create("image", MFD_CLOEXEC)};
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    signal(SIGALRM, hangs);
    do {
        running = (sig_atomic_t)rounds;
        alarm(ROUND_SECONDS);
        f.random = (seed + rounds) * 0x9e3779b97f4a7c15ull | 1;
        if (ftruncate(f.file, 32 * 4096)) /* some images are longer than that */
            return 2;
        if (!round_of(&f, rounds % 4 ? PV_ENGINE_INLINE : PV_ENGINE_THREAD)) {
            printf("round %llu: the controller does not work after a reset\n", (unsigned long long)(seed + rounds));
            return 1;
        }
        rounds++;
        alarm(0);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) / 1e9 < seconds);
    printf("%llu rounds, %llu operations\n", (unsigned long long)rounds, (unsigned long long)f.operations);
    return 0;
}
