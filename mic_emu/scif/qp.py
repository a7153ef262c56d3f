"""Queue pairs in shared memory: the bytes of SCIF 3.2 and the two ring ends over them.

A queue pair lies in its owner's memory, one page, followed by its receive ring; an endpoint's has
a third part, the control page, which only the owner's side ever maps. Of an endpoint's ring a sender
fills 4095 bytes, and more only while a program waits in recv for more (native/libscif/data.c). The peer writes into the
ring and into two words of the queue pair: the write index of what it sent, the read index of what
it consumed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.layout import SCIF_QP
from mic_emu.memory import PAGE, PageAllocator, View
from mic_emu.scif.errors import ScifError

QP_MAGIC: int = layout.CONSTANTS["SCIF_QP_MAGIC"]
NODE_RING: int = layout.CONSTANTS["SCIF_NODE_RING"]
EP_RING: int = layout.CONSTANTS["SCIF_EP_RING"]
EP_CAPACITY: int = layout.CONSTANTS["SCIF_EP_CAPACITY"]
QP_OFFLINE, QP_ONLINE = 0xDEAD, 0xC0DE

OwnAddr = Callable[[int], int]
PeerView = Callable[[int, int], View]


@dataclass
class QueuePair:
    """Our half: where it lies in our memory. ``extra`` bytes follow the ring (the control page)."""

    memory: View
    allocator: PageAllocator
    offset: int
    ring_size: int

    @classmethod
    def create(
        cls, memory: View, allocator: PageAllocator, ring_size: int, own_addr: OwnAddr, extra: int = 0
    ) -> QueuePair:
        """Allocate and initialise. Raises OutOfNodeMemory (ENOMEM)."""
        off = allocator.alloc(PAGE + ring_size + extra)
        qp = cls(memory, allocator, off, ring_size)
        SCIF_QP.put(memory, off, "local_buf", own_addr(qp.ring_offset))
        SCIF_QP.put(memory, off, "local_qp", own_addr(off))
        SCIF_QP.put(memory, off, "qp_state", QP_OFFLINE)
        SCIF_QP.put(memory, off, "magic", QP_MAGIC)
        return qp

    @property
    def ring_offset(self) -> int:
        """Offset of the receive ring in our memory."""
        return self.offset + PAGE

    @property
    def capacity(self) -> int:
        """Bytes that fit into the ring: without a reader, of an endpoint's."""
        return EP_CAPACITY if self.ring_size == EP_RING else self.ring_size - 1

    @property
    def control_offset(self) -> int:
        """Offset of the control page in our memory."""
        return self.offset + PAGE + self.ring_size

    @property
    def page(self) -> Any:
        """The queue pair page as ``struct mic_scif_qpage *``."""
        return ffi.cast("struct mic_scif_qpage *", self.memory.pointer + self.offset)

    @property
    def control(self) -> Any:
        """The control page as ``struct mic_scif_ctl *``."""
        return ffi.cast("struct mic_scif_ctl *", self.memory.pointer + self.control_offset)

    def invalidate(self) -> None:
        """Nobody may attach any more."""
        SCIF_QP.put(self.memory, self.offset, "magic", 0)

    def free(self) -> None:
        """Give the pages back."""
        self.invalidate()
        self.allocator.free(self.offset)


class Rings:
    """Both ring ends between our queue pair and an attached peer's. Errors are ScifError EPROTO."""

    def __init__(self, own: QueuePair, peer_qp: View, peer_ring: View) -> None:
        size = own.ring_size
        base = own.memory.pointer
        self._keep = (own, peer_qp, peer_ring)
        self.peer_page: Any = ffi.cast("struct mic_scif_qpage *", peer_qp.pointer)
        u32 = "uint32_t *"
        self.tx: Any = ffi.new("struct mic_scif_tx *")
        self.tx.buf = peer_ring.pointer
        self.tx.windex = ffi.cast(u32, peer_qp.pointer + SCIF_QP.off("local_write"))
        self.tx.rindex = ffi.cast(u32, base + own.offset + SCIF_QP.off("local_read"))
        self.tx.size = size
        self.tx.limit = own.capacity
        self.rx: Any = ffi.new("struct mic_scif_rx *")
        self.rx.buf = base + own.ring_offset
        self.rx.windex = ffi.cast(u32, base + own.offset + SCIF_QP.off("local_write"))
        self.rx.rindex = ffi.cast(u32, peer_qp.pointer + SCIF_QP.off("local_read"))
        self.rx.size = size

    def drained(self) -> None:
        """A kernel client has read everything: programs notify it again for the next bytes."""
        lib.mic_scif_kernel_drained(self.peer_page)

    def want_room(self) -> None:
        """A kernel client waits for room: a program that reads notifies it."""
        lib.mic_scif_kernel_wants_room(self.peer_page)

    def room(self) -> int:
        """Bytes that can be sent now."""
        return _check(lib.mic_scif_tx_room(self.tx))

    def used(self) -> int:
        """Bytes that can be received now."""
        return _check(lib.mic_scif_rx_used(self.rx))

    def put(self, data: bytes | bytearray | memoryview) -> bool:
        """Send all of ``data`` and publish it; False when there is no room for all of it."""
        rc = lib.mic_scif_tx_put(self.tx, ffi.from_buffer(data), len(data))
        if rc == -errno.EAGAIN:
            return False
        _check(rc)
        lib.mic_scif_tx_commit(self.tx)
        return True

    def get(self, length: int) -> bytes | None:
        """Take exactly ``length`` bytes and release them; None when fewer are there."""
        out = ffi.new("uint8_t[]", length)
        rc = lib.mic_scif_rx_get(self.rx, out, length)
        if rc == -errno.EAGAIN:
            return None
        _check(rc)
        lib.mic_scif_rx_release(self.rx)
        return bytes(ffi.buffer(out, length))


def attach(own: QueuePair, peer_addr: int, peer_view: PeerView) -> Rings:
    """Attach to the peer's queue pair at bus address ``peer_addr``.

    Raises ScifError EIO when it is not one: outside memory, bad magic, bad ring address; ECANCELED
    when its owner has released it.
    """
    try:
        peer_qp = peer_view(peer_addr, PAGE)
        magic = SCIF_QP.get(peer_qp, 0, "magic")
        if magic == 0:
            raise ScifError(errno.ECANCELED, f"the queue pair at {peer_addr:#x} was released")
        if magic != QP_MAGIC:
            raise ScifError(errno.EIO, f"no queue pair at {peer_addr:#x}")
        ring_addr = SCIF_QP.get(peer_qp, 0, "local_buf")
        if ring_addr % PAGE or peer_addr % PAGE:
            raise ScifError(errno.EIO, f"misaligned queue pair at {peer_addr:#x}")
        peer_ring = peer_view(ring_addr, own.ring_size)
    except IndexError as e:
        raise ScifError(errno.EIO, str(e)) from None
    SCIF_QP.put(own.memory, own.offset, "remote_qp", peer_addr)
    SCIF_QP.put(own.memory, own.offset, "remote_buf", ring_addr)
    return Rings(own, peer_qp, peer_ring)


def _check(rc: int) -> int:
    if rc < 0:
        raise ScifError(-rc, "the peer's ring index is not an offset")
    return rc
