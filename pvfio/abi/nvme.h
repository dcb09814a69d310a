/*
 * NVM Express: controller registers, queue entries, identify data, features, logs and status codes (NVM Express Base
 * Specification 2.0c, "Base" below, and NVM Command Set Specification 1.0c, "NVM"). The names are those of Linux's
 * <linux/nvme.h> and of nvme-cli where they have one.
 *
 * Bit fields are whole words plus masks and shifts. Not here: fabrics, zoned namespaces, key-value, virtualisation
 * management, reservations, directives, the controller memory buffer.
 */

/* PCI */
#define NVME_PCI_CLASS 0x010802
#define NVME_BAR 0

/* Controller registers, Base 3.1.3: offsets in BAR 0 */
#define NVME_REG_CAP 0x00
#define NVME_REG_VS 0x08
#define NVME_REG_INTMS 0x0c
#define NVME_REG_INTMC 0x10
#define NVME_REG_CC 0x14
#define NVME_REG_CSTS 0x1c
#define NVME_REG_NSSR 0x20
#define NVME_REG_AQA 0x24
#define NVME_REG_ASQ 0x28
#define NVME_REG_ACQ 0x30
#define NVME_REG_CMBLOC 0x38
#define NVME_REG_CMBSZ 0x3c
#define NVME_REG_BPINFO 0x40
#define NVME_REG_CRTO 0x68
#define NVME_REG_DBS 0x1000 /* doorbells; queue y: SQ at (2y) << (2 + DSTRD), CQ after it */

/* CAP, Base 3.1.3.1 */
#define NVME_CAP_MQES_MASK 0xffff /* zero-based */
#define NVME_CAP_CQR 0x10000
#define NVME_CAP_AMS_SHIFT 17
#define NVME_CAP_AMS_WRR 0x1
#define NVME_CAP_TO_SHIFT 24 /* 500 ms units */
#define NVME_CAP_DSTRD_SHIFT 32
#define NVME_CAP_NSSRS_SHIFT 36
#define NVME_CAP_CSS_SHIFT 37
#define NVME_CAP_CSS_NVM 0x01
#define NVME_CAP_CSS_IO 0x40
#define NVME_CAP_CSS_ADMIN 0x80
#define NVME_CAP_MPSMIN_SHIFT 48
#define NVME_CAP_MPSMAX_SHIFT 52
#define NVME_CAP_CRMS_SHIFT 59

/* VS, Base 3.1.3.2 */
#define NVME_VS_1_4 0x00010400
#define NVME_VS_2_0 0x00020000

/* CC, Base 3.1.3.5 */
#define NVME_CC_ENABLE 0x00000001
#define NVME_CC_CSS_SHIFT 4
#define NVME_CC_CSS_MASK 0x00000070
#define NVME_CC_CSS_NVM 0
#define NVME_CC_CSS_IO 6
#define NVME_CC_CSS_ADMIN 7
#define NVME_CC_MPS_SHIFT 7
#define NVME_CC_MPS_MASK 0x00000780
#define NVME_CC_AMS_SHIFT 11
#define NVME_CC_AMS_MASK 0x00003800
#define NVME_CC_AMS_RR 0
#define NVME_CC_AMS_WRRU 1
#define NVME_CC_AMS_VS 7
#define NVME_CC_SHN_MASK 0x0000c000
#define NVME_CC_SHN_NONE 0x00000000
#define NVME_CC_SHN_NORMAL 0x00004000
#define NVME_CC_SHN_ABRUPT 0x00008000
#define NVME_CC_IOSQES_SHIFT 16
#define NVME_CC_IOSQES_MASK 0x000f0000
#define NVME_CC_IOCQES_SHIFT 20
#define NVME_CC_IOCQES_MASK 0x00f00000
#define NVME_CC_CRIME 0x01000000

/* CSTS, Base 3.1.3.6 */
#define NVME_CSTS_RDY 0x01
#define NVME_CSTS_CFS 0x02
#define NVME_CSTS_SHST_MASK 0x0c
#define NVME_CSTS_SHST_NORMAL 0x00
#define NVME_CSTS_SHST_OCCUR 0x04
#define NVME_CSTS_SHST_CMPLT 0x08
#define NVME_CSTS_NSSRO 0x10
#define NVME_CSTS_PP 0x20

#define NVME_NSSR_RESET 0x4e564d65 /* "NVMe", Base 3.1.3.7 */

/* AQA, Base 3.1.3.8: both zero-based */
#define NVME_AQA_ASQS_MASK 0x00000fff
#define NVME_AQA_ACQS_SHIFT 16
#define NVME_AQA_ACQS_MASK 0x0fff0000
#define NVME_AQA_MAX 4096

