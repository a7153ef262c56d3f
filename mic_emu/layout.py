"""The one table of registers, shared structs and constants.

Everything that two processes, or C and Python, must agree on is written here and nowhere else.
The C header ``native/include/mic/layout_gen.h`` is generated from it (``layout_c.py``; ``make lint`` fails when
that file is stale).

Offsets are bytes; registers are 32-bit little-endian words. The clause in each row names the
paragraph of the specification that defines it.
"""

from __future__ import annotations

from collections.abc import Iterator

from mic_emu.layout_types import Field, Reg, Struct

# --- Registers of BAR 4 ------------------------------------------------------------------------

MMIO_SIZE = 0x20000

_DMA = 0x1A000
_CHANNELS = {"count": 8, "stride": 0x40}

MMIO: tuple[Reg, ...] = (
    Reg(
        "postcode",
        0x0242C,
        "rw",
        "HW 2",
        "boot post code: two ASCII characters, first in bits 7:0",
        reset=0x3130,
    ),
    Reg("smpt", 0x13100, "rw", "HW-5", "system memory page table: bits 31:2 host address >> 34", 32),
    Reg("rgcr", 0x14010, "rgcr", "HW-36", "reset control, bit 0 resets the card"),
    Reg("msix_addr", 0x17000, "msixtbl", "HW-14", "MSI-X table entry v: message address, low", 16, 16),
    Reg("msix_addr_hi", 0x17004, "msixtbl", "HW-14", "message address, high", 16, 16),
    Reg("msix_data", 0x17008, "msixtbl", "HW-14", "message data", 16, 16),
    Reg("msix_ctrl", 0x1700C, "msixctl", "HW-14", "bit 0 masks the vector", 16, 16, reset=1),
    Reg("msix_pba", 0x18000, "msixpba", "HW-14", "vectors that became pending while masked"),
    Reg("sicr0", 0x19004, "cause", "HW-13", "interrupt cause: doorbells 3:0, DMA 15:8, ERR 30"),
    Reg("sice0", 0x1900C, "enable", "HW-12", "interrupt enable, bits as in sicr0"),
    Reg("sicc0", 0x19010, "disable", "HW-13", "interrupt enable clear"),
    Reg("siac0", 0x19014, "rw", "HW-13", "interrupt auto-clear, MSI-X only"),
    Reg("mxar", 0x19044, "rw", "HW-14", "vector map: bitmap of the sources that raise vector v", 16),
    Reg("msixpbacr", 0x19084, "pbacr", "HW-21", "write 1 clears the MSI-X pending bit array (A0)"),
    Reg("dcar", _DMA + 0x00, "dcar", "HW-35", "DMA channel attributes: IM0 24, IM1 25, IS0 26", **_CHANNELS),
    Reg(
        "dhpr",
        _DMA + 0x04,
        "dhpr",
        "HW-27",
        "DMA head: next slot software fills; a write starts work",
        **_CHANNELS,
    ),
    Reg("dtpr", _DMA + 0x08, "ro", "HW-23", "DMA tail: next slot hardware fetches", **_CHANNELS),
    Reg("daux_lo", _DMA + 0x0C, "rw", "HW 5.2", "unused", **_CHANNELS),
    Reg("daux_hi", _DMA + 0x10, "rw", "HW 5.2", "unused", **_CHANNELS),
    Reg("drar_lo", _DMA + 0x14, "rw", "HW 5.2", "DMA ring address, low 32 bits", **_CHANNELS),
    Reg("drar_hi", _DMA + 0x18, "rw", "HW 5.2", "DMA ring address high, size, SMPT index, SYS", **_CHANNELS),
    Reg("ditr", _DMA + 0x1C, "rw", "HW 5.2", "interrupt timer, unused", **_CHANNELS),
    Reg(
        "dstat",
        _DMA + 0x20,
        "ro",
        "HW-25",
        "DMA status: completion count 16:0, fault bits 31:29",
        **_CHANNELS,
    ),
    Reg("dstatwb_lo", _DMA + 0x24, "rw", "HW 5.2", "status write-back address, unused", **_CHANNELS),
    Reg("dstatwb_hi", _DMA + 0x28, "rw", "HW 5.2", "status write-back address, unused", **_CHANNELS),
    Reg("dcherr", _DMA + 0x2C, "ro", "HW-31", "DMA channel error, 0 = none", **_CHANNELS),
    Reg("dcherrmsk", _DMA + 0x30, "rw", "HW 5.2", "error interrupt mask", **_CHANNELS),
    Reg("dcr", 0x1A280, "dcr", "HW-22", "DMA: bit 2c owner (1 = host), bit 2c+1 enable", reset=0x55),
    Reg("apicicr", 0x1A9D0, "apicicr", "HW-17", "host -> card interrupt n: bit 13 sends", 8, 8),
    Reg("apicicr_hi", 0x1A9D4, "rw", "HW-42", "destination APIC id of interrupt n", 8, 8),
    Reg("spad", 0x1AB20, "rw", "HW-2", "scratchpads", 16),
    Reg("rdmasr", 0x1B180, "rdmasr", "HW-17", "host -> card interrupt 8 + n: any write fires", 8),
    Reg("sdbic", 0x1CC90, "sdbic", "HW-12", "card -> host doorbell d: bit 31 requests", 4),
)

