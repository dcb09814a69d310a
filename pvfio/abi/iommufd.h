/*
 * iommufd: the structures, request numbers and flags of /dev/iommu, with the names and layouts of <linux/iommufd.h>, and
 * the requests of <linux/vfio.h> by which an open device (a cdev, /dev/vfio/devices/vfioN) joins an iommufd.
 *
 * Not here: the VFIO compatibility IOAS, fault queues, vIOMMU and virtual device objects, mapping a file, changing the
 * process, formats other than VT-d's first stage.
 */

/* Requests: _IO(';', 0x80 + n). Every structure begins with its own size. */
#define IOMMUFD_TYPE 0x3b
#define IOMMU_DESTROY 0x3b80
#define IOMMU_IOAS_ALLOC 0x3b81
#define IOMMU_IOAS_ALLOW_IOVAS 0x3b82
#define IOMMU_IOAS_COPY 0x3b83
#define IOMMU_IOAS_IOVA_RANGES 0x3b84
#define IOMMU_IOAS_MAP 0x3b85
#define IOMMU_IOAS_UNMAP 0x3b86
#define IOMMU_OPTION 0x3b87
#define IOMMU_HWPT_ALLOC 0x3b89
#define IOMMU_GET_HW_INFO 0x3b8a
#define IOMMU_HWPT_SET_DIRTY_TRACKING 0x3b8b
#define IOMMU_HWPT_GET_DIRTY_BITMAP 0x3b8c
#define IOMMU_HWPT_INVALIDATE 0x3b8d

struct iommu_destroy {
    uint32_t size;
    uint32_t id;
};

struct iommu_ioas_alloc {
    uint32_t size;
    uint32_t flags;
    uint32_t out_ioas_id;
};

struct iommu_iova_range {
    uint64_t start;
    uint64_t last;
};

struct iommu_ioas_iova_ranges {
    uint32_t size;
    uint32_t ioas_id;
    uint32_t num_iovas;
    uint32_t __reserved;
    uint64_t allowed_iovas;
    uint64_t out_iova_alignment;
};

struct iommu_ioas_allow_iovas {
    uint32_t size;
    uint32_t ioas_id;
    uint32_t num_iovas;
    uint32_t __reserved;
    uint64_t allowed_iovas;
};

#define IOMMU_IOAS_MAP_FIXED_IOVA 0x1
#define IOMMU_IOAS_MAP_WRITEABLE 0x2
#define IOMMU_IOAS_MAP_READABLE 0x4

struct iommu_ioas_map {
    uint32_t size;
    uint32_t flags;
    uint32_t ioas_id;
    uint32_t __reserved;
    uint64_t user_va;
    uint64_t length;
    uint64_t iova;
};

struct iommu_ioas_copy {
    uint32_t size;
    uint32_t flags;
    uint32_t dst_ioas_id;
    uint32_t src_ioas_id;
    uint64_t length;
    uint64_t dst_iova;
    uint64_t src_iova;
};

struct iommu_ioas_unmap {
    uint32_t size;
    uint32_t ioas_id;
    uint64_t iova;
    uint64_t length;
};

#define IOMMU_OPTION_RLIMIT_MODE 0
#define IOMMU_OPTION_HUGE_PAGES 1
#define IOMMU_OPTION_OP_SET 0
#define IOMMU_OPTION_OP_GET 1

struct iommu_option {
    uint32_t size;
    uint32_t option_id;
    uint16_t op;
    uint16_t __reserved;
    uint32_t object_id;
    uint64_t val64;
};

#define IOMMU_HWPT_ALLOC_NEST_PARENT 0x1
#define IOMMU_HWPT_ALLOC_DIRTY_TRACKING 0x2
#define IOMMU_HWPT_FAULT_ID_VALID 0x4

#define IOMMU_HWPT_DATA_NONE 0
#define IOMMU_HWPT_DATA_VTD_S1 1

#define IOMMU_VTD_S1_SRE 0x1
#define IOMMU_VTD_S1_EAFE 0x2
#define IOMMU_VTD_S1_WPE 0x4

struct iommu_hwpt_vtd_s1 {
    uint64_t flags;
    uint64_t pgtbl_addr;
    uint32_t addr_width;
    uint32_t __reserved;
};

struct iommu_hwpt_alloc {
    uint32_t size;
    uint32_t flags;
    uint32_t dev_id;
    uint32_t pt_id;
    uint32_t out_hwpt_id;
    uint32_t __reserved;
    uint32_t data_type;
    uint32_t data_len;
    uint64_t data_uptr;
    uint32_t fault_id;
    uint32_t __reserved2;
};

#define IOMMU_HW_INFO_TYPE_NONE 0
#define IOMMU_HW_INFO_TYPE_INTEL_VTD 1

struct iommu_hw_info_vtd {
    uint32_t flags;
    uint32_t __reserved;
    uint64_t cap_reg;
    uint64_t ecap_reg;
};

#define IOMMU_HW_CAP_DIRTY_TRACKING 0x1

struct iommu_hw_info {
    uint32_t size;
    uint32_t flags;
    uint32_t dev_id;
    uint32_t data_len;
    uint64_t data_uptr;
    uint32_t out_data_type;
    uint32_t __reserved;
    uint64_t out_capabilities;
};

#define IOMMU_HWPT_DIRTY_TRACKING_ENABLE 0x1

struct iommu_hwpt_set_dirty_tracking {
    uint32_t size;
    uint32_t flags;
    uint32_t hwpt_id;
    uint32_t __reserved;
};

#define IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR 0x1

struct iommu_hwpt_get_dirty_bitmap {
    uint32_t size;
    uint32_t hwpt_id;
    uint32_t flags;
    uint32_t __reserved;
    uint64_t iova;
    uint64_t length;
    uint64_t page_size;
    uint64_t data;
};

#define IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 0
#define IOMMU_VTD_INV_FLAGS_LEAF 0x1

struct iommu_hwpt_vtd_s1_invalidate {
    uint64_t addr;
    uint64_t npages;
    uint32_t flags;
    uint32_t __reserved;
};

struct iommu_hwpt_invalidate {
    uint32_t size;
    uint32_t hwpt_id;
    uint64_t data_uptr;
    uint32_t data_type;
    uint32_t entry_len;
    uint32_t entry_num;
    uint32_t __reserved;
};

/* On a device cdev: _IO(';', 100 + n). Their structures begin with `argsz`, as VFIO's do. */
#define VFIO_DEVICE_BIND_IOMMUFD 0x3b76
#define VFIO_DEVICE_ATTACH_IOMMUFD_PT 0x3b77
#define VFIO_DEVICE_DETACH_IOMMUFD_PT 0x3b78

struct vfio_device_bind_iommufd {
    uint32_t argsz;
    uint32_t flags;
    int32_t iommufd;
    uint32_t out_devid;
};

#define VFIO_DEVICE_ATTACH_PASID 0x1
#define VFIO_DEVICE_DETACH_PASID 0x1

struct vfio_device_attach_iommufd_pt {
    uint32_t argsz;
    uint32_t flags;
    uint32_t pt_id;
    uint32_t pasid;
};

struct vfio_device_detach_iommufd_pt {
    uint32_t argsz;
    uint32_t flags;
    uint32_t pasid;
};