/* Submission queue entry, Base 3.3.3.1 */
#define NVME_CMD_FUSE_MASK 0x03
#define NVME_CMD_FUSE_FIRST 0x01
#define NVME_CMD_FUSE_SECOND 0x02
#define NVME_CMD_PSDT_MASK 0xc0
#define NVME_CMD_PRP 0x00
#define NVME_CMD_SGL_METABUF 0x40 /* the metadata pointer is a contiguous buffer */
#define NVME_CMD_SGL_METASEG 0x80 /* the metadata pointer is an SGL segment */

struct nvme_command {
    uint8_t opcode;
    uint8_t flags;
    uint16_t cid;
    uint32_t nsid;
    uint32_t cdw2;
    uint32_t cdw3;
    uint64_t metadata;
    uint64_t prp1; /* with an SGL: the descriptor's address */
    uint64_t prp2; /* with an SGL: length in bits 31:0, type and subtype in bits 63:56 */
    uint32_t cdw10;
    uint32_t cdw11;
    uint32_t cdw12;
    uint32_t cdw13;
    uint32_t cdw14;
    uint32_t cdw15;
};
#define NVME_SQE_SIZE 64

/* Completion queue entry, Base 3.3.3.2 */
struct nvme_completion {
    uint32_t result;   /* command specific */
    uint32_t result_hi;
    uint16_t sq_head;
    uint16_t sq_id;
    uint16_t cid;
    uint16_t status; /* bit 0 the phase tag, then SC, SCT, CRD, M, DNR */
};
#define NVME_CQE_SIZE 16
#define NVME_CQE_PHASE 0x0001
#define NVME_CQE_STATUS_SHIFT 1

/* Scatter gather lists, Base 4.1.2 */
struct nvme_sgl_desc {
    uint64_t addr;
    uint32_t length;
    uint8_t reserved[3];
    uint8_t type; /* type 7:4, subtype 3:0 */
};
#define NVME_SGL_TYPE_SHIFT 4
#define NVME_SGL_DATA_BLOCK 0x0
#define NVME_SGL_BIT_BUCKET 0x1
#define NVME_SGL_SEGMENT 0x2
#define NVME_SGL_LAST_SEGMENT 0x3
#define NVME_SGL_SUBTYPE_ADDRESS 0x0

/* Admin opcodes, Base figure 138 */
#define NVME_ADMIN_DELETE_SQ 0x00
#define NVME_ADMIN_CREATE_SQ 0x01
#define NVME_ADMIN_GET_LOG_PAGE 0x02
#define NVME_ADMIN_DELETE_CQ 0x04
#define NVME_ADMIN_CREATE_CQ 0x05
#define NVME_ADMIN_IDENTIFY 0x06
#define NVME_ADMIN_ABORT 0x08
#define NVME_ADMIN_SET_FEATURES 0x09
#define NVME_ADMIN_GET_FEATURES 0x0a
#define NVME_ADMIN_ASYNC_EVENT 0x0c
#define NVME_ADMIN_NS_MGMT 0x0d
#define NVME_ADMIN_FW_COMMIT 0x10
#define NVME_ADMIN_FW_DOWNLOAD 0x11
#define NVME_ADMIN_SELF_TEST 0x14
#define NVME_ADMIN_NS_ATTACH 0x15
#define NVME_ADMIN_KEEP_ALIVE 0x18
#define NVME_ADMIN_DBBUF 0x7c
#define NVME_ADMIN_FORMAT_NVM 0x80
#define NVME_ADMIN_SANITIZE 0x84

/* NVM command set opcodes, NVM figure 2 */
#define NVME_CMD_FLUSH 0x00
#define NVME_CMD_WRITE 0x01
#define NVME_CMD_READ 0x02
#define NVME_CMD_WRITE_UNCOR 0x04
#define NVME_CMD_COMPARE 0x05
#define NVME_CMD_WRITE_ZEROES 0x08
#define NVME_CMD_DSM 0x09
#define NVME_CMD_VERIFY 0x0c
#define NVME_CMD_COPY 0x19

/* Read and write, NVM 3.2.4 and 3.2.6: CDW12 */
#define NVME_RW_NLB_MASK 0x0000ffff /* zero-based */
#define NVME_RW_DEAC 0x02000000     /* write zeroes: deallocate */
#define NVME_RW_STC 0x01000000
#define NVME_RW_PRINFO_SHIFT 26
#define NVME_RW_PRINFO_MASK 0x3c000000
#define NVME_RW_PRCHK_REF 0x04000000
#define NVME_RW_PRCHK_APP 0x08000000
#define NVME_RW_PRCHK_GUARD 0x10000000
#define NVME_RW_PRACT 0x20000000
#define NVME_RW_FUA 0x40000000
#define NVME_RW_LR 0x80000000

