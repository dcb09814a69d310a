/*
 * Hyper-V hypercalls of the para-virtualized IOMMU: the control word, the result, statuses and the structures in the
 * input and output page. Names follow Linux's include/hyperv; layouts are little endian and packed. Bit fields
 * are whole words with masks and shifts.
 *
 * Not described: fast (register) input, nested hypercalls, any call that is not about device domains.
 */

/* Call codes. */
#define HVCALL_CREATE_DEVICE_DOMAIN 0x00b1
#define HVCALL_ATTACH_DEVICE_DOMAIN 0x00b2
#define HVCALL_DETACH_DEVICE_DOMAIN 0x00c4
#define HVCALL_DELETE_DEVICE_DOMAIN 0x00c5
#define HVCALL_CONFIGURE_DEVICE_DOMAIN 0x00ce
#define HVCALL_FLUSH_DEVICE_DOMAIN 0x00d0
#define HVCALL_FLUSH_DEVICE_DOMAIN_LIST 0x00d1
#define HVCALL_GET_IOMMU_CAPABILITIES 0x0125
#define HVCALL_GET_LOGICAL_DEVICE_PROPERTY 0x0127

/* The control word (TLFS 3.7). */
#define HV_HYPERCALL_CODE_MASK 0xffff
#define HV_HYPERCALL_FAST 0x10000
#define HV_HYPERCALL_VARHEAD_MASK 0x7fe0000
#define HV_HYPERCALL_VARHEAD_SHIFT 17
#define HV_HYPERCALL_NESTED 0x80000000
#define HV_HYPERCALL_REP_COUNT_MASK 0xfff00000000
#define HV_HYPERCALL_REP_COUNT_SHIFT 32
#define HV_HYPERCALL_REP_START_MASK 0xfff000000000000
#define HV_HYPERCALL_REP_START_SHIFT 48
#define HV_HYPERCALL_REP_FIELD_MASK 0xfff
#define HV_HYPERCALL_RESERVED_MASK 0xf000f00078000000

/* The result word (TLFS 3.8): reps completed count from rep 0, not from rep start. */
#define HV_HYPERCALL_RESULT_MASK 0xffff
#define HV_HYPERCALL_REP_COMP_MASK 0xfff00000000
#define HV_HYPERCALL_REP_COMP_SHIFT 32
#define HV_HYPERCALL_UNAVAILABLE 0xffffffffffffffff

/* Statuses (TLFS appendix B). */
#define HV_STATUS_SUCCESS 0x0000
#define HV_STATUS_INVALID_HYPERCALL_CODE 0x0002
#define HV_STATUS_INVALID_HYPERCALL_INPUT 0x0003
#define HV_STATUS_INVALID_ALIGNMENT 0x0004
#define HV_STATUS_INVALID_PARAMETER 0x0005
#define HV_STATUS_ACCESS_DENIED 0x0006
#define HV_STATUS_INVALID_PARTITION_STATE 0x0007
#define HV_STATUS_OPERATION_DENIED 0x0008
#define HV_STATUS_UNKNOWN_PROPERTY 0x0009
#define HV_STATUS_PROPERTY_VALUE_OUT_OF_RANGE 0x000a
#define HV_STATUS_INSUFFICIENT_MEMORY 0x000b
#define HV_STATUS_INVALID_PARTITION_ID 0x000d
#define HV_STATUS_INVALID_VP_INDEX 0x000e
#define HV_STATUS_INVALID_PORT_ID 0x0011
#define HV_STATUS_INVALID_CONNECTION_ID 0x0012
#define HV_STATUS_INSUFFICIENT_BUFFERS 0x0013
#define HV_STATUS_NOT_ACKNOWLEDGED 0x0014
#define HV_STATUS_INVALID_VP_STATE 0x0015
#define HV_STATUS_NO_RESOURCES 0x001d
#define HV_STATUS_PROCESSOR_FEATURE_NOT_SUPPORTED 0x0020
#define HV_STATUS_INVALID_LP_INDEX 0x0041
#define HV_STATUS_INVALID_REGISTER_VALUE 0x0050
#define HV_STATUS_INVALID_DEVICE_ID 0x0057
#define HV_STATUS_INVALID_DEVICE_STATE 0x0058
#define HV_STATUS_KEY_ALREADY_EXISTS 0x0065
#define HV_STATUS_DEVICE_ALREADY_IN_DOMAIN 0x0066
#define HV_STATUS_OPERATION_FAILED 0x0071
#define HV_STATUS_INSUFFICIENT_ROOT_MEMORY 0x0073
#define HV_STATUS_INSUFFICIENT_CONTIGUOUS_MEMORY 0x0075
#define HV_STATUS_TIME_OUT 0x0078
#define HV_STATUS_INSUFFICIENT_CONTIGUOUS_ROOT_MEMORY 0x0083

