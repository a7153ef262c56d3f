"""Both halves of a vring over real card memories, without the rest of the stack.

``Rig`` creates a card's memories and builds one device slot by hand; ``FakeDriver`` plays the card
half, ``FakeDevice`` the backend half. Each half may live in its own process: fork after the rig was
made. Raw access to descriptors and indices is for tests that break the rules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.bar import Bus, create_slot
from mic_emu.memory import PAGE, PageAllocator, create_shm

C = layout.CONSTANTS
SMPT_BASE: int = C["SMPT_BASE"]
NEXT: int = C["VRING_DESC_F_NEXT"]
WRITE: int = C["VRING_DESC_F_WRITE"]
INDIRECT: int = C["VRING_DESC_F_INDIRECT"]
EVENT_IDX: int = 1 << C["VIRTIO_F_EVENT_IDX"]
INDIRECT_DESC: int = 1 << C["VIRTIO_F_INDIRECT_DESC"]
DRIVER_OK: int = C["VIRTIO_DRIVER_OK"]
NEEDS_RESET: int = C["VIRTIO_NEEDS_RESET"]

Seg = tuple[int, int]
"""A buffer: card physical address and length in bytes."""


def check(rc: int, what: str) -> int:
    """Turn a native ``-errno`` into OSError; pass counts through."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc


class Rig:
    """Memories of one card and one hand-built device slot with ``num_vq`` rings of ``num`` entries.

    The slot's doorbells are host doorbell 0 (vector 0) and card doorbell 0. ``features`` is what both
    halves agreed on. Context manager.
    """

    def __init__(
        self,
        num: int = 128,
        *,
        num_vq: int = 1,
        features: int = 0,
        device_type: int = 2,
        config: bytes = b"",
        gddr_size: int = 64 << 20,
        host_size: int = 4 << 20,
    ) -> None:
        self.num, self.num_vq, self.features = num, num_vq, features
        host_fd = create_shm("rig-host", host_size)
        try:
            self.bus = Bus(create_slot("rig", gddr_size, host_fd))
        finally:
            os.close(host_fd)
        lib.mic_hw_reset(self.bus.ptr)
        self.host_pages = PageAllocator(self.bus.fds[lib.MIC_FD_HOST], 0, host_size)
        self.gddr_pages = PageAllocator(self.bus.fds[lib.MIC_FD_GDDR], PAGE, gddr_size)
        self.bus.write("mxar", 1 << C["SRC_DOORBELL"], 0)
        self.bus.write("sice0", 1 << C["SRC_DOORBELL"])
        self._build_slot(device_type, config)

    def _build_slot(self, device_type: int, config: bytes) -> None:
        page = self.host_pages.alloc(PAGE)
        self.slot_off = page + C["DP_FIRST_SLOT"]
        body = 8 + 24 * self.num_vq + 2 * 8 + len(config)
        self.config_off = self.slot_off + body - len(config)
        self.ctrl_off = self.slot_off + (body + 7) // 8 * 8
        block = lib.mic_vring_block_size(self.num)
        self.blocks = [self.host_pages.alloc(block) for _ in range(self.num_vq)]
        self.used = [self.gddr_pages.alloc(PAGE) for _ in range(self.num_vq)]
        self.indirect = [self.gddr_pages.alloc(16 * lib.MIC_DQ_TABLE * self.num) for _ in range(self.num_vq)]
        header = layout.DEVICE_DESC.pack(
            type=device_type, num_vq=self.num_vq, feature_len=8, config_len=len(config)
        )
        self.bus.host.write(self.slot_off, header)
        for i in range(self.num_vq):
            row = layout.VQCONFIG.pack(
                address=SMPT_BASE + self.blocks[i], used_address=self.used[i], num=self.num
            )
            self.bus.host.write(self.slot_off + 8 + 24 * i, row)
            info = layout.VRING_INFO.pack(magic=(C["MIC_MAGIC"] + device_type + i) & 0xFFFFFFFF)
            self.bus.host.write(self.blocks[i] + lib.mic_vring_size(self.num), info)
        self.bus.host.write(self.config_off, config)
        self.put_ctrl("c2h_vdev_db", 0)
        self.put_ctrl("h2c_vdev_db", 0)

    def put_ctrl(self, name: str, value: int) -> None:
        """Store a byte of the control block."""
        layout.DEVICE_CTRL.put(self.bus.host, self.ctrl_off, name, value)

    def ctrl(self, name: str) -> int:
        """Load a byte of the control block."""
        return layout.DEVICE_CTRL.get(self.bus.host, self.ctrl_off, name)

    @property
    def status(self) -> int:
        """The virtio status byte."""
        return layout.DEVICE_DESC.get(self.bus.host, self.slot_off, "status")

    @status.setter
    def status(self, value: int) -> None:
        layout.DEVICE_DESC.put(self.bus.host, self.slot_off, "status", value)

    def alloc(self, nbytes: int) -> int:
        """A buffer in GDDR: its card physical address."""
        return self.gddr_pages.alloc(nbytes)

    def close(self) -> None:
        """Unmap and close everything."""
        self.bus.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Chain:
    """A chain as the device sees it; addresses are card physical."""

    head: int
    readable: tuple[Seg, ...]
    writable: tuple[Seg, ...]


