/*
 * The host's dirty log for programs that race: a record of written pages by GPA, kept from stage 2's dirty bits, and its
 * judge, who looks at the bytes of memory that is nobody's any more. A page with a DMA's bytes must be in the record; one
 * that nothing could have written since it was judged must not.
 *
 * The includer has DMA_BYTE. RAM is one range of GPAs from 0 on.
 */
#ifndef RACE_LOG_H
#define RACE_LOG_H

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "c_program.h"
#include "pagetable/pagetable.h"
#include "silicon/iommu.h"

#define LOG_RAM (96ull << 20)
#define LOG_WORDS (LOG_RAM / 4096 / 64)

struct race_log {
    pthread_mutex_t lock; /* stage 2 is changed, and read and cleared, by one thread at a time */
    struct pt_table *stage2;
    struct pv_iommu *iommu;
    bool active;
    unsigned starts, harvests;
    uint64_t pages[LOG_WORDS]; /* read since they were judged, or since the start: then all, for nobody knows */
};

static void log_harvest_locked(struct race_log *log)
{
    uint64_t leaves;
    CHECK(!pt_read_clear_dirty(log->stage2, 0, LOG_RAM, log->pages, 0, &leaves));
    pv_iommu_invalidate_stage2(log->iommu);
    log->harvests++;
}

static void log_start(struct race_log *log)
{
    pthread_mutex_lock(&log->lock);
    CHECK(!pt_split_range(log->stage2, 0, LOG_RAM));
    log_harvest_locked(log);
    memset(log->pages, 0xff, sizeof(log->pages));
    log->active = true;
    log->starts++;
    pthread_mutex_unlock(&log->lock);
}

static void log_harvest(struct race_log *log)
{
    pthread_mutex_lock(&log->lock);
    log_harvest_locked(log);
    pthread_mutex_unlock(&log->lock);
}

static void log_stop(struct race_log *log)
{
    uint64_t merged;
    pthread_mutex_lock(&log->lock);
    log->active = false;
    CHECK(!pt_merge_range(log->stage2, 0, LOG_RAM, &merged));
    pv_iommu_invalidate_stage2(log->iommu);
    pt_release_detached(log->stage2);
    pthread_mutex_unlock(&log->lock);
}

static bool log_has(const uint64_t *bits, uint64_t page)
{
    return bits[page / 64] >> page % 64 & 1;
}

/*
 * Nothing reaches this memory now: judges it, and begins its record anew. Returns how many written pages were in the
 * record, as they had to be. Only `mapped` memory needs a flush, and only where a page was dirty: nothing else is in a
 * cache that lets writes pass.
 */
static unsigned log_judge(struct race_log *log, uint64_t gpa, const uint8_t *at, uint64_t size, bool mapped,
                          unsigned *epoch)
{
    uint64_t now[LOG_WORDS] = {0}, leaves;
    unsigned written = 0;
    pthread_mutex_lock(&log->lock);
    if (log->active) {
        CHECK(!pt_read_clear_dirty(log->stage2, gpa, size, now, 0, &leaves));
        if (mapped && leaves)
            pv_iommu_invalidate_stage2(log->iommu);
        for (uint64_t n = 0; n < size / 4096; n++) {
            uint64_t page = gpa / 4096 + n;
            if (memchr(at + n * 4096, DMA_BYTE, 4096)) {
                CHECK(log_has(now, n) || log_has(log->pages, page));
                written++;
            }
            log->pages[page / 64] &= ~(1ull << page % 64);
        }
    }
    *epoch = log->active ? log->starts : 0;
    pthread_mutex_unlock(&log->lock);
    return written;
}

/* Nothing could reach this memory since it was judged: it is in no record. */
static void log_check_clean(struct race_log *log, uint64_t gpa, uint64_t size, unsigned epoch)
{
    uint64_t now[LOG_WORDS] = {0}, leaves;
    pthread_mutex_lock(&log->lock);
    if (log->active && epoch == log->starts) {
        CHECK(!pt_read_clear_dirty(log->stage2, gpa, size, now, PT_PEEK, &leaves) && !leaves);
        for (uint64_t page = gpa / 4096; page < (gpa + size) / 4096; page++)
            CHECK(!log_has(log->pages, page));
    }
    pthread_mutex_unlock(&log->lock);
}

#endif
