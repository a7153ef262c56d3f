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
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.memory import PAGE, PageAllocator, View
from mic_emu.scif.errors import ScifError

QP_MAGIC: int = layout.CONSTANTS["SCIF_QP_MAGIC"]
NODE_RING: int = layout.CONSTANTS["SCIF_NODE_RING"]
EP_RING: int = layout.CONSTANTS["SCIF_EP_RING"]
EP_CAPACITY: int = layout.CONSTANTS["SCIF_EP_CAPACITY"]

_QPAGE, _CTL = ffi.typeof("struct mic_scif_qpage *"), ffi.typeof("struct mic_scif_ctl *")
_TX, _RX = ffi.typeof("struct mic_scif_tx *"), ffi.typeof("struct mic_scif_rx *")
SHORT = 64  # bytes: room for a node message
OwnAddr = Callable[[int], int]
PeerView = Callable[[int, int], View]


class QueuePair:
    """Our half: where it lies in our memory. The control page, if any, follows the ring.

    ``page``, ``control``: C pointers, ``struct mic_scif_qpage *`` and ``struct mic_scif_ctl *``.
    """

    __slots__ = ("allocator", "control", "memory", "offset", "page", "ring_offset", "ring_size")

    def __init__(self, memory: View, allocator: PageAllocator, offset: int, ring_size: int) -> None:
        self.memory = memory
        self.allocator = allocator
        self.offset = offset
        self.ring_size = ring_size
        self.ring_offset = offset + PAGE
        base = memory.pointer + offset
        self.page: Any = ffi.cast(_QPAGE, base)
        self.control: Any = ffi.cast(_CTL, base + PAGE + ring_size)

    @classmethod
    def create(
        cls, memory: View, allocator: PageAllocator, ring_size: int, own_addr: OwnAddr, extra: int = 0
    ) -> QueuePair:
        """Allocate and initialise. Raises OutOfNodeMemory (ENOMEM)."""
        qp = cls.reserve(memory, allocator, ring_size, extra)
        qp.publish(own_addr)
        return qp

    @classmethod
    def reserve(cls, memory: View, allocator: PageAllocator, ring_size: int, extra: int = 0) -> QueuePair:
        """The pages only, all zero. Raises OutOfNodeMemory (ENOMEM)."""
        return cls(memory, allocator, allocator.alloc(PAGE + ring_size + extra), ring_size)

    def wipe(self) -> None:
        """Nothing of a connection is left in an endpoint's queue pair, ring and control page."""
        lib.mic_scif_qp_wipe(self.page, PAGE + self.ring_size + PAGE)

    def publish(self, own_addr: OwnAddr) -> None:
        """Whoever finds the page, all zero so far, may attach."""
        lib.mic_scif_qp_init(self.page, own_addr(self.ring_offset), own_addr(self.offset))

    def announce(self, notify_addr: int, slot: int) -> None:
        """Tell the peer how to reach our notify page, and our slot in it."""
        lib.mic_scif_qp_notify(self.page, notify_addr, slot)

    @property
    def capacity(self) -> int:
        """Bytes that fit into the ring: without a reader, of an endpoint's."""
        return EP_CAPACITY if self.ring_size == EP_RING else self.ring_size - 1

    def invalidate(self) -> None:
        """Nobody may attach any more."""
        lib.mic_scif_qp_invalid(self.page)

    def end(self) -> None:
        """Its endpoint is closed: nobody may attach, and its programs look no further."""
        self.invalidate()
        self.control.sid = 0

    def free(self) -> None:
        """Give the pages back."""
        self.invalidate()
        self.allocator.free(self.offset)