/* Dataset management, NVM 3.2.3 */
#define NVME_DSM_AD 0x4 /* CDW11: deallocate */
#define NVME_DSM_IDW 0x2
#define NVME_DSM_IDR 0x1
#define NVME_DSM_MAX_RANGES 256

struct nvme_dsm_range {
    uint32_t cattr;
    uint32_t nlb;
    uint64_t slba;
};

/* Copy, NVM 3.2.2: source range entries, format 0 */
struct nvme_copy_range {
    uint64_t reserved0;
    uint64_t slba;
    uint16_t nlb; /* zero-based */
    uint8_t reserved18[6];
    uint32_t eilbrt;
    uint16_t elbat;
    uint16_t elbatm;
};
#define NVME_COPY_NR_MASK 0xff /* CDW12: zero-based */
#define NVME_COPY_DESFMT_SHIFT 8

/* Protection information, NVM 5.2: 16-bit guard */
struct nvme_pi_tuple {
    uint16_t guard; /* big endian, as both tags */
    uint16_t app_tag;
    uint32_t ref_tag;
};

/* Identify, Base 5.17: CNS */
#define NVME_ID_CNS_NS 0x00
#define NVME_ID_CNS_CTRL 0x01
#define NVME_ID_CNS_NS_ACTIVE_LIST 0x02
#define NVME_ID_CNS_NS_DESC_LIST 0x03
#define NVME_ID_CNS_NVMSET_LIST 0x04
#define NVME_ID_CNS_CS_NS 0x05
#define NVME_ID_CNS_CS_CTRL 0x06
#define NVME_ID_CNS_CS_NS_ACTIVE_LIST 0x07
#define NVME_ID_CNS_CS_INDEP_NS 0x08
#define NVME_ID_CNS_NS_PRESENT_LIST 0x10
#define NVME_ID_CNS_NS_PRESENT 0x11
#define NVME_ID_CNS_CTRL_NS_LIST 0x12
#define NVME_ID_CNS_CTRL_LIST 0x13
#define NVME_ID_CNS_PRIMARY_CTRL_CAP 0x14
#define NVME_ID_CNS_SECONDARY_CTRL_LIST 0x15
#define NVME_ID_CNS_CS_NS_PRESENT_LIST 0x1a
#define NVME_ID_CNS_CS_NS_PRESENT 0x1b
#define NVME_ID_CNS_CS_LIST 0x1c
#define NVME_CSI_NVM 0x00
#define NVME_CSI_KV 0x01
#define NVME_CSI_ZNS 0x02
#define NVME_IDENTIFY_SIZE 4096

/* Power state descriptor, Base figure 276 */
struct nvme_id_power_state {
    uint16_t max_power; /* centiwatts */
    uint8_t reserved2;
    uint8_t flags;
    uint32_t entry_lat; /* microseconds */
    uint32_t exit_lat;
    uint8_t read_tput;
    uint8_t read_lat;
    uint8_t write_tput;
    uint8_t write_lat;
    uint16_t idle_power;
    uint8_t idle_scale;
    uint8_t reserved19;
    uint16_t active_power;
    uint8_t active_work_scale;
    uint8_t reserved23[9];
};

