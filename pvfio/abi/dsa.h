/*
 * The Intel Data Streaming Accelerator: descriptors, completion records and registers (Intel DSA architecture
 * specification 1.2 chapters 8 and 9; the names are those of <linux/idxd.h> and of Linux's idxd driver).
 *
 * Bit fields are whole words plus masks and shifts. Not here: the In-memory Analytics Accelerator, which shares
 * the register layout, performance monitoring, and interrupt message storage.
 */

/* PCI */
#define DSA_PCI_VENDOR_ID 0x8086
#define DSA_PCI_DEVICE_ID 0x0b25
#define DSA_PCI_CLASS 0x088000
#define IDXD_MMIO_BAR 0
#define IDXD_WQ_BAR 2

/* Descriptor flags (bits 23:0 of flags_opcode) */
#define IDXD_OP_FLAG_FENCE 0x000001
#define IDXD_OP_FLAG_BOF 0x000002
#define IDXD_OP_FLAG_CRAV 0x000004
#define IDXD_OP_FLAG_RCR 0x000008
#define IDXD_OP_FLAG_RCI 0x000010
#define IDXD_OP_FLAG_CRSTS 0x000020
#define IDXD_OP_FLAG_CR 0x000080
#define IDXD_OP_FLAG_CC 0x000100
#define IDXD_OP_FLAG_ADDR1_TCS 0x000200
#define IDXD_OP_FLAG_ADDR2_TCS 0x000400
#define IDXD_OP_FLAG_ADDR3_TCS 0x000800
#define IDXD_OP_FLAG_CR_TCS 0x001000
#define IDXD_OP_FLAG_STORD 0x002000
#define IDXD_OP_FLAG_DRDBK 0x004000
#define IDXD_OP_FLAG_DSTS 0x008000

/* Operation-specific flags (bits 23:16) */
#define DSA_CRC_FLAG_READ_SEED 0x010000       /* the seed is read from seed_addr */
#define DSA_CRC_FLAG_BYPASS_INV_REF 0x020000  /* seed and result are neither inverted nor bit-reversed */
#define DSA_CRC_FLAG_BYPASS_DATA_REF 0x040000 /* the bits of each data byte are taken high to low */
#define DSA_TRANSL_FETCH_FLAG_STRIDE 0x010000 /* region_stride counts; else it is 4 KiB */
#define DSA_DRAIN_FLAG_READBACK1_VALID 0x010000
#define DSA_DRAIN_FLAG_READBACK2_VALID 0x020000
#define DSA_DRAIN_FLAG_SUPPRESS_TC_A 0x040000
#define DSA_DRAIN_FLAG_SUPPRESS_TC_B 0x080000

/* DIF flags: how the guard is computed, and of how many bytes */
#define DSA_DIF_FLAG_BLOCK_SIZE_MASK 0x03 /* 512, 520, 4096, 4104 */
#define DSA_DIF_FLAG_INVERT_CRC_SEED 0x04
#define DSA_DIF_FLAG_INVERT_CRC_RESULT 0x08
/* Source DIF flags: what is checked */
#define DSA_DIF_SRC_FLAG_ALL_F_ERR 0x01 /* with ALL_F: such a block is an error */
#define DSA_DIF_SRC_FLAG_ALL_F 0x02     /* a tuple of ones is not checked */
#define DSA_DIF_SRC_FLAG_APP_TAG_F 0x04
#define DSA_DIF_SRC_FLAG_APP_REF_TAG_F 0x08
#define DSA_DIF_SRC_FLAG_APP_TAG_INC 0x10
#define DSA_DIF_SRC_FLAG_GUARD_DISABLE 0x20
#define DSA_DIF_SRC_FLAG_REF_TAG_DISABLE 0x40
#define DSA_DIF_SRC_FLAG_REF_TAG_FIXED 0x80
/* Destination DIF flags: what is written; PASS: the source's */
#define DSA_DIF_DEST_FLAG_APP_TAG_PASS 0x08
#define DSA_DIF_DEST_FLAG_APP_TAG_INC 0x10
#define DSA_DIF_DEST_FLAG_GUARD_PASS 0x20
#define DSA_DIF_DEST_FLAG_REF_TAG_PASS 0x40
#define DSA_DIF_DEST_FLAG_REF_TAG_FIXED 0x80
/* DIF status: the record's result byte */
#define DSA_DIF_STATUS_GUARD 0x1
#define DSA_DIF_STATUS_APP_TAG 0x2
#define DSA_DIF_STATUS_REF_TAG 0x4
#define DSA_DIF_STATUS_ALL_F 0x8

