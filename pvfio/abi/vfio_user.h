/*
 * vfio-user: the messages on the socket, after the vfio-user specification 0.9.2, with its names where it has names. All
 * words are little-endian here (the specification says: of the host). Flags and numbers of regions, interrupts and
 * capabilities are those of vfio.h.
 *
 * Not here: the payload of migration data and of device features, and DIRTY_PAGES of protocol 0.1, which no client sends.
 */

#define VFIO_USER_MAJOR 0
#define VFIO_USER_MINOR 1

/* Commands. DMA_READ and DMA_WRITE go from the server to the client, all others to the server. */
#define VFIO_USER_VERSION 1
#define VFIO_USER_DMA_MAP 2
#define VFIO_USER_DMA_UNMAP 3
#define VFIO_USER_DEVICE_GET_INFO 4
#define VFIO_USER_DEVICE_GET_REGION_INFO 5
#define VFIO_USER_DEVICE_GET_REGION_IO_FDS 6
#define VFIO_USER_DEVICE_GET_IRQ_INFO 7
#define VFIO_USER_DEVICE_SET_IRQS 8
#define VFIO_USER_REGION_READ 9
#define VFIO_USER_REGION_WRITE 10
#define VFIO_USER_DMA_READ 11
#define VFIO_USER_DMA_WRITE 12
#define VFIO_USER_DEVICE_RESET 13
#define VFIO_USER_REGION_WRITE_MULTI 15
#define VFIO_USER_DEVICE_FEATURE 16
#define VFIO_USER_MIG_DATA_READ 17
#define VFIO_USER_MIG_DATA_WRITE 18

/* Header. */
#define VFIO_USER_F_TYPE_MASK 0xf
#define VFIO_USER_F_TYPE_COMMAND 0x0
#define VFIO_USER_F_TYPE_REPLY 0x1
#define VFIO_USER_F_NO_REPLY 0x10
#define VFIO_USER_F_ERROR 0x20

struct vfio_user_header {
    uint16_t msg_id;
    uint16_t cmd;
    uint32_t msg_size;
    uint32_t flags;
    uint32_t error_no;
};

/* VERSION: what a side that names no limit has, and the most that QEMU agrees to. */
#define VFIO_USER_DEFAULT_MAX_MSG_FDS 1
#define VFIO_USER_DEFAULT_MAX_DATA_XFER_SIZE 0x100000
#define VFIO_USER_DEFAULT_MAX_DMA_MAPS 65535
#define VFIO_USER_DEFAULT_PGSIZES 0x1000
#define VFIO_USER_MAX_MSG_FDS 16
#define VFIO_USER_MAX_MAX_DATA_XFER_SIZE 0x4000000

struct vfio_user_version {
    uint16_t major;
    uint16_t minor;
    uint8_t data[];
};

/* Memory. */
#define VFIO_USER_F_DMA_REGION_READ 0x1
#define VFIO_USER_F_DMA_REGION_WRITE 0x2

struct vfio_user_dma_map {
    uint32_t argsz;
    uint32_t flags;
    uint64_t offset;
    uint64_t addr;
    uint64_t size;
};

struct vfio_user_dma_unmap {
    uint32_t argsz;
    uint32_t flags;
    uint64_t addr;
    uint64_t size;
};

/* Follows a dma_unmap that asks for the dirty bitmap. */
struct vfio_user_bitmap {
    uint64_t pgsize;
    uint64_t size;
    uint8_t data[];
};

struct vfio_user_dma_region_access {
    uint64_t addr;
    uint64_t count;
    uint8_t data[];
};

/* Device. A region's description is struct vfio_region_info, an interrupt's vfio_irq_info and vfio_irq_set. */
struct vfio_user_device_info {
    uint32_t argsz;
    uint32_t flags;
    uint32_t num_regions;
    uint32_t num_irqs;
};

struct vfio_user_region_access {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    uint8_t data[];
};

#define VFIO_USER_WRITE_MULTI_DATA 8

struct vfio_user_write_multi_entry {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    uint8_t data[8];
};

struct vfio_user_write_multi {
    uint64_t wr_cnt;
    struct vfio_user_write_multi_entry wrs[];
};

/* Asked and answered with the same four words; an entry per file descriptor would follow the answer. */
struct vfio_user_region_io_fds {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t count;
};

struct vfio_user_device_feature {
    uint32_t argsz;
    uint32_t flags;
    uint8_t data[];
};

struct vfio_user_mig_data {
    uint32_t argsz;
    uint32_t size;
    uint8_t data[];
};