class Rings:
    """Both ring ends between our queue pair and an attached peer's. Errors are ScifError EPROTO."""

    def __init__(self, own: QueuePair, peer_page: Any, peer_ring: View) -> None:
        self._keep = (own, peer_ring)
        self.peer_page = peer_page
        self.tx: Any = ffi.new(_TX)
        self.rx: Any = ffi.new(_RX)
        self._short = ffi.new("char[]", SHORT)
        lib.mic_scif_rings_init(
            self.tx, self.rx, own.page, peer_page, peer_ring.pointer, own.ring_size, own.capacity
        )

    def drained(self) -> None:
        """A kernel client has read everything: programs notify it again for the next bytes. Before it waits it
        looks once more: what came between its last look and this was not announced."""
        lib.mic_scif_kernel_drained(self.peer_page)

    def want_room(self) -> None:
        """A kernel client wants room: a program that reads from now on notifies it. Look again, as above."""
        lib.mic_scif_kernel_wants_room(self.peer_page)

    def room(self) -> int:
        """Bytes that can be sent now."""
        return _check(lib.mic_scif_tx_room(self.tx))

    def used(self) -> int:
        """Bytes that can be received now."""
        return _check(lib.mic_scif_rx_used(self.rx))

    def put(self, data: bytes | bytearray | memoryview) -> bool:
        """Send all of ``data`` and publish it; False when there is no room for all of it."""
        rc = lib.mic_scif_tx_send(self.tx, data if type(data) is bytes else ffi.from_buffer(data), len(data))
        if rc == -errno.EAGAIN:
            return False
        _check(rc)
        return True

    def get(self, length: int) -> bytes | None:
        """Take exactly ``length`` bytes and release them; None when fewer are there."""
        out = self._short if length <= SHORT else ffi.new("char[]", length)
        rc = lib.mic_scif_rx_take(self.rx, out, length)
        if rc == -errno.EAGAIN:
            return None
        _check(rc)
        data: bytes = ffi.unpack(out, length)
        return data

    def take(self, length: int) -> bytes:
        """Up to ``length`` bytes, b"" when there are none; releases them."""
        n = min(self.used(), length)
        return (self.get(n) or b"") if n else b""


class Attachment:
    """The peer's queue pair, once it was checked."""

    __slots__ = ("_own", "_ring", "_rings", "addr", "page", "ring_addr")

    def __init__(self, own: QueuePair, page: Any, addr: int, ring: View, ring_addr: int) -> None:
        self.page = page  # struct mic_scif_qpage *
        self.addr, self.ring_addr = addr, ring_addr  # bus addresses
        self._own, self._ring = own, ring
        self._rings: Rings | None = None

    @property
    def rings(self) -> Rings:
        """Ring ends for code in this process; programs have their own."""
        if self._rings is None:
            self._rings = Rings(self._own, self.page, self._ring)
        return self._rings


def attach(own: QueuePair, peer_addr: int, peer_view: PeerView) -> Attachment:
    """Attach to the peer's queue pair at bus address ``peer_addr``.

    Raises ScifError EIO when it is not one: outside memory, bad magic, bad ring address; ECANCELED
    when its owner has released it.
    """
    try:
        page = ffi.cast(_QPAGE, peer_view(peer_addr, PAGE).pointer)
        magic = lib.mic_scif_qp_magic(page)
        if magic == 0:
            raise ScifError(errno.ECANCELED, f"the queue pair at {peer_addr:#x} was released")
        if magic != QP_MAGIC:
            raise ScifError(errno.EIO, f"no queue pair at {peer_addr:#x}")
        ring_addr = int(page.local_buf)
        if ring_addr % PAGE or peer_addr % PAGE:
            raise ScifError(errno.EIO, f"misaligned queue pair at {peer_addr:#x}")
        ring = peer_view(ring_addr, own.ring_size)
    except IndexError as e:
        raise ScifError(errno.EIO, str(e)) from None
    own.page.remote_qp, own.page.remote_buf = peer_addr, ring_addr
    return Attachment(own, page, peer_addr, ring, ring_addr)


def _check(rc: int) -> int:
    if rc < 0:
        raise ScifError(-rc, "the peer's ring index is not an offset")
    return rc