/* Opcodes */
#define DSA_OPCODE_NOOP 0x00
#define DSA_OPCODE_BATCH 0x01
#define DSA_OPCODE_DRAIN 0x02
#define DSA_OPCODE_MEMMOVE 0x03
#define DSA_OPCODE_MEMFILL 0x04
#define DSA_OPCODE_COMPARE 0x05
#define DSA_OPCODE_COMPVAL 0x06
#define DSA_OPCODE_CR_DELTA 0x07
#define DSA_OPCODE_AP_DELTA 0x08
#define DSA_OPCODE_DUALCAST 0x09
#define DSA_OPCODE_TRANSL_FETCH 0x0a
#define DSA_OPCODE_CRCGEN 0x10
#define DSA_OPCODE_COPY_CRC 0x11
#define DSA_OPCODE_DIF_CHECK 0x12
#define DSA_OPCODE_DIF_INS 0x13
#define DSA_OPCODE_DIF_STRP 0x14
#define DSA_OPCODE_DIF_UPDT 0x15
#define DSA_OPCODE_DIX_GEN 0x17
#define DSA_OPCODE_CFLUSH 0x20

/* Completion status */
#define DSA_COMP_NONE 0x00
#define DSA_COMP_SUCCESS 0x01
#define DSA_COMP_SUCCESS_PRED 0x02
#define DSA_COMP_PAGE_FAULT_NOBOF 0x03
#define DSA_COMP_PAGE_FAULT_IR 0x04
#define DSA_COMP_BATCH_FAIL 0x05
#define DSA_COMP_BATCH_PAGE_FAULT 0x06
#define DSA_COMP_DR_OFFSET_NOINC 0x07
#define DSA_COMP_DR_OFFSET_ERANGE 0x08
#define DSA_COMP_DIF_ERR 0x09
#define DSA_COMP_BAD_OPCODE 0x10
#define DSA_COMP_INVALID_FLAGS 0x11
#define DSA_COMP_NOZERO_RESERVE 0x12
#define DSA_COMP_XFER_ERANGE 0x13
#define DSA_COMP_DESC_CNT_ERANGE 0x14
#define DSA_COMP_DR_ERANGE 0x15
#define DSA_COMP_OVERLAP_BUFFERS 0x16
#define DSA_COMP_DCAST_ERR 0x17
#define DSA_COMP_DESCLIST_ALIGN 0x18
#define DSA_COMP_INT_HANDLE_INVAL 0x19
#define DSA_COMP_CRA_XLAT 0x1a
#define DSA_COMP_CRA_ALIGN 0x1b
#define DSA_COMP_ADDR_ALIGN 0x1c
#define DSA_COMP_PRIV_BAD 0x1d
#define DSA_COMP_TRAFFIC_CLASS_CONF 0x1e
#define DSA_COMP_PFAULT_RDBA 0x1f
#define DSA_COMP_HW_ERR1 0x20
#define DSA_COMP_HW_ERR_DRB 0x21
#define DSA_COMP_TRANSLATION_FAIL 0x22
#define DSA_COMP_DRAIN_EVL 0x26
#define DSA_COMP_BATCH_EVL_ERR 0x27
#define DSA_COMP_STATUS_MASK 0x7f
#define DSA_COMP_STATUS_WRITE 0x80 /* the fault was on a write */