CONSTANTS: dict[str, int] = {
    "MMIO_SIZE": MMIO_SIZE,
    "CONFIG_SIZE": 4096,
    # Behind configuration space in its object, ours, for people who look: u64 counts since the slot was made of
    # rings of host doorbells 0-3, then messages of host vectors 0-15, then signals of card lines 0-19.
    "COUNTS": 4096,
    "CONFIG_OBJECT_SIZE": 8192,
    "PAGE_SIZE": 4096,
    # PCI configuration space (HW 1): registers, bits, and where a real X100 has its capabilities
    "PCI_VENDOR": 0x8086,
    "PCI_DEVICE_FIRST": 0x2250,
    "PCI_DEVICE_LAST": 0x225E,
    "PCI_COMMAND": 0x04,
    "PCI_COMMAND_IO": 1 << 0,
    "PCI_COMMAND_MEMORY": 1 << 1,
    "PCI_COMMAND_MASTER": 1 << 2,
    "PCI_COMMAND_INTX_OFF": 1 << 10,
    "PCI_STATUS": 0x06,
    "PCI_STATUS_INTX": 1 << 3,
    "PCI_STATUS_CAPS": 1 << 4,
    "PCI_REVISION": 0x08,
    "PCI_BAR0": 0x10,
    "PCI_BAR4": 0x20,
    "PCI_CAP_POINTER": 0x34,
    "PCI_INTERRUPT_PIN": 0x3D,
    "PCI_CAP_PM": 0x44,
    "PCI_CAP_EXP": 0x4C,
    "PCI_CAP_MSI": 0x88,
    "PCI_CAP_MSIX": 0x98,
    "PCI_MSI_ENABLE": 1 << 0,
    "PCI_MSIX_ENABLE": 1 << 15,
    "PCI_MSIX_MASKALL": 1 << 14,
    "MSIX_TABLE_SIZE": 16,
    # scratchpads (HW 2)
    "SPAD_DOWNLOAD": 2,
    "SPAD_FW_SIZE": 5,
    "SPAD_DP_LO": 14,
    "SPAD_DP_HI": 15,
    "DOWNLOAD_READY": 1,
    "DOWNLOAD_APIC_SHIFT": 1,
    "DOWNLOAD_APIC_MASK": 0x1FF,
    "DOWNLOAD_ADDR_MASK": 0xFFFFF000,
    "DOWNLOAD_ADDR_MAX": 0x80000000,
    "BOOT_VECTOR": 229,
    "APICICR_SEND": 1 << 13,
    "SDBIC_REQUEST": 1 << 31,
    "RGCR_RESET": 1,
    # boot header of an x86 image (HW 6.4)
    "BOOT_RAMDISK_IMAGE": 0x218,
    "BOOT_RAMDISK_SIZE": 0x21C,
    "CMDLINE_MAX": 2048,
    "CARD_TEXT_BASE": 0xFFFFFFFF80000000,  # kernel text mapping: card kernel addresses minus this are GDDR (COSM 9)
    # the card's kernel log in GDDR (COSM 9; the place is ours): length word, then text
    "CARD_LOG": 0x0100_0000,
    "CARD_LOG_SIZE": 0x0010_0004,
    # Pages of SCIF windows lie in a bank of their own behind the card's GDDR object, at card addresses where
    # neither memory nor a register is: losing the card cuts the object off there, and nothing else goes with it.
    "WINDOW_BANK": 0x40_0000_0000,
    # card address map (HW 1)
    "CARD_MMIO_BASE": 0x08_007C_0000,
    "SMPT_BASE": 0x80_0000_0000,
    "SMPT_END": 0x100_0000_0000,
    "SMPT_SHIFT": 34,
    "SMPT_ENTRIES": 32,
    # interrupt sources (HW 4.2)
    "SRC_DOORBELL": 0,
    "SRC_DOORBELLS": 4,
    "SRC_DMA": 8,
    "SRC_DMAS": 8,
    "SRC_ERR": 30,
    "IRQ_ENABLE_MASK": 0xFF0F,
    "MSIX_VECTORS": 9,
    "MXAR_COUNT": 16,
    # card interrupt lines (HW 4.4): what our array of eventfds holds, not the OS's IRQ numbers
    "CARD_DOORBELLS": 16,
    "CARD_IRQS": 20,
    "CARD_IRQ_DMA": 16,
    # DMA engine (HW 5)
    "DMA_CHANNELS": 8,
    "DMA_HOST_CHANNELS": 4,
    "DMA_RING_SIZE": 131068,
    "DMA_DESC_SIZE": 16,
    "DMA_DCAR_IM0": 1 << 24,
    "DMA_DCAR_IM1": 1 << 25,
    "DMA_DCAR_IS0": 1 << 26,
    "DMA_DCR_RESET": 0x55,  # channels 0-3 are the host's, all disabled
    "DMA_DRAR_SIZE_SHIFT": 4,
    "DMA_DRAR_SMPT_SHIFT": 21,
    "DMA_DRAR_SYS": 1 << 26,
    "DMA_DSTAT_COUNT": 0x1FFFF,
    "DMA_DSTAT_QUIESCED": 1 << 29,
    "DMA_DSTAT_ERROR": 1 << 31,
    "DMA_DSTAT_ACTIVE": 1 << 28,  # ours: the engine is between fetching and retiring (bits 31:28)
    # Not registers: words of the MMIO object where a process that sleeps on DSTAT says so, one per channel.
    "DMA_SLEEPERS": 0x1FF00,  # 0 nobody, else count + 1 that is waited for, or
    "DMA_SLEEP_ANY": 0xFFFFFFFF,
    # Nor these: what each channel of the engine has done (struct mic_dma_stats), for people who look.
    "DMA_STATS": 0x1FC00,
    # DCHERR: why a channel halted (HW-31). The chapter only says "non-zero"; one bit per cause is ours.
    "DMA_ERR_HEAD": 1 << 0,  # same head written again, or head outside the ring
    "DMA_ERR_RING": 1 << 1,  # ring size 0, misaligned, or not backed by memory
    "DMA_ERR_TYPE": 1 << 2,  # unknown descriptor type
    "DMA_ERR_LENGTH": 1 << 3,  # copy of nothing
    "DMA_ERR_ALIGN": 1 << 4,  # copy not 64-byte aligned, status not 8, general not 4
    "DMA_ERR_SOURCE": 1 << 5,  # source not in GDDR, own MMIO or a backed SMPT entry
    "DMA_ERR_DEST": 1 << 6,  # the same for the destination
    "DMA_ERR_PAIR": 1 << 7,  # host memory to host memory
    "DMA_ERR_MEMORY": 1 << 8,  # the memory itself failed under the access
    "DMA_MEMCPY_LEN_SHIFT": 46,
    "DMA_MEMCPY_LEN_MASK": 0x3FFF,
    "DMA_ADDR_MASK": (1 << 40) - 1,
    "DMA_TYPE_SHIFT": 60,
    "DMA_MEMCPY_WRITE_BACK": 1 << 55,
    "DMA_MEMCPY_INTERRUPT": 1 << 56,
    "DMA_STATUS_INTERRUPT": 1 << 59,
    "DMA_DESC_NOP": 0,
    "DMA_DESC_MEMCPY": 1,
    "DMA_DESC_STATUS": 2,
    "DMA_DESC_GENERAL": 3,
    "DMA_ALIGN": 64,
    "DMA_HOST_MAX": 512 * 1024,
    "DMA_CARD_MAX": 1024 * 1024 - 64,
    # device page and VOP (VOP 2)
    "DP_SIZE": 4096,
    "MIC_MAGIC": 0xC0FFEE00,
    "DP_FIRST_SLOT": 24,
    "VRING_ALIGN": 4096,
    "MAX_VRINGS": 4,
    "VRING_ENTRIES": 128,
    "MAX_VRING_ENTRIES": 128,
    "MAX_DESC_BLK": 256,
    "VIRTIO_ADD_DEVICE": 0xC0087301,  # ioctls of the character device (VOP-5)
    "VIRTIO_COPY_DESC": 0xC0087302,
    "VIRTIO_CONFIG_CHANGE": 0xC0087305,
    "PARAM_DEV_REMOVE": 1,
    "PARAM_CONFIG_CHANGED": 2,
    # virtio (VOP 9.1)
    "VIRTIO_ID_NET": 1,
    "VIRTIO_ID_BLOCK": 2,
    "VIRTIO_ID_CONSOLE": 3,
    "VIRTIO_ID_RNG": 4,
    "VIRTIO_ID_VSOCK": 19,
    "VIRTIO_ACKNOWLEDGE": 1,
    "VIRTIO_DRIVER": 2,
    "VIRTIO_DRIVER_OK": 4,
    "VIRTIO_FEATURES_OK": 8,
    "VIRTIO_NEEDS_RESET": 0x40,
    "VIRTIO_FAILED": 0x80,
    "VRING_DESC_F_NEXT": 1,
    "VRING_DESC_F_WRITE": 2,
    "VRING_DESC_F_INDIRECT": 4,
    "VRING_AVAIL_F_NO_INTERRUPT": 1,
    "VRING_USED_F_NO_NOTIFY": 1,
    "VIRTIO_F_INDIRECT_DESC": 28,
    "VIRTIO_F_EVENT_IDX": 29,
    "VIRTIO_F_VERSION_1": 32,
    # virtio-net (VOP 9.2)
    "VIRTIO_NET_F_CSUM": 0,
    "VIRTIO_NET_F_GUEST_CSUM": 1,
    "VIRTIO_NET_F_MTU": 3,
    "VIRTIO_NET_F_MAC": 5,
    "VIRTIO_NET_F_GSO": 6,
    "VIRTIO_NET_F_GUEST_TSO4": 7,
    "VIRTIO_NET_F_GUEST_TSO6": 8,
    "VIRTIO_NET_F_GUEST_ECN": 9,
    "VIRTIO_NET_F_GUEST_UFO": 10,
    "VIRTIO_NET_F_HOST_TSO4": 11,
    "VIRTIO_NET_F_HOST_TSO6": 12,
    "VIRTIO_NET_F_HOST_ECN": 13,
    "VIRTIO_NET_F_MRG_RXBUF": 15,
    "VIRTIO_NET_F_STATUS": 16,
    # virtio-blk (VOP 9.4)
    "VIRTIO_BLK_F_SIZE_MAX": 1,
    "VIRTIO_BLK_F_SEG_MAX": 2,
    "VIRTIO_BLK_F_RO": 5,
    "VIRTIO_BLK_F_BLK_SIZE": 6,
    "VIRTIO_BLK_F_FLUSH": 9,
    "VIRTIO_BLK_F_TOPOLOGY": 10,
    "VIRTIO_BLK_F_DISCARD": 13,
    "VIRTIO_BLK_F_WRITE_ZEROES": 14,
    "VIRTIO_BLK_T_IN": 0,
    "VIRTIO_BLK_T_OUT": 1,
    "VIRTIO_BLK_T_FLUSH": 4,
    "VIRTIO_BLK_T_GET_ID": 8,
    "VIRTIO_BLK_T_DISCARD": 11,
    "VIRTIO_BLK_T_WRITE_ZEROES": 13,
    "VIRTIO_BLK_S_OK": 0,
    "VIRTIO_BLK_S_IOERR": 1,
    "VIRTIO_BLK_S_UNSUPP": 2,
    "VIRTIO_BLK_ID_LEN": 20,
    # virtio-console (VOP 9.3)
    "VIRTIO_CONSOLE_F_SIZE": 0,
    "VIRTIO_CONSOLE_F_MULTIPORT": 1,
    # virtio-vsock (virtio 1.2, 5.10)
    "VIRTIO_VSOCK_TYPE_STREAM": 1,
    "VIRTIO_VSOCK_OP_REQUEST": 1,
    "VIRTIO_VSOCK_OP_RESPONSE": 2,
    "VIRTIO_VSOCK_OP_RST": 3,
    "VIRTIO_VSOCK_OP_SHUTDOWN": 4,
    "VIRTIO_VSOCK_OP_RW": 5,
    "VIRTIO_VSOCK_OP_CREDIT_UPDATE": 6,
    "VIRTIO_VSOCK_OP_CREDIT_REQUEST": 7,
    "VIRTIO_VSOCK_SHUTDOWN_RCV": 1,  # the sender will receive no more
    "VIRTIO_VSOCK_SHUTDOWN_SEND": 2,  # the sender will send no more
    "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET": 0,
    "VSOCK_CID_HOST": 2,
    "VSOCK_CID_CARD": 3,  # of mic0; micN has this + N
    # SCIF (SCIF 3)
    "SCIF_QP_MAGIC": 0x5C1F000000005C1F,
    "SCIF_NODE_RING": 0x10000,
    "SCIF_EP_RING": 0x8000,  # bytes behind an endpoint's ring, more than fit without a reader
    "SCIF_EP_CAPACITY": 4095,  # bytes that fit without a reader (SCIF 2.7)
    "SCIF_ABI": 0x32465343,
    "SCIF_ADMIN_PORT_END": 1024,
    "SCIF_PORT_RSVD": 1088,
    "SCIF_COSM_PORT": 201,
    # COSM (COSM 5)
    "COSM_BACKLOG": 16,
    "COSM_MSG_SHUTDOWN": 0,
    "COSM_MSG_SYNC_TIME": 1,
    "COSM_MSG_HEARTBEAT": 2,
    "COSM_MSG_SHUTDOWN_STATUS": 3,
    # Fault filters (docs/faults.md): one memory object per card, which every process of the card maps
    "FAULT_SIZE": 8192,
    "FAULT_LOST_TO_CARD": 8,  # offset of a word: doorbells that were dropped, a bit each
    "FAULT_LOST_TO_HOST": 12,
    "FAULT_FIRST": 128,  # offset of the first filter; the word before them all says which points are armed
    "FAULT_SLOTS": 31,
    "FAULT_LATE_FIRST": 4096,  # offset of the doorbells on their way
    "FAULT_LATE_SLOTS": 256,
    "FAULT_ANY": 0xFFFFFFFF,  # target: every device, or every DMA channel
    "FAULT_TARGET_SCIF": 1,  # target: the SCIF doorbells; a device's target is its offset in the device page
    # where a filter looks: bit numbers of `points`
    "FAULT_AT_DOORBELL": 0,
    "FAULT_AT_DMA": 1,
    "FAULT_AT_DISK": 2,
    "FAULT_AT_PACKET": 3,
    "FAULT_AT_HEARTBEAT": 4,
    "FAULT_POINTS": 5,
    # what it looks at: bits of `ways`; directions, and at a disk kinds of requests
    "FAULT_TO_CARD": 1,
    "FAULT_TO_HOST": 2,
    "FAULT_READ": 1,
    "FAULT_WRITE": 2,
    "FAULT_FLUSH": 4,
    "FAULT_DISCARD": 8,
    # what it does: param[0], param[1]
    "FAULT_DROP": 1,
    "FAULT_DELAY": 2,  # nanoseconds, nanoseconds of jitter on top
    "FAULT_DUPLICATE": 3,  # at a doorbell: nanoseconds until the second ring
    "FAULT_FAIL": 4,  # at a DMA channel: DCHERR bits; at a disk: errno
    "FAULT_CORRUPT": 5,
    "FAULT_SKIP": 6,
    "FAULT_LOSE_INTERRUPT": 7,
    "FAULT_TORN": 8,  # sectors that reach the disk + 1, 0: the seed decides; 1: success is reported
    "FAULT_REORDER": 9,  # frames that overtake
    "FAULT_HANG": 10,
    "FAULT_KILL": 11,
    "FAULT_LINK": 12,  # bytes per second, nanoseconds
}

