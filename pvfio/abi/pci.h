/*
 * PCI configuration space of an endpoint: the type 0 header and the capabilities pvfio's functions have. Names
 * follow Linux's pci_regs.h. Offsets inside a capability count from its own start.
 *
 * Not described: bridges, I/O BARs, expansion ROMs, MSI, link registers.
 */

struct pci_type0_header {
    uint16_t vendor_id;
    uint16_t device_id;
    uint16_t command;
    uint16_t status;
    uint8_t revision_id;
    uint8_t prog_if;
    uint8_t sub_class;
    uint8_t base_class;
    uint8_t cache_line_size;
    uint8_t latency_timer;
    uint8_t header_type;
    uint8_t bist;
    uint32_t bar[6];
    uint32_t cardbus_cis;
    uint16_t subsystem_vendor_id;
    uint16_t subsystem_id;
    uint32_t expansion_rom;
    uint8_t capabilities;
    uint8_t reserved[7];
    uint8_t interrupt_line;
    uint8_t interrupt_pin;
    uint8_t min_gnt;
    uint8_t max_lat;
};

#define PCI_CFG_SPACE_SIZE 256
#define PCI_CFG_SPACE_EXP_SIZE 4096
#define PCI_STD_NUM_BARS 6

#define PCI_VENDOR_ID 0x00
#define PCI_DEVICE_ID 0x02
#define PCI_COMMAND 0x04
#define PCI_STATUS 0x06
#define PCI_REVISION_ID 0x08
#define PCI_CLASS_PROG 0x09
#define PCI_CLASS_DEVICE 0x0a
#define PCI_CACHE_LINE_SIZE 0x0c
#define PCI_LATENCY_TIMER 0x0d
#define PCI_HEADER_TYPE 0x0e
#define PCI_BIST 0x0f
#define PCI_BASE_ADDRESS_0 0x10
#define PCI_SUBSYSTEM_VENDOR_ID 0x2c
#define PCI_SUBSYSTEM_ID 0x2e
#define PCI_ROM_ADDRESS 0x30
#define PCI_CAPABILITY_LIST 0x34
#define PCI_INTERRUPT_LINE 0x3c
#define PCI_INTERRUPT_PIN 0x3d

#define PCI_COMMAND_IO 0x1
#define PCI_COMMAND_MEMORY 0x2
#define PCI_COMMAND_MASTER 0x4
#define PCI_COMMAND_PARITY 0x40
#define PCI_COMMAND_SERR 0x100
#define PCI_COMMAND_INTX_DISABLE 0x400

#define PCI_STATUS_INTERRUPT 0x8
#define PCI_STATUS_CAP_LIST 0x10
#define PCI_STATUS_ERRORS 0xf900

#define PCI_HEADER_TYPE_MULTIFUNCTION 0x80

#define PCI_BASE_ADDRESS_MEM_TYPE_64 0x4
#define PCI_BASE_ADDRESS_MEM_PREFETCH 0x8

/* Capability ids; a capability begins with its id and the offset of the next (0: none). */
#define PCI_CAP_ID_PM 0x01
#define PCI_CAP_ID_EXP 0x10
#define PCI_CAP_ID_MSIX 0x11
#define PCI_CAP_LIST_NEXT 1

/* Power management, 8 bytes. */
#define PCI_PM_SIZEOF 8
#define PCI_PM_PMC 2
#define PCI_PM_CTRL 4
#define PCI_PM_CTRL_STATE_MASK 0x3
#define PCI_PM_CTRL_NO_SOFT_RESET 0x8
#define PCI_PM_D0 0
#define PCI_PM_D3HOT 3

/* PCI Express, version 2, 60 bytes. */
#define PCI_CAP_EXP_SIZEOF 60
#define PCI_EXP_FLAGS 2
#define PCI_EXP_FLAGS_VERSION_2 0x2
#define PCI_EXP_TYPE_ENDPOINT 0x0
#define PCI_EXP_TYPE_RC_END 0x9
#define PCI_EXP_TYPE_SHIFT 4
#define PCI_EXP_DEVCAP 4
#define PCI_EXP_DEVCAP_RBER 0x8000
#define PCI_EXP_DEVCAP_FLR 0x10000000
#define PCI_EXP_DEVCTL 8
#define PCI_EXP_DEVCTL_WRITABLE 0x78ff
#define PCI_EXP_DEVCTL_AFTER_RESET 0x2810
#define PCI_EXP_DEVCTL_BCR_FLR 0x8000
#define PCI_EXP_DEVSTA 10
#define PCI_EXP_DEVSTA_ERRORS 0xf
#define PCI_EXP_DEVSTA_TRPND 0x20

/* MSI-X, 12 bytes, and an entry of its table. */
#define PCI_CAP_MSIX_SIZEOF 12
#define PCI_MSIX_FLAGS 2
#define PCI_MSIX_FLAGS_QSIZE 0x7ff
#define PCI_MSIX_FLAGS_MASKALL 0x4000
#define PCI_MSIX_FLAGS_ENABLE 0x8000
#define PCI_MSIX_TABLE 4
#define PCI_MSIX_PBA 8
#define PCI_MSIX_BIR_MASK 0x7
#define PCI_MSIX_OFFSET_MASK 0xfffffff8
#define PCI_MSIX_ENTRY_SIZE 16
#define PCI_MSIX_ENTRY_CTRL_MASKBIT 0x1

struct pci_msix_entry {
    uint32_t lower_addr;
    uint32_t upper_addr;
    uint32_t data;
    uint32_t vector_ctrl;
};

/* Extended capabilities begin at 0x100: id 15:0, version 19:16, next 31:20. */
#define PCI_EXT_CAP_BASE 0x100
#define PCI_EXT_CAP_ID_MASK 0xffff
#define PCI_EXT_CAP_VERSION_SHIFT 16
#define PCI_EXT_CAP_NEXT_SHIFT 20
#define PCI_EXT_CAP_ID_ATS 0x0f

/* Address translation services, 8 bytes. */
#define PCI_EXT_CAP_ATS_SIZEOF 8
#define PCI_ATS_CAP 4
#define PCI_ATS_CAP_PAGE_ALIGNED 0x20
#define PCI_ATS_CAP_QDEP_MASK 0x1f
#define PCI_ATS_CTRL 6
#define PCI_ATS_CTRL_STU_MASK 0x1f
#define PCI_ATS_CTRL_ENABLE 0x8000