/* Descriptor word 0 and word 1 */
#define DSA_DESC_PASID_MASK 0x000fffff
#define DSA_DESC_RSVD_MASK 0x7ff00000
#define DSA_DESC_PRIV 0x80000000
#define DSA_DESC_FLAGS_MASK 0x00ffffff
#define DSA_DESC_OPCODE_SHIFT 24

/* Delta records: DSA_DELTA_SIZE bytes each, an offset in words of 8 bytes and the 8 bytes (unaligned). */
#define DSA_DELTA_SIZE 10
#define DSA_DELTA_WORD 8
#define DSA_DELTA_MAX_XFER 0x80000 /* what offsets of 16 bits reach */
#define DSA_DELTA_MIN_RECORD 80    /* of a delta record's maximum size: what the words of a cache line may need */

#define DSA_DESC_SIZE 64
#define DSA_COMPLETION_SIZE 32

struct dsa_hw_desc {
    uint32_t pasid_priv;   /* pasid 19:0, reserved 30:20, priv 31 */
    uint32_t flags_opcode; /* flags 23:0, opcode 31:24 */
    uint64_t completion_addr;
    union {
        uint64_t src_addr;
        uint64_t rdback_addr;
        uint64_t pattern;
        uint64_t desc_list_addr;
        uint64_t transl_fetch_addr;
    };
    union {
        uint64_t dst_addr;
        uint64_t rdback_addr2;
        uint64_t src2_addr;
        uint64_t comp_pattern;
    };
    union {
        uint32_t xfer_size;
        uint32_t desc_count;
        uint32_t region_size;
    };
    uint16_t int_handle;
    uint16_t rsvd1;
    union {
        uint8_t expected_res;
        struct {
            uint64_t delta_addr;
            uint32_t max_delta_size;
            uint32_t delt_rsvd;
            uint8_t expected_res_mask;
        };
        uint32_t delta_rec_size;
        uint64_t dest2;
        struct {
            uint64_t transl_fetch_res;
            uint32_t region_stride;
        };
        struct {
            uint32_t crc_seed;
            uint32_t crc_rsvd;
            uint64_t seed_addr;
        };
        struct {
            uint8_t src_dif_flags;
            uint8_t dif_chk_res;
            uint8_t dif_chk_flags;
            uint8_t dif_chk_res2[5];
            uint32_t chk_ref_tag_seed;
            uint16_t chk_app_tag_mask;
            uint16_t chk_app_tag_seed;
        };
        struct {
            uint8_t dif_ins_res;
            uint8_t dest_dif_flag;
            uint8_t dif_ins_flags;
            uint8_t dif_ins_res2[13];
            uint32_t ins_ref_tag_seed;
            uint16_t ins_app_tag_mask;
            uint16_t ins_app_tag_seed;
        };
        struct {
            uint8_t src_upd_flags;
            uint8_t upd_dest_flags;
            uint8_t dif_upd_flags;
            uint8_t dif_upd_res[5];
            uint32_t src_ref_tag_seed;
            uint16_t src_app_tag_mask;
            uint16_t src_app_tag_seed;
            uint32_t dest_ref_tag_seed;
            uint16_t dest_app_tag_mask;
            uint16_t dest_app_tag_seed;
        };
        uint8_t op_specific[24];
    };
};

struct dsa_completion_record {
    uint8_t status;
    union {
        uint8_t result;
        uint8_t dif_status;
    };
    uint16_t rsvd;
    union {
        uint32_t bytes_completed;
        uint32_t descs_completed;
    };
    uint64_t fault_addr;
    union {
        uint32_t invalid_flags; /* 23:0 */
        uint32_t delta_rec_size;
        uint64_t crc_val;
        struct {
            uint32_t dif_chk_ref_tag;
            uint16_t dif_chk_app_tag_mask;
            uint16_t dif_chk_app_tag;
        };
        struct {
            uint64_t dif_ins_res;
            uint32_t dif_ins_ref_tag;
            uint16_t dif_ins_app_tag_mask;
            uint16_t dif_ins_app_tag;
        };
        struct {
            uint32_t dif_upd_src_ref_tag;
            uint16_t dif_upd_src_app_tag_mask;
            uint16_t dif_upd_src_app_tag;
            uint32_t dif_upd_dest_ref_tag;
            uint16_t dif_upd_dest_app_tag_mask;
            uint16_t dif_upd_dest_app_tag;
        };
        uint8_t op_specific[16];
    };
};

