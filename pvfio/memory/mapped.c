/*
 * mmap for files of others (see mapped.h).
 */
#include "mapped.h"

#include <errno.h>
#include <linux/magic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "guard.h"
#include "memory.h"

#define ZFS 0x2fc12fc1
#define BCACHEFS 0xca451a4e

/* Memory, and disks of this machine. */
static const uint32_t local_file_systems[] = {
    TMPFS_MAGIC,      HUGETLBFS_MAGIC, RAMFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, ZFS, BCACHEFS,
};

int64_t pv_file_page_size(int fd)
{
    struct stat file;
    struct statfs system;
    if (fstat(fd, &file))
        return -errno;
    if (!S_ISREG(file.st_mode))
        return -ENODEV;
    if (fstatfs(fd, &system))
        return -errno;
    for (size_t i = 0; i < sizeof(local_file_systems) / sizeof(*local_file_systems); i++)
        if ((uint32_t)system.f_type == local_file_systems[i])
            return local_file_systems[i] == HUGETLBFS_MAGIC ? (int64_t)system.f_bsize : PV_PAGE_SIZE;
    return -ENODEV;
}

int pv_mapped_create(struct pv_mapped *mapped, int fd, uint64_t offset, uint64_t size, uint64_t page, uint32_t flags,
                      int eventfd)
{
    int prot = PROT_READ | (flags & PV_MAP_WRITE ? PROT_WRITE : 0);
    if (!page || page & (page - 1) || !size || (offset | size) & (page - 1) || offset >> 63)
        return -EINVAL;
    void *at = mmap(NULL, size, prot, MAP_SHARED, fd, (off_t)offset);
    /* Before Linux 6.7 a memfd sealed against writing cannot be shared, not even for reading; what is read is the same. */
    if (at == MAP_FAILED && errno == EPERM && !(flags & PV_MAP_WRITE))
        at = mmap(NULL, size, prot, MAP_PRIVATE, fd, (off_t)offset);
    if (at == MAP_FAILED)
        return -errno;
    *mapped = (struct pv_mapped){at, size, -1};
    if (!(flags & PV_MAP_GUARD))
        return 0;
    mapped->guard = pv_guard_add(at, size, page, prot & PROT_WRITE, eventfd);
    if (mapped->guard >= 0)
        return 0;
    int error = mapped->guard;
    pv_mapped_destroy(mapped);
    return error;
}

void pv_mapped_destroy(struct pv_mapped *mapped)
{
    if (!mapped->ptr)
        return;
    pv_guard_remove(mapped->guard);
    munmap(mapped->ptr, mapped->size);
    *mapped = (struct pv_mapped){NULL, 0, -1};
}