#define HV_PARTITION_ID_SELF 0xffffffffffffffff

/* A device domain's id: type 3:0, reserved 31:4, id 63:32. */
#define HV_DEVICE_DOMAIN_TYPE_MASK 0xf
#define HV_DEVICE_DOMAIN_TYPE_S1 1
#define HV_DEVICE_DOMAIN_RESERVED_MASK 0xfffffff0
#define HV_DEVICE_DOMAIN_ID_SHIFT 32
#define HV_DEVICE_DOMAIN_ID_DEFAULT 0
#define HV_DEVICE_DOMAIN_ID_FIRST 1
#define HV_DEVICE_DOMAIN_ID_LAST 0xfffffffe
#define HV_DEVICE_DOMAIN_ID_NULL 0xffffffff

/* A device's id: type 63:62, the rest by type. */
#define HV_DEVICE_TYPE_SHIFT 62
#define HV_DEVICE_TYPE_LOGICAL 0
#define HV_DEVICE_TYPE_PCI 1
#define HV_DEVICE_TYPE_IOAPIC 2
#define HV_DEVICE_TYPE_ACPI 3
#define HV_LOGICAL_DEVICE_ID_MASK 0x3fffffffffffffff

struct hv_input_device_domain {
    uint64_t partition_id;
    uint8_t owner_vtl;
    uint8_t padding[7];
    uint64_t domain_id;
};

#define HV_CREATE_DOMAIN_FORWARD_PROGRESS_REQUIRED 0x1
#define HV_CREATE_DOMAIN_INHERIT_OWNING_VTL 0x2
#define HV_CREATE_DOMAIN_RESERVED_MASK 0xfffffffc

struct hv_input_create_device_domain {
    struct hv_input_device_domain device_domain;
    uint32_t flags;
};

struct hv_input_delete_device_domain {
    struct hv_input_device_domain device_domain;
};

struct hv_input_attach_device_domain {
    struct hv_input_device_domain device_domain;
    uint64_t device_id;
};

struct hv_input_detach_device_domain {
    uint64_t partition_id;
    uint64_t device_id;
};

#define HV_DOMAIN_TRANSLATION_ENABLED 0x1
#define HV_DOMAIN_BLOCKED 0x2
#define HV_DOMAIN_FIRST_STAGE_5_LEVEL 0x4
#define HV_DOMAIN_RESERVED_MASK 0xfffffffffffffff8

struct hv_input_configure_device_domain {
    struct hv_input_device_domain device_domain;
    uint64_t flags;
    uint64_t page_table_root;
};

struct hv_input_flush_device_domain {
    struct hv_input_device_domain device_domain;
    uint32_t flags;
    uint32_t reserved;
};

/* A list entry: 2^shift pages (bits 11:0) around page number (bits 63:12). */
#define HV_FLUSH_LIST_IOMMU_FORMAT 0x1
#define HV_FLUSH_LIST_RESERVED_MASK 0xfffffffe
#define HV_FLUSH_ENTRY_SHIFT_MASK 0xfff
#define HV_FLUSH_ENTRY_SHIFT_MAX 52
#define HV_FLUSH_ENTRY_PAGE_SHIFT 12
#define HV_FLUSH_LIST_MAX_ENTRIES 508

struct hv_input_flush_device_domain_list {
    struct hv_input_device_domain device_domain;
    uint32_t flags;
    uint32_t reserved;
    uint64_t list[];
};

#define HV_IOMMU_CAP_PRESENT 0x1
#define HV_IOMMU_CAP_S2 0x2
#define HV_IOMMU_CAP_S1 0x4
#define HV_IOMMU_CAP_S1_5LVL 0x8
#define HV_IOMMU_CAP_PASID 0x10
#define HV_IOMMU_CAP_ATS 0x20
#define HV_IOMMU_CAP_PRI 0x40

struct hv_input_get_iommu_capabilities {
    uint64_t partition_id;
    uint64_t reserved;
};

struct hv_output_get_iommu_capabilities {
    uint32_t size;
    uint16_t reserved;
    uint8_t max_iova_width;
    uint8_t max_pasid_width;
    uint64_t iommu_cap;
    uint64_t pgsize_bitmap;
};

#define HV_LOGICAL_DEVICE_PROPERTY_PVIOMMU 10
#define HV_DEVICE_IOMMU_ENABLED 0x1

struct hv_input_get_logical_device_property {
    uint64_t partition_id;
    uint64_t logical_device_id;
    uint32_t code;
    uint32_t reserved;
};

struct hv_output_get_logical_device_property {
    uint64_t device_iommu;
    uint64_t reserved;
};