/* Registers in BAR0 */
#define IDXD_VER_OFFSET 0x00
#define IDXD_GENCAP_OFFSET 0x10
#define IDXD_WQCAP_OFFSET 0x20
#define IDXD_GRPCAP_OFFSET 0x30
#define IDXD_ENGCAP_OFFSET 0x38
#define IDXD_OPCAP_OFFSET 0x40
#define IDXD_TABLE_OFFSET 0x60
#define IDXD_GENCFG_OFFSET 0x80
#define IDXD_GENCTRL_OFFSET 0x88
#define IDXD_GENSTATS_OFFSET 0x90
#define IDXD_INTCAUSE_OFFSET 0x98
#define IDXD_CMD_OFFSET 0xa0
#define IDXD_CMDSTS_OFFSET 0xa8
#define IDXD_CMDCAP_OFFSET 0xb0
#define IDXD_SWERR_OFFSET 0xc0
#define IDXD_EVLCFG_OFFSET 0xe0
#define IDXD_EVLSTATUS_OFFSET 0xf0

#define IDXD_VERSION_1 0x100
#define IDXD_VERSION_2 0x200

#define IDXD_GENCAP_BLOCK_ON_FAULT 0x1
#define IDXD_GENCAP_OVERLAP_COPY 0x2
#define IDXD_GENCAP_CACHE_CONTROL_MEM 0x4
#define IDXD_GENCAP_CACHE_CONTROL_CACHE 0x8
#define IDXD_GENCAP_CMD_CAP 0x10
#define IDXD_GENCAP_DEST_READBACK 0x100
#define IDXD_GENCAP_DRAIN_READBACK 0x200
#define IDXD_GENCAP_EVL_SUPPORT_SHIFT 13
#define IDXD_GENCAP_EVL_SUPPORT_MASK 0x6000
#define IDXD_GENCAP_BATCH_CONTINUATION 0x8000
#define IDXD_GENCAP_MAX_XFER_SHIFT_SHIFT 16
#define IDXD_GENCAP_MAX_XFER_SHIFT_MASK 0x1f0000
#define IDXD_GENCAP_MAX_BATCH_SHIFT_SHIFT 21
#define IDXD_GENCAP_MAX_BATCH_SHIFT_MASK 0x1e00000
#define IDXD_GENCAP_MAX_IMS_MULT_SHIFT 25
#define IDXD_GENCAP_MAX_IMS_MULT_MASK 0x7e000000
#define IDXD_GENCAP_CONFIG_EN 0x80000000

#define IDXD_WQCAP_TOTAL_WQ_SIZE_MASK 0xffff
#define IDXD_WQCAP_NUM_WQS_SHIFT 16
#define IDXD_WQCAP_NUM_WQS_MASK 0xff0000
#define IDXD_WQCAP_WQCFG_SIZE_SHIFT 24
#define IDXD_WQCAP_WQCFG_SIZE_MASK 0xf000000
#define IDXD_WQCAP_SHARED_MODE 0x1000000000000
#define IDXD_WQCAP_DEDICATED_MODE 0x2000000000000
#define IDXD_WQCAP_WQ_ATS_SUPPORT 0x4000000000000
#define IDXD_WQCAP_PRIORITY 0x8000000000000
#define IDXD_WQCAP_OCCUPANCY 0x10000000000000
#define IDXD_WQCAP_OCCUPANCY_INT 0x20000000000000
#define IDXD_WQCAP_OP_CONFIG 0x40000000000000
#define IDXD_WQCAP_WQ_PRS_SUPPORT 0x80000000000000