# --- Shared structs ----------------------------------------------------------------------------

BOOTPARAM = Struct(
    "bootparam",
    24,
    "VOP-1",
    (
        Field("magic", 0, "I", "MIC_MAGIC"),
        Field("h2c_config_db", 4, "b", "card doorbell for 'device page changed', -1 none"),
        Field("node_id", 5, "B", "SCIF node id"),
        Field("h2c_scif_db", 6, "B", "card's SCIF doorbell, 0xff none"),
        Field("c2h_scif_db", 7, "B", "host's SCIF doorbell, 0xff none"),
        Field("scif_host_dma_addr", 8, "Q", "host's node queue pair, 0 absent"),
        Field("scif_card_dma_addr", 16, "Q", "card's node queue pair, 0 absent"),
    ),
)
DEVICE_DESC = Struct(
    "device_desc",
    8,
    "VOP-2",
    (
        Field("type", 0, "b", ">0 virtio device id, 0 end of list, -1 removed"),
        Field("num_vq", 1, "B"),
        Field("feature_len", 2, "B"),
        Field("config_len", 3, "B"),
        Field("status", 4, "B", "virtio status"),
    ),
)
VQCONFIG = Struct(
    "vqconfig",
    24,
    "VOP-2",
    (
        Field("address", 0, "Q", "card-view address of the ring block"),
        Field("used_address", 8, "Q", "card address of the used ring"),
        Field("num", 16, "H"),
    ),
)
DEVICE_CTRL = Struct(
    "device_ctrl",
    16,
    "VOP-2",
    (
        Field("vdev", 0, "Q", "the card's own cookie"),
        Field("config_change", 8, "B"),
        Field("vdev_reset", 9, "B"),
        Field("guest_ack", 10, "B"),
        Field("host_ack", 11, "B"),
        Field("used_address_updated", 12, "B"),
        Field("c2h_vdev_db", 13, "b"),
        Field("h2c_vdev_db", 14, "b"),
    ),
)
VRING_INFO = Struct(
    "vring_info", 8, "VOP-2", (Field("avail_idx", 0, "H"), Field("magic", 4, "I")), packed=True
)
VRING_DESC = Struct(
    "vring_desc",
    16,
    "VOP 9.1",
    (Field("addr", 0, "Q"), Field("len", 8, "I"), Field("flags", 12, "H"), Field("next", 14, "H")),
)
VRING_USED_ELEM = Struct("vring_used_elem", 8, "VOP 9.1", (Field("id", 0, "I"), Field("len", 4, "I")))
COPY_DESC = Struct(
    "copy_desc",
    24,
    "VOP-2",
    (
        Field("iov", 0, "Q"),
        Field("iovcnt", 8, "I"),
        Field("vr_idx", 12, "B"),
        Field("update_used", 13, "B"),
        Field("out_len", 16, "I"),
    ),
)
DMA_DESC = Struct("dma_desc", 16, "HW 5.3", (Field("qw0", 0, "Q"), Field("qw1", 8, "Q")))
NET_HDR = Struct(
    "virtio_net_hdr",
    12,
    "VOP 9.2",
    (
        Field("flags", 0, "B"),
        Field("gso_type", 1, "B"),
        Field("hdr_len", 2, "H"),
        Field("gso_size", 4, "H"),
        Field("csum_start", 6, "H"),
        Field("csum_offset", 8, "H"),
        Field("num_buffers", 10, "H", "only with MRG_RXBUF or VERSION_1"),
    ),
)
NET_CONFIG = Struct(
    "virtio_net_config",
    12,
    "VOP 9.2",
    (Field("mac", 0, "6s"), Field("status", 6, "H"), Field("max_pairs", 8, "H"), Field("mtu", 10, "H")),
)
CONSOLE_CONFIG = Struct(
    "virtio_console_config",
    12,
    "VOP 9.3",
    (Field("cols", 0, "H"), Field("rows", 2, "H"), Field("max_nr_ports", 4, "I"), Field("emerg_wr", 8, "I")),
)
BLK_CONFIG = Struct(
    "virtio_blk_config",
    60,
    "VOP 9.4",
    (
        Field("capacity", 0, "Q", "512-byte sectors"),
        Field("size_max", 8, "I"),
        Field("seg_max", 12, "I"),
        Field("cylinders", 16, "H"),
        Field("heads", 18, "B"),
        Field("sectors", 19, "B"),
        Field("blk_size", 20, "I"),
        Field("physical_block_exp", 24, "B"),
        Field("alignment_offset", 25, "B"),
        Field("min_io_size", 26, "H"),
        Field("opt_io_size", 28, "I"),
        Field("writeback", 32, "B"),
        Field("num_queues", 34, "H"),
        Field("max_discard_sectors", 36, "I"),
        Field("max_discard_seg", 40, "I"),
        Field("discard_sector_alignment", 44, "I"),
        Field("max_write_zeroes_sectors", 48, "I"),
        Field("max_write_zeroes_seg", 52, "I"),
        Field("write_zeroes_may_unmap", 56, "B"),
    ),
    packed=True,
)
BLK_REQ = Struct(
    "virtio_blk_req", 16, "VOP 9.4", (Field("type", 0, "I"), Field("ioprio", 4, "I"), Field("sector", 8, "Q"))
)
BLK_RANGE = Struct(
    "virtio_blk_range",
    16,
    "VOP 9.4",
    (Field("sector", 0, "Q"), Field("num_sectors", 8, "I"), Field("flags", 12, "I")),
)
VSOCK_HDR = Struct(
    "virtio_vsock_hdr",
    44,
    "virtio 1.2, 5.10.6",
    (
        Field("src_cid", 0, "Q"),
        Field("dst_cid", 8, "Q"),
        Field("src_port", 16, "I"),
        Field("dst_port", 20, "I"),
        Field("len", 24, "I", "bytes of payload behind the header"),
        Field("type", 28, "H"),
        Field("op", 30, "H"),
        Field("flags", 32, "I", "of SHUTDOWN"),
        Field("buf_alloc", 36, "I", "the sender's receive buffer for this connection, bytes"),
        Field("fwd_cnt", 40, "I", "bytes that left it so far, modulo 2**32"),
    ),
    packed=True,
)
SCIF_MSG = Struct(
    "scif_msg",
    44,
    "SCIF 3.3",
    (
        Field("src_node", 0, "H"),
        Field("src_port", 2, "H"),
        Field("dst_node", 4, "H"),
        Field("dst_port", 6, "H"),
        Field("op", 8, "I"),
        Field("p0", 12, "Q"),
        Field("p1", 20, "Q"),
        Field("p2", 28, "Q"),
        Field("p3", 36, "Q"),
    ),
    packed=True,
)
SCIF_QP = Struct(
    "scif_qp",
    256,
    "SCIF 3.2",
    (
        Field("magic", 0, "Q"),
        Field("local_write", 128, "I", "receiver's write index, written by the sender"),
        Field("local_read", 192, "I", "sender's read index, written by the receiver"),
        Field("remote_qp", 200, "Q"),
        Field("local_buf", 208, "Q", "bus address of the receive buffer"),
        Field("local_qp", 216, "Q", "bus address of this queue pair"),
        Field("remote_buf", 224, "Q"),
        Field("qp_state", 232, "I"),
    ),
)
COSM_MSG = Struct(
    "cosm_msg", 24, "COSM 5.2", (Field("id", 0, "Q"), Field("value", 8, "Q"), Field("nsec", 16, "Q"))
)