/* Identify Controller, Base figure 275 */
struct nvme_id_ctrl {
    uint16_t vid;
    uint16_t ssvid;
    uint8_t sn[20];
    uint8_t mn[40];
    uint8_t fr[8];
    uint8_t rab;
    uint8_t ieee[3];
    uint8_t cmic;
    uint8_t mdts;
    uint16_t cntlid;
    uint32_t ver;
    uint32_t rtd3r; /* microseconds */
    uint32_t rtd3e;
    uint32_t oaes;
    uint32_t ctratt;
    uint16_t rrls;
    uint8_t reserved102[9];
    uint8_t cntrltype;
    uint8_t fguid[16];
    uint16_t crdt1;
    uint16_t crdt2;
    uint16_t crdt3;
    uint8_t reserved134[119];
    uint8_t nvmsr;
    uint8_t vwci;
    uint8_t mec;
    uint16_t oacs;
    uint8_t acl;
    uint8_t aerl;
    uint8_t frmw;
    uint8_t lpa;
    uint8_t elpe;
    uint8_t npss;
    uint8_t avscc;
    uint8_t apsta;
    uint16_t wctemp; /* kelvins */
    uint16_t cctemp;
    uint16_t mtfa;
    uint32_t hmpre;
    uint32_t hmmin;
    uint8_t tnvmcap[16];
    uint8_t unvmcap[16];
    uint32_t rpmbs;
    uint16_t edstt; /* minutes */
    uint8_t dsto;
    uint8_t fwug;
    uint16_t kas; /* 100 ms */
    uint16_t hctma;
    uint16_t mntmt;
    uint16_t mxtmt;
    uint32_t sanicap;
    uint32_t hmminds;
    uint16_t hmmaxd;
    uint16_t nsetidmax;
    uint16_t endgidmax;
    uint8_t anatt;
    uint8_t anacap;
    uint32_t anagrpmax;
    uint32_t nanagrpid;
    uint32_t pels;
    uint16_t domainid;
    uint8_t reserved358[10];
    uint8_t megcap[16];
    uint8_t reserved384[128];
    uint8_t sqes;
    uint8_t cqes;
    uint16_t maxcmd;
    uint32_t nn;
    uint16_t oncs;
    uint16_t fuses;
    uint8_t fna;
    uint8_t vwc;
    uint16_t awun; /* zero-based blocks */
    uint16_t awupf;
    uint8_t icsvscc;
    uint8_t nwpc;
    uint16_t acwu;
    uint16_t ocfs;
    uint32_t sgls;
    uint32_t mnan;
    uint8_t maxdna[16];
    uint32_t maxcna;
    uint8_t reserved564[204];
    uint8_t subnqn[256];
    uint8_t reserved1024[768];
    uint32_t ioccsz;
    uint32_t iorcsz;
    uint16_t icdoff;
    uint8_t fcatt;
    uint8_t msdbd;
    uint16_t ofcs;
    uint8_t reserved1806[242];
    struct nvme_id_power_state psd[32];
    uint8_t vs[1024];
};

#define NVME_CMIC_MULTI_PORT 0x01
#define NVME_OAES_NS_ATTR 0x00000100
#define NVME_OAES_FW_ACT 0x00000200
#define NVME_CTRATT_128_ID 0x00000001
#define NVME_CNTRLTYPE_IO 1
#define NVME_OACS_FORMAT 0x0002
#define NVME_OACS_FW 0x0004
#define NVME_OACS_NS_MGMT 0x0008
#define NVME_OACS_SELF_TEST 0x0010
#define NVME_OACS_DBBUF 0x0100
#define NVME_FRMW_SLOT1_RO 0x01
#define NVME_FRMW_SLOTS_SHIFT 1
#define NVME_FRMW_NO_RESET 0x10
#define NVME_LPA_SMART_PER_NS 0x01
#define NVME_LPA_EFFECTS 0x02
#define NVME_LPA_EXTENDED 0x04
#define NVME_LPA_SUPPORTED_PAGES 0x20
#define NVME_SANICAP_CRYPTO 0x00000001
#define NVME_SANICAP_BLOCK 0x00000002
#define NVME_SANICAP_OVERWRITE 0x00000004
#define NVME_SANICAP_NODMMAS 0x40000000 /* media is not modified after the sanitize */
#define NVME_ONCS_COMPARE 0x0001
#define NVME_ONCS_WRITE_UNCOR 0x0002
#define NVME_ONCS_DSM 0x0004
#define NVME_ONCS_WRITE_ZEROES 0x0008
#define NVME_ONCS_SAVE_SELECT 0x0010
#define NVME_ONCS_RESERVATIONS 0x0020
#define NVME_ONCS_TIMESTAMP 0x0040
#define NVME_ONCS_VERIFY 0x0080
#define NVME_ONCS_COPY 0x0100
#define NVME_FUSES_COMPARE_WRITE 0x0001
#define NVME_FNA_FORMAT_ALL 0x01
#define NVME_FNA_CRYPTO 0x04
#define NVME_VWC_PRESENT 0x01
#define NVME_VWC_FLUSH_NO_BROADCAST 0x04
#define NVME_VWC_FLUSH_BROADCAST 0x06
#define NVME_SGLS_SUPPORTED 0x00000001
#define NVME_SGLS_BIT_BUCKET 0x00010000
#define NVME_SGLS_LARGER 0x00040000 /* a list may be longer than the data */
#define NVME_NWPC_PROTECT 0x01
#define NVME_NWPC_UNTIL_POWER_CYCLE 0x02
#define NVME_NWPC_PERMANENT 0x04
#define NVME_OCFS_FORMAT_0 0x0001

/* LBA format, NVM figure 98 */
struct nvme_lbaf {
    uint16_t ms; /* metadata bytes a block */
    uint8_t ds;  /* block size as a power of two */
    uint8_t rp;
};