#define IDXD_GRPCAP_NUM_GROUPS_MASK 0xff
#define IDXD_GRPCAP_TOTAL_RDBUFS_SHIFT 8
#define IDXD_GRPCAP_TOTAL_RDBUFS_MASK 0xff00
#define IDXD_GRPCAP_RDBUF_CTRL 0x10000
#define IDXD_GRPCAP_RDBUF_LIMIT 0x20000
#define IDXD_GRPCAP_PROGRESS_LIMIT 0x40000

#define IDXD_ENGCAP_NUM_ENGINES_MASK 0xff

/* TABLE_OFFSET: five 16-bit fields in units of 256 bytes; 0: absent */
#define IDXD_TABLE_MULT 0x100
#define IDXD_TABLE_GRPCFG_SHIFT 0
#define IDXD_TABLE_WQCFG_SHIFT 16
#define IDXD_TABLE_MSIX_PERM_SHIFT 32
#define IDXD_TABLE_IMS_SHIFT 48
#define IDXD_TABLE_FIELD_MASK 0xffff

#define IDXD_GENCFG_RDBUF_LIMIT_MASK 0xff
#define IDXD_GENCFG_USER_INT_EN 0x1000
#define IDXD_GENCFG_EVL_EN 0x2000

#define IDXD_GENCTRL_SOFTERR_INT_EN 0x1
#define IDXD_GENCTRL_HALT_INT_EN 0x2
#define IDXD_GENCTRL_EVL_INT_EN 0x4

#define IDXD_GENSTATS_STATE_MASK 0x3
#define IDXD_GENSTATS_RESET_TYPE_SHIFT 2
#define IDXD_GENSTATS_RESET_TYPE_MASK 0xc
#define IDXD_DEVICE_STATE_DISABLED 0
#define IDXD_DEVICE_STATE_ENABLED 1
#define IDXD_DEVICE_STATE_DRAIN 2
#define IDXD_DEVICE_STATE_HALT 3
#define IDXD_DEVICE_RESET_SOFTWARE 0
#define IDXD_DEVICE_RESET_FLR 1
#define IDXD_DEVICE_RESET_WARM 2
#define IDXD_DEVICE_RESET_COLD 3

#define IDXD_INTC_ERR 0x01
#define IDXD_INTC_CMD 0x02
#define IDXD_INTC_OCCUPY 0x04
#define IDXD_INTC_PERFMON_OVFL 0x08
#define IDXD_INTC_HALT_STATE 0x10
#define IDXD_INTC_EVL 0x20
#define IDXD_INTC_INT_HANDLE_REVOKED 0x80000000

/* CMD */
#define IDXD_CMD_OPERAND_MASK 0xfffff
#define IDXD_CMD_SHIFT 20
#define IDXD_CMD_MASK 0x1f00000
#define IDXD_CMD_RSVD_MASK 0x7e000000
#define IDXD_CMD_INT_REQ 0x80000000
#define IDXD_CMD_ENABLE_DEVICE 1
#define IDXD_CMD_DISABLE_DEVICE 2
#define IDXD_CMD_DRAIN_ALL 3
#define IDXD_CMD_ABORT_ALL 4
#define IDXD_CMD_RESET_DEVICE 5
#define IDXD_CMD_ENABLE_WQ 6
#define IDXD_CMD_DISABLE_WQ 7
#define IDXD_CMD_DRAIN_WQ 8
#define IDXD_CMD_ABORT_WQ 9
#define IDXD_CMD_RESET_WQ 10
#define IDXD_CMD_DRAIN_PASID 11
#define IDXD_CMD_ABORT_PASID 12
#define IDXD_CMD_REQUEST_INT_HANDLE 13
#define IDXD_CMD_RELEASE_INT_HANDLE 14
#define CMD_INT_HANDLE_IMS 0x10000