FAULT_FILTER = Struct(
    "fault_filter",
    128,
    "faults",
    (
        Field("id", 0, "I", "0: no filter here; stored last, cleared first"),
        Field("effect", 4, "I"),
        Field("points", 8, "I", "bit per place where it looks"),
        Field("target", 12, "I", "device, or bit per DMA channel"),
        Field("ways", 16, "I"),
        Field("notify", 20, "I", "1: the host was told of a hit and has not looked yet"),
        Field("chance", 24, "Q", "of 2^32 per event"),
        Field("after", 32, "Q", "events that pass first"),
        Field("count", 40, "Q", "hits until it is spent, 0: no end"),
        Field("seed", 48, "Q"),
        Field("param0", 56, "Q"),
        Field("param1", 64, "Q"),
        Field("seen", 72, "Q", "events that matched"),
        Field("hits", 80, "Q", "events it acted on"),
        Field("busy_to_card", 88, "Q", "link: when the direction becomes free (CLOCK_MONOTONIC, ns)"),
        Field("busy_to_host", 96, "Q"),
    ),
)
FAULT_LATE = Struct(
    "fault_late",
    16,
    "faults",
    (
        Field("due", 0, "Q", "CLOCK_MONOTONIC, ns"),
        Field("doorbell", 8, "I", "number; bit 31: to the host"),
        Field("state", 12, "I", "0 free, 1 being written, 2 on its way"),
    ),
)