/* Identify Namespace, NVM figure 97 */
struct nvme_id_ns {
    uint64_t nsze;
    uint64_t ncap;
    uint64_t nuse;
    uint8_t nsfeat;
    uint8_t nlbaf; /* zero-based */
    uint8_t flbas;
    uint8_t mc;
    uint8_t dpc;
    uint8_t dps;
    uint8_t nmic;
    uint8_t rescap;
    uint8_t fpi;
    uint8_t dlfeat;
    uint16_t nawun;
    uint16_t nawupf;
    uint16_t nacwu;
    uint16_t nabsn;
    uint16_t nabo;
    uint16_t nabspf;
    uint16_t noiob;
    uint8_t nvmcap[16];
    uint16_t npwg;
    uint16_t npwa;
    uint16_t npdg;
    uint16_t npda;
    uint16_t nows;
    uint16_t mssrl;
    uint32_t mcl;
    uint8_t msrc;
    uint8_t reserved81[11];
    uint32_t anagrpid;
    uint8_t reserved96[3];
    uint8_t nsattr;
    uint16_t nvmsetid;
    uint16_t endgid;
    uint8_t nguid[16];
    uint8_t eui64[8];
    struct nvme_lbaf lbaf[64];
    uint8_t vs[3712];
};

#define NVME_NSFEAT_THIN 0x01
#define NVME_NSFEAT_DEAC_ERR 0x04
#define NVME_NSFEAT_UID_REUSE 0x08
#define NVME_NSFEAT_OPTPERF 0x10
#define NVME_FLBAS_INDEX_MASK 0x0f
#define NVME_FLBAS_EXTENDED 0x10 /* metadata at the end of each block */
#define NVME_MC_EXTENDED 0x01
#define NVME_MC_SEPARATE 0x02
#define NVME_DPC_TYPE1 0x01
#define NVME_DPC_FIRST 0x08
#define NVME_DPC_LAST 0x10
#define NVME_DPS_TYPE_MASK 0x07
#define NVME_DPS_FIRST 0x08
#define NVME_FPI_SUPPORTED 0x80 /* bits 6:0: percent of a format that remain */
#define NVME_DLFEAT_READS_ZERO 0x01
#define NVME_DLFEAT_WZ_DEAC 0x08
#define NVME_NMIC_SHARED 0x01
#define NVME_NSATTR_WRITE_PROTECTED 0x01

/* Namespace identification descriptor, Base figure 277 */
struct nvme_ns_id_desc {
    uint8_t nidt;
    uint8_t nidl;
    uint16_t reserved;
};
#define NVME_NIDT_EUI64 1
#define NVME_NIDT_NGUID 2
#define NVME_NIDT_UUID 3
#define NVME_NIDT_CSI 4

/* Identify controller for the NVM command set, NVM figure 101 */
struct nvme_id_ctrl_nvm {
    uint8_t vsl;
    uint8_t wzsl;
    uint8_t wusl;
    uint8_t dmrl;
    uint32_t dmrsl;
    uint64_t dmsl;
    uint8_t reserved16[4080];
};

/* Identify namespace, I/O command set independent, Base figure 280 */
struct nvme_id_ns_indep {
    uint8_t nsfeat;
    uint8_t nmic;
    uint8_t rescap;
    uint8_t fpi;
    uint32_t anagrpid;
    uint8_t nsattr;
    uint8_t reserved9;
    uint16_t nvmsetid;
    uint16_t endgid;
    uint8_t nstat;
    uint8_t reserved15[4081];
};
#define NVME_NSTAT_NRDY 0x01

/* Features, Base 5.27.1 and NVM 4.1.3 */
#define NVME_FEAT_ARBITRATION 0x01
#define NVME_FEAT_POWER_MGMT 0x02
#define NVME_FEAT_LBA_RANGE 0x03
#define NVME_FEAT_TEMP_THRESH 0x04
#define NVME_FEAT_ERR_RECOVERY 0x05
#define NVME_FEAT_VOLATILE_WC 0x06
#define NVME_FEAT_NUM_QUEUES 0x07
#define NVME_FEAT_IRQ_COALESCE 0x08
#define NVME_FEAT_IRQ_CONFIG 0x09
#define NVME_FEAT_WRITE_ATOMIC 0x0a
#define NVME_FEAT_ASYNC_EVENT 0x0b
#define NVME_FEAT_AUTO_PST 0x0c
#define NVME_FEAT_TIMESTAMP 0x0e
#define NVME_FEAT_KATO 0x0f
#define NVME_FEAT_HOST_BEHAVIOR 0x16
#define NVME_FEAT_SANITIZE 0x17
#define NVME_FEAT_IOCS_PROFILE 0x19
#define NVME_FEAT_SW_PROGRESS 0x80
#define NVME_FEAT_HOST_ID 0x81
#define NVME_FEAT_WRITE_PROTECT 0x84
#define NVME_FEAT_SEL_SHIFT 8
#define NVME_FEAT_SEL_CURRENT 0
#define NVME_FEAT_SEL_DEFAULT 1
#define NVME_FEAT_SEL_SAVED 2
#define NVME_FEAT_SEL_SUPPORTED 3
#define NVME_FEAT_SAVE 0x80000000
#define NVME_FEAT_CAP_SAVEABLE 0x1
#define NVME_FEAT_CAP_PER_NS 0x2
#define NVME_FEAT_CAP_CHANGEABLE 0x4