/* CMDSTS */
#define IDXD_CMDSTS_ACTIVE 0x80000000
#define IDXD_CMDSTS_ERR_MASK 0xff
#define IDXD_CMDSTS_RES_SHIFT 8
#define IDXD_CMDSTS_RES_MASK 0xffff00
#define IDXD_CMDSTS_SUCCESS 0x00
#define IDXD_CMDSTS_INVAL_CMD 0x01
#define IDXD_CMDSTS_INVAL_WQIDX 0x02
#define IDXD_CMDSTS_HW_ERR 0x03
#define IDXD_CMDSTS_ERR_RSVD 0x04                   /* a reserved field of the command is not 0 */
#define IDXD_CMDSTS_ERR_DEV_ENABLED 0x10            /* ENABLE_DEVICE: not disabled */
#define IDXD_CMDSTS_ERR_CONFIG 0x11                 /* an error in the configuration, not one of the below */
#define IDXD_CMDSTS_ERR_BUSMASTER_EN 0x12           /* PCI bus master enable is 0 */
#define IDXD_CMDSTS_ERR_PASID_INVAL 0x13            /* page request allocation not supported */
#define IDXD_CMDSTS_ERR_WQ_SIZE_ERANGE 0x14         /* the WQ sizes are together more than WQCAP allows */
#define IDXD_CMDSTS_ERR_GRP_CONFIG 0x15             /* a group with WQs and no engine or the other way round, or none */
#define IDXD_CMDSTS_ERR_GRP_CONFIG2 0x16            /* a WQ in more than one group, or one with a size in none */
#define IDXD_CMDSTS_ERR_GRP_CONFIG3 0x17            /* an engine in more than one group */
#define IDXD_CMDSTS_ERR_GRP_CONFIG4 0x18            /* read buffers: more reserved than allowed or than there are */
#define IDXD_CMDSTS_ERR_DEV_NOTEN 0x20              /* ENABLE_WQ: the device is not enabled */
#define IDXD_CMDSTS_ERR_WQ_ENABLED 0x21             /* the WQ is not disabled */
#define IDXD_CMDSTS_ERR_WQ_SIZE 0x22                /* size 0 */
#define IDXD_CMDSTS_ERR_WQ_PRIOR 0x23               /* priority 0 */
#define IDXD_CMDSTS_ERR_WQ_MODE 0x24                /* mode not supported; or shared with threshold 0 or above the size */
#define IDXD_CMDSTS_ERR_BOF_EN 0x25                 /* block on fault not supported */
#define IDXD_CMDSTS_ERR_PASID_EN 0x26               /* WQ PASID enable does not fit the mode or PCI PASID enable */
#define IDXD_CMDSTS_ERR_MAX_BATCH_SIZE 0x27
#define IDXD_CMDSTS_ERR_MAX_XFER_SIZE 0x28
#define IDXD_CMDSTS_ERR_PRIV_EN 0x2a                /* WQ priv without PASID privileged mode */
#define IDXD_CMDSTS_ERR_OCCUPANCY_INT 0x2b          /* occupancy interrupt table or handle */
#define IDXD_CMDSTS_ERR_WQ_ATS 0x2c                 /* WQ ATS disable not supported */
#define IDXD_CMDSTS_ERR_DIS_DEV_EN 0x31             /* DISABLE_DEVICE, DRAIN_ALL ...: the device is not enabled */
#define IDXD_CMDSTS_ERR_DEV_NOT_EN 0x32             /* DISABLE_WQ, DRAIN_WQ ...: a WQ is not enabled */
#define IDXD_CMDSTS_ERR_INVAL_INT_IDX 0x41          /* REQUEST_INT_HANDLE: no such table entry */
#define IDXD_CMDSTS_ERR_NO_HANDLE 0x42              /* no handle left */
#define IDXD_CMDSTS_ERR_NO_HANDLE_AT_IDX 0x43       /* RELEASE_INT_HANDLE: not a handle in use */
#define IDXD_CMDSTS_ERR_NO_REVOKED_AT_IDX 0x44