class FakeDevice:
    """The backend half of a rig. ``control_fd`` makes loops return (default: none)."""

    def __init__(self, rig: Rig, *, control_fd: int = -1, max_segs: int = 256) -> None:
        self.rig = rig
        self.vdev: Any = ffi.new("struct mic_vdev *")
        kick = rig.bus.vector_fd(0)
        rc = lib.mic_vdev_init(
            self.vdev, rig.bus.ptr, rig.slot_off, rig.ctrl_off, kick, control_fd, rig.num_vq
        )
        check(rc, "vdev")
        self.vdev.fault_target = C["DP_FIRST_SLOT"]
        self._iov = ffi.new("struct iovec[]", max_segs)
        self._max = max_segs
        self._chain = ffi.new("struct mic_chain *")
        self.vq: list[Any] = [ffi.addressof(self.vdev.vq, i) for i in range(rig.num_vq)]
        self._base = int(ffi.cast("uintptr_t", lib.mic_bus_gddr(rig.bus.ptr)))
        self.reset()

    def reset(self) -> None:
        """Set all rings up again, as after the card's reset hand-shake."""
        for i in range(self.rig.num_vq):
            check(self.init(i, self.rig.blocks[i], self.rig.used[i]), f"ring {i}")

    def init(self, i: int, block_off: int, used_addr: int, num: int | None = None) -> int:
        """Raw ``mic_vq_init`` of ring ``i``; returns its result."""
        rig = self.rig
        return int(
            lib.mic_vq_init(self.vq[i], rig.bus.ptr, block_off, used_addr, num or rig.num, rig.features)
        )

    def pop(self, i: int = 0) -> Chain | None:
        """Next chain, None when there is none; OSError when the ring broke."""
        rc = lib.mic_vq_pop(self.vq[i], self._chain, self._iov, self._max)
        if check(rc, f"ring {i}") == 0:
            return None
        c = self._chain
        segs = [
            (int(ffi.cast("uintptr_t", v.iov_base)) - self._base, int(v.iov_len))
            for v in self._iov[0 : c.out_num + c.in_num]
        ]
        return Chain(c.head, tuple(segs[: c.out_num]), tuple(segs[c.out_num :]))

    def push(self, head: int, length: int, i: int = 0) -> None:
        """Complete a chain."""
        lib.mic_vq_push(self.vq[i], head, length)

    def close(self) -> None:
        """Close the view of the kick line."""
        lib.mic_vdev_fini(self.vdev)


class FakeDriver:
    """The card half of a rig."""

    def __init__(self, rig: Rig, *, stop_fd: int = -1, indirect: bool = True) -> None:
        self.rig = rig
        self.vdrv: Any = ffi.new("struct mic_vdrv *")
        rc = lib.mic_vdrv_init(self.vdrv, rig.bus.ptr, rig.bus.irq_fd(0), stop_fd, 0, rig.num_vq)
        check(rc, "vdrv")
        self.dq: list[Any] = [ffi.addressof(self.vdrv.dq, i) for i in range(rig.num_vq)]
        self._indirect = indirect
        self._token = ffi.new("uint64_t *")
        self._len = ffi.new("uint32_t *")
        self.reset()

    def reset(self) -> None:
        """Set all rings up from scratch."""
        rig = self.rig
        for i in range(rig.num_vq):
            table = rig.indirect[i] if self._indirect else 0
            addr = SMPT_BASE + rig.blocks[i]
            rc = lib.mic_dq_init(self.dq[i], rig.bus.ptr, addr, rig.used[i], rig.num, rig.features, table)
            check(rc, f"ring {i}")

    def add(self, readable: Sequence[Seg], writable: Sequence[Seg], token: int = 0, i: int = 0) -> None:
        """Make a chain available. Raises OSError (ENOSPC: the ring is full)."""
        segs = ffi.new("struct mic_seg[]", [*readable, *writable])
        rc = lib.mic_dq_add(self.dq[i], segs, len(readable), len(writable), token)
        if rc < 0:
            raise OSError(-rc, f"ring {i}: {os.strerror(-rc)}")

    def get(self, i: int = 0) -> tuple[int, int] | None:
        """Next completion (token, bytes written), None when there is none; OSError EIO: broken."""
        rc = check(lib.mic_dq_get(self.dq[i], self._token, self._len), f"ring {i}")
        return (int(self._token[0]), int(self._len[0])) if rc else None

    def kick(self, i: int = 0) -> None:
        """Ring the host's doorbell when it wants that."""
        lib.mic_vdrv_kick(self.vdrv, self.dq[i])

    # --- raw access, for tests that break the rules ---

    def desc(self, index: int, addr: int, length: int, flags: int = 0, nxt: int = 0, i: int = 0) -> None:
        """Write descriptor ``index`` as is."""
        row = layout.VRING_DESC.pack(addr=addr, len=length, flags=flags, next=nxt)
        self.rig.bus.host.write(self.rig.blocks[i] + 16 * index, row)

    def table(self, addr: int, rows: Sequence[tuple[int, int, int, int]]) -> None:
        """Write an indirect table of (addr, len, flags, next) into GDDR."""
        for k, (a, n, f, x) in enumerate(rows):
            self.rig.bus.gddr.write(addr + 16 * k, layout.VRING_DESC.pack(addr=a, len=n, flags=f, next=x))

    def offer(self, *heads: int, i: int = 0) -> None:
        """Put raw heads into the available ring and publish them."""
        avail = self.rig.blocks[i] + 16 * self.rig.num
        idx = self.rig.bus.host.load(avail + 2, 2)
        for head in heads:
            self.rig.bus.host.store(avail + 4 + 2 * (idx % self.rig.num), 2, head)
            idx = (idx + 1) & 0xFFFF
        self.rig.bus.host.store(avail + 2, 2, idx)

    def set_avail_idx(self, idx: int, i: int = 0) -> None:
        """Publish an available index, right or wrong."""
        self.rig.bus.host.store(self.rig.blocks[i] + 16 * self.rig.num + 2, 2, idx & 0xFFFF)

    def close(self) -> None:
        """Close the view of the interrupt line."""
        lib.mic_vdrv_fini(self.vdrv)