/* Queue management, Base 5.4 and 5.5: CDW11 */
#define NVME_QUEUE_PHYS_CONTIG 0x1
#define NVME_CQ_IRQ_ENABLED 0x2
#define NVME_CQ_IV_SHIFT 16
#define NVME_SQ_QPRIO_SHIFT 1
#define NVME_SQ_QPRIO_MASK 0x6
#define NVME_SQ_QPRIO_URGENT 0
#define NVME_SQ_QPRIO_HIGH 1
#define NVME_SQ_QPRIO_MEDIUM 2
#define NVME_SQ_QPRIO_LOW 3
#define NVME_SQ_CQID_SHIFT 16

/* Log pages, Base 5.16.1 */
#define NVME_LOG_SUPPORTED 0x00
#define NVME_LOG_ERROR 0x01
#define NVME_LOG_SMART 0x02
#define NVME_LOG_FW_SLOT 0x03
#define NVME_LOG_CHANGED_NS 0x04
#define NVME_LOG_CMD_EFFECTS 0x05
#define NVME_LOG_SELF_TEST 0x06
#define NVME_LOG_FEATURE_EFFECTS 0x12
#define NVME_LOG_MI_EFFECTS 0x13
#define NVME_LOG_SANITIZE 0x81
#define NVME_LOG_RAE 0x8000 /* CDW10: retain asynchronous event */

struct nvme_error_log_entry {
    uint64_t error_count;
    uint16_t sqid;
    uint16_t cmdid;
    uint16_t status_field; /* with the phase tag in bit 0 */
    uint16_t parm_error_location;
    uint64_t lba;
    uint32_t nsid;
    uint8_t vs;
    uint8_t trtype;
    uint8_t reserved30[2];
    uint64_t cs;
    uint16_t trtype_spec_info;
    uint8_t reserved42[22];
};
#define NVME_ERROR_LOCATION_NONE 0xffff

struct nvme_smart_log {
    uint8_t critical_warning;
    uint16_t temperature; /* kelvins */
    uint8_t avail_spare;
    uint8_t spare_thresh;
    uint8_t percent_used;
    uint8_t endu_grp_crit_warn_sumry;
    uint8_t reserved7[25];
    uint8_t data_units_read[16]; /* thousands of 512 bytes */
    uint8_t data_units_written[16];
    uint8_t host_reads[16];
    uint8_t host_writes[16];
    uint8_t ctrl_busy_time[16]; /* minutes */
    uint8_t power_cycles[16];
    uint8_t power_on_hours[16];
    uint8_t unsafe_shutdowns[16];
    uint8_t media_errors[16];
    uint8_t num_err_log_entries[16];
    uint32_t warning_temp_time;
    uint32_t critical_comp_time;
    uint16_t temp_sensor[8];
    uint32_t thm_temp1_trans_count;
    uint32_t thm_temp2_trans_count;
    uint32_t thm_temp1_total_time;
    uint32_t thm_temp2_total_time;
    uint8_t reserved232[280];
};
#define NVME_SMART_SPARE 0x01
#define NVME_SMART_TEMPERATURE 0x02
#define NVME_SMART_DEGRADED 0x04
#define NVME_SMART_READ_ONLY 0x08
#define NVME_SMART_VOLATILE_MEMORY 0x10
#define NVME_DATA_UNIT 512000

struct nvme_fw_slot_log {
    uint8_t afi; /* active slot 2:0, slot at the next reset 6:4 */
    uint8_t reserved1[7];
    uint8_t frs[56]; /* seven revisions of 8 characters */
    uint8_t reserved64[448];
};

#define NVME_CMD_EFFECTS_CSUPP 0x00000001
#define NVME_CMD_EFFECTS_LBCC 0x00000002
#define NVME_CMD_EFFECTS_NCC 0x00000004
#define NVME_CMD_EFFECTS_NIC 0x00000008
#define NVME_CMD_EFFECTS_CCC 0x00000010
#define NVME_CMD_EFFECTS_CSE_SHIFT 16

struct nvme_effects_log {
    uint32_t acs[256];
    uint32_t iocs[256];
    uint8_t reserved2048[2048];
};

struct nvme_self_test_result {
    uint8_t dsts; /* result 3:0, code 7:4 */
    uint8_t seg;
    uint8_t vdi;
    uint8_t reserved3;
    uint64_t poh;
    uint32_t nsid;
    uint64_t flba;
    uint8_t sct;
    uint8_t sc;
    uint8_t vs[2];
};