/* SWERR, four 64-bit words */
#define IDXD_SWERR_VALID 0x1
#define IDXD_SWERR_OVERFLOW 0x2
#define IDXD_SWERR_ACK 0x3
#define IDXD_SWERR_DESC_VALID 0x4
#define IDXD_SWERR_WQ_IDX_VALID 0x8
#define IDXD_SWERR_BATCH 0x10
#define IDXD_SWERR_FAULT_RW 0x20 /* the fault was on a write */
#define IDXD_SWERR_PRIV 0x40
#define IDXD_SWERR_ERROR_SHIFT 8
#define IDXD_SWERR_WQ_IDX_SHIFT 16
#define IDXD_SWERR_OPERATION_SHIFT 32
#define IDXD_SWERR_PASID_SHIFT 40
#define IDXD_SWERR_BATCH_IDX_MASK 0xffff      /* word 1 */
#define IDXD_SWERR_INVALID_FLAGS_SHIFT 32     /* word 1 */

/*
 * Errors that only SWERR reports: a submission that never became a descriptor. Public drivers print the code and
 * give it no name; these values are this model's.
 */
#define DSA_SWERR_WQ_NOT_ENABLED 0x50 /* posted submission to a WQ that is not enabled */
#define DSA_SWERR_WQ_FULL 0x51        /* posted submission to a dedicated WQ that is full */
#define DSA_SWERR_WQ_MODE 0x52        /* posted submission to a shared WQ */

struct dsa_swerr {
    uint64_t status;
    uint64_t batch_flags; /* batch index 15:0, invalid flags 63:32 */
    uint64_t fault_addr;
    uint64_t rsvd5;
};

/* EVLCFG, EVLSTATUS */
#define IDXD_EVLCFG_PASID_EN 0x1
#define IDXD_EVLCFG_PRIV 0x2
#define IDXD_EVLCFG_BASE_MASK 0xfffffffffffff000
#define IDXD_EVLCFG_SIZE_MASK 0xffff
#define IDXD_EVLCFG_PASID_SHIFT 16
#define IDXD_EVL_SIZE_MIN 0x0040
#define IDXD_EVL_SIZE_MAX 0xffff
#define IDXD_EVLSTATUS_HEAD_MASK 0xffff
#define IDXD_EVLSTATUS_TAIL_SHIFT 32
#define IDXD_EVLSTATUS_INT_PENDING 0x4000000000000000

/* An entry of the event log: what happened (bits as in SWERR's words 0 and 1), then the completion record. */
#define DSA_EVL_ENTRY_SIZE 64
#define DSA_EVL_ERR_INFO_VALID 0x80
#define DSA_EVL_BATCH_ID_SHIFT 24
#define DSA_EVL_INVALID_FLAGS_MASK 0xffffff /* error_info of status 0x11 */
#define DSA_EVL_INT_HANDLE_MASK 0xffff      /* error_info of 0x19, 0x1a, 0x26, 0x27 */
#define DSA_EVL_RCI 0x10000                 /* the interrupt was asked for, and not sent */
#define DSA_EVL_IMS 0x20000
#define DSA_EVL_RCR 0x40000
#define DSA_EVL_FIRST_ERR_IN_BATCH 0x80000
#define DSA_EVL_OPERAND_ID_SHIFT 29

struct dsa_evl_entry {
    uint64_t status;
    uint16_t batch_idx;
    uint16_t rsvd3;
    uint32_t error_info;
    uint64_t fault_addr;
    uint64_t rsvd5;
    struct dsa_completion_record cr;
};

/* MSIX_PERM: 8 bytes a vector */
#define IDXD_MSIX_PERM_STRIDE 8
#define IDXD_MSIX_PERM_IGNORE 0x4
#define IDXD_MSIX_PERM_PASID_EN 0x8
#define IDXD_MSIX_PERM_PASID_SHIFT 12

