/*
 * The sync worker: a thread that makes images durable, so that no queue waits for a disk.
 *
 * A command joins the sync that begins next, never one that runs: that one may have passed its data by. An inline engine
 * has no worker and syncs in its caller.
 */
#include <stdlib.h>

#include "nvme_private.h"

struct nvme_sync {
    pthread_t thread;
    pthread_cond_t work;
    struct nvme_waiting *jobs, **jobs_end;
    bool leaving;
};

/* With the lock held: the jobs of the first one's backing, in order. */
static struct nvme_waiting *take_jobs(struct nvme_sync *sync)
{
    struct nvme_waiting *taken = NULL, **taken_end = &taken, **at = &sync->jobs;
    struct pv_nvme_backing *backing = sync->jobs->backing;
    while (*at) {
        struct nvme_waiting *w = *at;
        if (w->backing != backing) {
            at = &w->next_job;
            continue;
        }
        *at = w->next_job;
        w->next_job = NULL;
        *taken_end = w;
        taken_end = &w->next_job;
    }
    sync->jobs_end = at;
    return taken;
}

static void *run(void *arg)
{
    struct pv_nvme *nvme = arg;
    struct nvme_sync *sync = nvme->sync;
    pthread_mutex_lock(&nvme->lock);
    while (!sync->leaving) {
        if (!sync->jobs) {
            pthread_cond_wait(&sync->work, &nvme->lock);
            continue;
        }
        struct nvme_waiting *jobs = take_jobs(sync);
        pthread_mutex_unlock(&nvme->lock);
        uint32_t status = pv_nvme_backing_sync(jobs->backing) ? NVME_SC_WRITE_FAULT : NVME_SC_SUCCESS;
        pthread_mutex_lock(&nvme->lock);
        for (struct nvme_waiting *w = jobs; w; w = w->next_job) {
            w->status = status;
            atomic_fetch_add(&nvme->inbox, 1);
        }
        *nvme->synced_end = jobs;
        while (*nvme->synced_end)
            nvme->synced_end = &(*nvme->synced_end)->next_job;
        pthread_mutex_unlock(&nvme->lock);
        pv_engine_kick(nvme->engine);
        pthread_mutex_lock(&nvme->lock);
    }
    pthread_mutex_unlock(&nvme->lock);
    return NULL;
}

static bool start(struct pv_nvme *nvme)
{
    if (nvme->sync)
        return true;
    struct nvme_sync *sync = calloc(1, sizeof(*sync));
    if (!sync)
        return false;
    sync->jobs_end = &sync->jobs;
    pthread_cond_init(&sync->work, NULL);
    nvme->sync = sync;
    if (!pv_start_thread(&sync->thread, run, nvme))
        return true;
    nvme->sync = NULL;
    pthread_cond_destroy(&sync->work);
    free(sync);
    return false;
}

uint32_t nvme_sync_later(struct pv_nvme *nvme, const struct nvme_request *request, struct pv_nvme_backing *backing)
{
    if (backing->base)
        return NVME_SC_SUCCESS; /* memory is as durable as it gets */
    if (!nvme->threaded)
        return pv_nvme_backing_sync(backing) ? NVME_SC_WRITE_FAULT : NVME_SC_SUCCESS;
    struct nvme_waiting *w = start(nvme) ? nvme_wait_until(nvme, request, NVME_NEVER, NVME_SC_INTERNAL) : NULL;
    if (!w)
        return NVME_SC_INTERNAL;
    w->synced = true;
    w->backing = pv_nvme_backing_get(backing);
    pthread_mutex_lock(&nvme->lock);
    *nvme->sync->jobs_end = w;
    nvme->sync->jobs_end = &w->next_job;
    pthread_cond_signal(&nvme->sync->work);
    pthread_mutex_unlock(&nvme->lock);
    return NVME_LATER;
}

static void free_jobs(struct nvme_waiting *jobs)
{
    while (jobs) {
        struct nvme_waiting *next = jobs->next_job;
        pv_nvme_backing_put(jobs->backing);
        free(jobs);
        jobs = next;
    }
}

void nvme_sync_destroy(struct pv_nvme *nvme)
{
    struct nvme_sync *sync = nvme->sync;
    if (sync) {
        pthread_mutex_lock(&nvme->lock);
        sync->leaving = true;
        pthread_cond_signal(&sync->work);
        pthread_mutex_unlock(&nvme->lock);
        pthread_join(sync->thread, NULL);
        free_jobs(sync->jobs);
        pthread_cond_destroy(&sync->work);
        free(sync);
        nvme->sync = NULL;
    }
    free_jobs(nvme->synced);
    nvme->synced = NULL;
}