struct nvme_self_test_log {
    uint8_t current_operation;
    uint8_t completion; /* percent */
    uint8_t reserved2[2];
    struct nvme_self_test_result result[20];
};
#define NVME_SELF_TEST_NONE 0x0
#define NVME_SELF_TEST_SHORT 0x1
#define NVME_SELF_TEST_EXTENDED 0x2
#define NVME_SELF_TEST_VENDOR 0xe
#define NVME_SELF_TEST_ABORT 0xf
#define NVME_SELF_TEST_RESULT_OK 0x0
#define NVME_SELF_TEST_RESULT_ABORTED 0x1
#define NVME_SELF_TEST_RESULT_RESET 0x2
#define NVME_SELF_TEST_RESULT_NS_GONE 0x3
#define NVME_SELF_TEST_RESULT_FORMAT 0x4
#define NVME_SELF_TEST_RESULT_SANITIZE 0x9
#define NVME_SELF_TEST_RESULT_UNUSED 0xf

struct nvme_sanitize_log {
    uint16_t sprog; /* of 65536 */
    uint16_t sstat;
    uint32_t scdw10;
    uint32_t eto;
    uint32_t etbe;
    uint32_t etce;
    uint32_t etond;
    uint32_t etbend;
    uint32_t etcend;
    uint8_t reserved32[480];
};
#define NVME_SANITIZE_EXIT_FAILURE 0x1 /* CDW10: SANACT */
#define NVME_SANITIZE_BLOCK 0x2
#define NVME_SANITIZE_OVERWRITE 0x3
#define NVME_SANITIZE_CRYPTO 0x4
#define NVME_SSTAT_NEVER 0x0
#define NVME_SSTAT_OK 0x1
#define NVME_SSTAT_PROGRESS 0x2
#define NVME_SSTAT_FAILED 0x3
#define NVME_SSTAT_GLOBAL_ERASED 0x100

/* Asynchronous events, Base 5.2: result 2:0 type, 15:8 information, 23:16 log page */
#define NVME_AER_ERROR 0x0
#define NVME_AER_SMART 0x1
#define NVME_AER_NOTICE 0x2
#define NVME_AER_IO 0x6
#define NVME_AER_ERROR_INVALID_DB_REG 0x00
#define NVME_AER_ERROR_INVALID_DB_VALUE 0x01
#define NVME_AER_ERROR_DIAG_FAILURE 0x02
#define NVME_AER_ERROR_PERSISTENT 0x03
#define NVME_AER_ERROR_TRANSIENT 0x04
#define NVME_AER_SMART_RELIABILITY 0x00
#define NVME_AER_SMART_TEMPERATURE 0x01
#define NVME_AER_SMART_SPARE 0x02
#define NVME_AER_NOTICE_NS_CHANGED 0x00
#define NVME_AER_NOTICE_FW_ACT_STARTING 0x01
#define NVME_AER_IO_SANITIZE_COMPLETED 0x01
#define NVME_AER_INFO_SHIFT 8
#define NVME_AER_LOG_SHIFT 16

/* Namespace management and attachment, Base 5.23 and 5.22 */
#define NVME_NS_MGMT_CREATE 0
#define NVME_NS_MGMT_DELETE 1
#define NVME_NS_ATTACH_ATTACH 0
#define NVME_NS_ATTACH_DETACH 1

/* Format NVM, Base 5.14: CDW10 */
#define NVME_FORMAT_LBAF_MASK 0x0f
#define NVME_FORMAT_MSET 0x10
#define NVME_FORMAT_PI_SHIFT 5
#define NVME_FORMAT_PIL 0x100
#define NVME_FORMAT_SES_SHIFT 9

/* Firmware commit, Base 5.12: CDW10 */
#define NVME_FW_COMMIT_SLOT_MASK 0x7
#define NVME_FW_COMMIT_ACTION_SHIFT 3
#define NVME_FW_COMMIT_REPLACE 0
#define NVME_FW_COMMIT_REPLACE_ACTIVATE 1
#define NVME_FW_COMMIT_ACTIVATE 2
#define NVME_FW_COMMIT_ACTIVATE_NOW 3