/* GRPCFG */
#define IDXD_GRPCFG_SIZE 64
#define IDXD_GRPCFG_ENGINES_OFFSET 32
#define IDXD_GRPCFG_FLAGS_OFFSET 40
#define IDXD_GRPFLAGS_TC_A_MASK 0x7
#define IDXD_GRPFLAGS_TC_B_MASK 0x38
#define IDXD_GRPFLAGS_USE_RDBUF_LIMIT 0x80
#define IDXD_GRPFLAGS_RDBUFS_RESERVED_SHIFT 8
#define IDXD_GRPFLAGS_RDBUFS_ALLOWED_SHIFT 20
#define IDXD_GRPFLAGS_RDBUFS_MASK 0xff
#define IDXD_GRPFLAGS_DESC_PROGRESS_SHIFT 32
#define IDXD_GRPFLAGS_BATCH_PROGRESS_SHIFT 36
#define IDXD_GRPFLAGS_PROGRESS_MASK 0x3

struct dsa_grpcfg {
    uint64_t wqs[4];
    uint64_t engines;
    uint64_t flags;
    uint64_t rsvd[2];
};

/* WQCFG: 1 << (wqcfg_size + 5) bytes a WQ; op_config only where WQCAP has it */
#define IDXD_WQCFG_MIN 5
#define IDXD_WQCFG_MODE_DEDICATED 0x1
#define IDXD_WQCFG_BOF 0x2
#define IDXD_WQCFG_ATS_DISABLE 0x4
#define IDXD_WQCFG_PRS_DISABLE 0x8
#define IDXD_WQCFG_PRIORITY_SHIFT 4
#define IDXD_WQCFG_PRIORITY_MASK 0xf0
#define IDXD_WQCFG_PASID_SHIFT 8
#define IDXD_WQCFG_PASID_MASK 0xfffff00
#define IDXD_WQCFG_PASID_EN 0x10000000
#define IDXD_WQCFG_PRIV 0x20000000
#define IDXD_WQCFG_MAX_XFER_SHIFT_MASK 0x1f
#define IDXD_WQCFG_MAX_BATCH_SHIFT_SHIFT 5
#define IDXD_WQCFG_MAX_BATCH_SHIFT_MASK 0x1e0
#define IDXD_WQCFG_OCCUPANCY_TABLE_IMS 0x10000
#define IDXD_WQCFG_OCCUPANCY_INT_EN 0x10000
#define IDXD_WQCFG_OCCUPANCY_MASK 0xffff
#define IDXD_WQCFG_OCCUPANCY_INT 0x10000
#define IDXD_WQCFG_MODE_SUPPORT 0x20000000
#define IDXD_WQCFG_STATE_SHIFT 30
#define IDXD_WQ_STATE_DISABLED 0
#define IDXD_WQ_STATE_ENABLED 1
#define IDXD_WQ_STATE_BUSY 2

struct dsa_wqcfg {
    uint16_t wq_size;
    uint16_t rsvd;
    uint16_t wq_thresh;
    uint16_t rsvd1;
    uint32_t mode;            /* mode, bof, ats, priority, pasid, priv */
    uint32_t limits;          /* max_xfer_shift 4:0, max_batch_shift 8:5 */
    uint32_t occupancy_inth;  /* handle 15:0, table 16 */
    uint32_t occupancy_limit; /* limit 15:0, interrupt enable 16 */
    uint32_t state;           /* occupancy 15:0, interrupt 16, mode support 29, state 31:30; read-only */
    uint32_t rsvd8;
    uint64_t op_config[4];
};

/* Portals in BAR2: four pages a WQ */
#define IDXD_PORTAL_SIZE 0x1000
#define IDXD_PORTALS_PER_WQ 4
#define IDXD_WQ_PORTAL_STRIDE 0x4000
#define IDXD_PORTAL_UNLIMITED 0
#define IDXD_PORTAL_LIMITED 1
#define IDXD_PORTAL_IMS_UNLIMITED 2
#define IDXD_PORTAL_IMS_LIMITED 3