STRUCTS: tuple[Struct, ...] = (
    BOOTPARAM, DEVICE_DESC, VQCONFIG, DEVICE_CTRL, VRING_INFO, VRING_DESC, VRING_USED_ELEM, COPY_DESC,
    DMA_DESC, NET_HDR, NET_CONFIG, CONSOLE_CONFIG, BLK_CONFIG, BLK_REQ, BLK_RANGE, VSOCK_HDR, SCIF_MSG, SCIF_QP, COSM_MSG,
    FAULT_FILTER, FAULT_LATE,
)  # fmt: skip

# --- Look-ups ----------------------------------------------------------------------------------

_BY_NAME = {r.name: r for r in MMIO}


def reg(name: str, index: int = 0) -> int:
    """Offset in BAR 4 of register ``name``, or of element ``index`` of a row of registers."""
    row = _BY_NAME[name]
    if not 0 <= index < row.count:
        raise IndexError(f"{name}: index {index} is outside 0..{row.count - 1}")
    return row.off + index * row.stride


def register_words() -> Iterator[tuple[int, str, Reg]]:
    """Every 32-bit register as (offset, printable name, row), ascending."""
    words = []
    for row in MMIO:
        for i in range(row.count):
            words.append((row.off + i * row.stride, row.name if row.count == 1 else f"{row.name}[{i}]", row))
    return iter(sorted(words, key=lambda w: w[0]))