/* Status: SCT in bits 10:8, SC in bits 7:0 (Base 3.3.3.2.1); as they stand in a completion after the phase tag */
#define NVME_SC_SUCCESS 0x000
#define NVME_SC_INVALID_OPCODE 0x001
#define NVME_SC_INVALID_FIELD 0x002
#define NVME_SC_CMDID_CONFLICT 0x003
#define NVME_SC_DATA_XFER_ERROR 0x004
#define NVME_SC_POWER_LOSS 0x005
#define NVME_SC_INTERNAL 0x006
#define NVME_SC_ABORT_REQ 0x007
#define NVME_SC_ABORT_QUEUE 0x008
#define NVME_SC_FUSED_FAIL 0x009
#define NVME_SC_FUSED_MISSING 0x00a
#define NVME_SC_INVALID_NS 0x00b
#define NVME_SC_CMD_SEQ_ERROR 0x00c
#define NVME_SC_SGL_INVALID_LAST 0x00d
#define NVME_SC_SGL_INVALID_COUNT 0x00e
#define NVME_SC_SGL_INVALID_DATA 0x00f
#define NVME_SC_SGL_INVALID_METADATA 0x010
#define NVME_SC_SGL_INVALID_TYPE 0x011
#define NVME_SC_PRP_INVALID_OFFSET 0x013
#define NVME_SC_ATOMIC_UNIT_EXCEEDED 0x014
#define NVME_SC_OP_DENIED 0x015
#define NVME_SC_SGL_INVALID_OFFSET 0x016
#define NVME_SC_KAT_EXPIRED 0x019
#define NVME_SC_KAT_INVALID 0x01a
#define NVME_SC_SANITIZE_FAILED 0x01c
#define NVME_SC_SANITIZE_IN_PROGRESS 0x01d
#define NVME_SC_NS_WRITE_PROTECTED 0x020
#define NVME_SC_LBA_RANGE 0x080
#define NVME_SC_CAP_EXCEEDED 0x081
#define NVME_SC_NS_NOT_READY 0x082
#define NVME_SC_FORMAT_IN_PROGRESS 0x084
#define NVME_SC_CQ_INVALID 0x100
#define NVME_SC_QID_INVALID 0x101
#define NVME_SC_QUEUE_SIZE 0x102
#define NVME_SC_ABORT_LIMIT 0x103
#define NVME_SC_ASYNC_LIMIT 0x105
#define NVME_SC_FIRMWARE_SLOT 0x106
#define NVME_SC_FIRMWARE_IMAGE 0x107
#define NVME_SC_INVALID_VECTOR 0x108
#define NVME_SC_INVALID_LOG_PAGE 0x109
#define NVME_SC_INVALID_FORMAT 0x10a
#define NVME_SC_FW_NEEDS_CONV_RESET 0x10b
#define NVME_SC_INVALID_QUEUE 0x10c
#define NVME_SC_FEATURE_NOT_SAVEABLE 0x10d
#define NVME_SC_FEATURE_NOT_CHANGEABLE 0x10e
#define NVME_SC_FEATURE_NOT_PER_NS 0x10f
#define NVME_SC_FW_NEEDS_RESET 0x111
#define NVME_SC_OVERLAPPING_RANGE 0x114
#define NVME_SC_NS_INSUFFICIENT_CAP 0x115
#define NVME_SC_NS_ID_UNAVAILABLE 0x116
#define NVME_SC_NS_ALREADY_ATTACHED 0x118
#define NVME_SC_NS_IS_PRIVATE 0x119
#define NVME_SC_NS_NOT_ATTACHED 0x11a
#define NVME_SC_THIN_PROV_NOT_SUPP 0x11b
#define NVME_SC_CTRL_LIST_INVALID 0x11c
#define NVME_SC_SELF_TEST_IN_PROGRESS 0x11d
#define NVME_SC_IOCS_NOT_SUPPORTED 0x129
#define NVME_SC_IOCS_NOT_ENABLED 0x12a
#define NVME_SC_IOCS_COMBINATION_REJECTED 0x12b
#define NVME_SC_INVALID_IO_CMD_SET 0x12c
#define NVME_SC_BAD_ATTRIBUTES 0x180
#define NVME_SC_INVALID_PI 0x181
#define NVME_SC_READ_ONLY 0x182
#define NVME_SC_CMD_SIZE_LIMIT_EXCEEDED 0x183
#define NVME_SC_WRITE_FAULT 0x280
#define NVME_SC_READ_ERROR 0x281
#define NVME_SC_GUARD_CHECK 0x282
#define NVME_SC_APPTAG_CHECK 0x283
#define NVME_SC_REFTAG_CHECK 0x284
#define NVME_SC_COMPARE_FAILED 0x285
#define NVME_SC_ACCESS_DENIED 0x286
#define NVME_SC_UNWRITTEN_BLOCK 0x287
#define NVME_SC_HOST_ABORTED_CMD 0x371 /* by the host itself: no completion tells it */
#define NVME_SC_MASK 0x7ff
#define NVME_STATUS_MORE 0x2000
#define NVME_STATUS_DNR 0x4000

#define NVME_NSID_ALL 0xffffffff
