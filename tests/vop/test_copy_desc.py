"""COPY_DESC: the byte stream between user elements and chains, both personalities, CPU and DMA."""

from __future__ import annotations

import errno
import mmap
import random
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.bar import drain
from mic_emu.dma import DmaChannel, DmaMemory
from mic_emu.testing.rings import DRIVER_OK, NEEDS_RESET, NEXT, SMPT_BASE, FakeDevice, FakeDriver, Rig, Seg

D = layout.COPY_DESC
BAD = 8  # an address that nobody maps
INFO = lib.mic_vring_size(32)


class Copier:
    """A rig with the copy engine on ring 0; ``dma``: a DMA engine and host channel 0 behind it; ``owner``: a socket whose
    other end makes the copies."""

    def __init__(
        self, *, compat: bool = False, dma: bool = False, timeout_ms: int = 5000, owner: int = 0
    ) -> None:
        self.rig = Rig(32, num_vq=2, host_size=8 << 20)
        self.drv, self.dev = FakeDriver(self.rig), FakeDevice(self.rig)
        self.rig.status = DRIVER_OK
        self.engine = self.chan = None
        setup = ffi.new("struct mic_copy_setup *")
        setup.compat, setup.dma_min, setup.dma_timeout_ms = compat, 1, timeout_ms
        if dma:
            bus = self.rig.bus
            self.engine = lib.mic_dma_engine_start(bus.ptr)
            memory = DmaMemory(self.rig.host_pages, lambda off, size: SMPT_BASE + off)
            self.chan = DmaChannel(bus, 0, memory, ring_size=4096)
            off = self.rig.host_pages.alloc(lib.MIC_COPY_BOUNCE)
            setup.chan, setup.bounce_off, setup.bounce_addr = self.chan._ptr, off, SMPT_BASE + off
        if owner:
            off = self.rig.host_pages.alloc(lib.MIC_COPY_BOUNCE)
            setup.owner, setup.bounce_off, setup.bounce_addr = owner, off, SMPT_BASE + off
        self.ptr: Any = lib.mic_copy_create(self.dev.vdev, 0, setup)
        assert self.ptr != ffi.NULL
        self.base = self.rig.alloc(4 << 20)

    def chain(
        self, readable: list[bytes], writable: list[int], token: int = 0, lead: int = 0, gap: int = 128
    ) -> list[Seg]:
        """Offer one chain; returns its writable segments. ``lead`` shifts every address."""
        at, out, back = self.base + lead, [], []
        for data in readable:
            self.rig.bus.gddr.write(at, data)
            out.append((at, len(data)))
            at += len(data) + gap
        for n in writable:
            back.append((at, n))
            at += n + gap
        self.drv.add(out, back, token)
        return back

    def run(self, *elems: Any, update: bool = False) -> tuple[int, int]:
        """One call: (result, out_len). Elements are cffi buffers, bytearrays or (address, length)."""
        keep = [e if isinstance(e, tuple) else (ffi.from_buffer(e), len(e)) for e in elems]
        iov = ffi.new("struct iovec[]", [(ffi.cast("void *", b), n) for b, n in keep])
        at = int(ffi.cast("uintptr_t", iov))
        arg = ffi.new("char[24]", D.pack(iov=at, iovcnt=len(keep), update_used=int(update), out_len=0))
        rc = lib.mic_copy_desc_run(self.ptr, arg)
        return rc, D.unpack(ffi.buffer(arg))["out_len"]

    def raw(self, iov: int, count: int) -> int:
        """One call with a raw element array address."""
        return int(lib.mic_copy_desc_run(self.ptr, ffi.new("char[24]", D.pack(iov=iov, iovcnt=count))))

    @property
    def published(self) -> tuple[int, int]:
        """(used.idx, info.avail_idx)."""
        return self.rig.bus.gddr.load(self.rig.used[0] + 2, 2), self.rig.bus.host.load(
            self.rig.blocks[0] + INFO, 2
        )

    @property
    def stats(self) -> Any:
        s = ffi.new("struct mic_copy_stats *")
        lib.mic_copy_stats(self.ptr, s)
        return s

    def close(self) -> None:
        lib.mic_copy_destroy(self.ptr)
        if self.chan:
            self.chan.free(5 if self.engine else 0.05)
        if self.engine:
            lib.mic_dma_engine_stop(self.engine)
        self.drv.close()
        self.dev.close()
        self.rig.close()


@pytest.fixture(params=["modern", "compat", "modern-dma", "compat-dma"])
def copier(request: pytest.FixtureRequest) -> Iterator[Copier]:
    c = Copier(compat="compat" in request.param, dma="dma" in request.param)
    yield c
    c.close()


@pytest.fixture
def modern() -> Iterator[Copier]:
    c = Copier()
    yield c
    c.close()


def test_vop_21_nothing_available(copier: Copier) -> None:
    """VOP-21: nothing available is result 0 and out_len 0."""
    assert copier.run(bytearray(10)) == (0, 0)
    assert copier.run(bytearray(10), update=True) == (0, 0)


def test_vop_22_direction_and_borders(copier: Copier) -> None:
    """VOP-22: descriptors give the direction, readable first; borders need not match."""
    back = copier.chain([b"abc", b"defgh"], [4, 3])
    first, second, third = bytearray(5), bytearray(b"...WXYZ"), bytearray(b"12345")
    assert copier.run(first, second, third, update=True) == (0, 15)
    assert (first, second[:3]) == (b"abcde", b"fgh")
    assert copier.rig.bus.gddr.read(*back[0]) == b"WXYZ"
    assert copier.rig.bus.gddr.read(*back[1]) == b"123"


def test_vop_23_three_calls_one_completion(copier: Copier) -> None:
    """VOP-23: header, data and status by three calls complete the chain once, with one notification."""
    back = copier.chain([b"H" * 16, b"D" * 512], [1], token=5)
    head, data = bytearray(16), bytearray(512)
    line = copier.rig.bus.irq_fd(0)
    assert copier.run(head) == (0, 16)
    assert copier.run(data) == (0, 512)
    assert copier.published == (0, 0)
    drain(line)
    assert copier.run(bytearray(b"\x07"), update=True) == (0, 1)
    assert copier.published == (1, 1)
    assert copier.dev.vdev.interrupts == 1
    assert copier.drv.get() == (5, 1)
    assert copier.drv.get() is None
    assert (head, data) == (b"H" * 16, b"D" * 512)
    assert copier.rig.bus.gddr.read(*back[0]) == b"\x07"


def test_vop_24_without_update_used(copier: Copier) -> None:
    """VOP-24: update_used 0 moves neither used.idx nor info.avail_idx."""
    copier.chain([b"x" * 100], [])
    assert copier.run(bytearray(40)) == (0, 40)
    assert copier.published == (0, 0)


@pytest.mark.parametrize(("compat", "want"), [(False, 20), (True, 120)])
def test_vop_25_used_len(compat: bool, want: int) -> None:
    """VOP-25: used.len counts both directions in compat mode, only what was written in modern mode."""
    c = Copier(compat=compat)
    c.chain([b"r" * 100], [50])
    assert c.run(bytearray(120), update=True) == (0, 120)
    assert c.rig.bus.gddr.load(c.rig.used[0] + 8, 4) == want
    c.close()


def test_vop_26_nothing_moved_completes_nothing(copier: Copier) -> None:
    """VOP-26: update_used in a call that moves no byte completes nothing."""
    copier.chain([b"x" * 10], [])
    assert copier.run(bytearray(4))[1] == 4
    assert copier.run(bytearray(0), update=True)[1] == 0
    assert copier.published == (0, 0)
    assert copier.run(bytearray(6), update=True) == (0, 6)
    assert copier.published == (1, 1)


def test_vop_27_surplus_and_early_completion(copier: Copier) -> None:
    """VOP-27: surplus user space is ignored; completing early drops the rest of the chain."""
    copier.chain([b"x" * 10], [], token=1)
    big = bytearray(b"." * 100)
    assert copier.run(big, update=True) == (0, 10)
    assert big == b"x" * 10 + b"." * 90
    copier.chain([b"y" * 10], [], token=2)
    copier.chain([b"z" * 10], [], token=3)
    assert copier.run(bytearray(3), update=True) == (0, 3)
    rest = bytearray(10)
    assert copier.run(rest, update=True) == (0, 10)
    assert [copier.drv.get()[0] for _ in range(3)] == [1, 2, 3]  # type: ignore[index]


@pytest.mark.parametrize(("compat", "want"), [(True, 1), (False, 0)])
def test_no_elements_fetch_a_chain(compat: bool, want: int) -> None:
    """VOP 6.4: without elements compat answers the fetch result once, modern 0; the chain is held."""
    c = Copier(compat=compat)
    assert c.run() == (0, 0)
    c.chain([b"abc"], [])
    assert c.run() == (want, 0)
    assert c.run() == (0, 0)
    got = bytearray(3)
    assert c.run(got, update=True) == (0, 3)
    assert got == b"abc"
    c.close()


def test_chain_consumed_without_completion(modern: Copier) -> None:
    """Modern: a chain consumed whole and never completed comes back with the next fetch, not never."""
    modern.chain([b"a"], [4], token=1)
    modern.chain([b"b"], [], token=2)
    assert modern.run(bytearray(5)) == (0, 5)
    assert modern.run(bytearray(1), update=True) == (0, 1)
    assert [modern.drv.get(), modern.drv.get()] == [(1, 4), (2, 0)]


@pytest.mark.parametrize("lead", [0, 1, 31, 63])
@pytest.mark.parametrize("dma", [False, True])
@pytest.mark.parametrize("compat", [False, True])
def test_vop_30_every_alignment_beyond_64k(lead: int, dma: bool, compat: bool) -> None:
    """VOP-30: transfers over 64 KiB at every alignment are byte exact; nothing outside changes."""
    c = Copier(compat=compat, dma=dma)
    rng = random.Random(lead)
    for size in (1, 63, 64, 65, 4096 + lead, 65536 - lead, 65536, 200000 + lead):
        data, reply = rng.randbytes(size), rng.randbytes(size)
        c.rig.bus.gddr.write(c.base, b"\x55" * (3 * size + 1024))
        (addr, n), *_ = c.chain([data], [size], lead=lead)
        got = bytearray(size + 16)
        assert c.run((ffi.from_buffer(got), size), bytearray(reply), update=True) == (0, 2 * size)
        assert bytes(got) == data + bytes(16)
        assert c.rig.bus.gddr.read(addr, n) == reply
        assert c.rig.bus.gddr.read(addr - 128, 128) == b"\x55" * 128
        assert c.rig.bus.gddr.read(addr + n, 256) == b"\x55" * 256
    if dma:
        assert c.stats.in_bytes_dma > 0
    c.close()


@settings(max_examples=60, deadline=None)
@given(
    readable=st.lists(st.integers(1, 3000), max_size=5),
    writable=st.lists(st.integers(1, 3000), max_size=5),
    cuts=st.lists(st.integers(0, 2000), min_size=1, max_size=12),
    compat=st.booleans(),
)
def test_vop_22_any_borders(readable: list[int], writable: list[int], cuts: list[int], compat: bool) -> None:
    """VOP-22: any cutting of elements and descriptors is the same byte stream."""
    if not readable and not writable:
        return
    c = Copier(compat=compat)
    try:
        rng = random.Random(1)
        parts = [rng.randbytes(n) for n in readable]
        back = c.chain(parts, writable, gap=3)
        total, rest = sum(readable) + sum(writable), sum(readable) + sum(writable)
        stream = rng.randbytes(total)
        seen, at = b"", 0
        while rest:
            n = min(cuts[at % len(cuts)] + 1, rest)
            elem = bytearray(stream[total - rest : total - rest + n])
            rest -= n
            assert c.run(elem, update=not rest) == (0, n)
            seen += bytes(elem)
            at += 1
        assert seen[: sum(readable)] == b"".join(parts)
        assert b"".join(c.rig.bus.gddr.read(*s) for s in back) == stream[sum(readable) :]
        assert c.drv.get() is not None
    finally:
        c.close()


def test_vop_31_counters() -> None:
    """VOP-31: bytes by direction and engine, and why the CPU copied."""
    c = Copier(dma=True)
    c.chain([b"x" * 200], [128, 100], lead=1)  # everything unaligned
    assert c.run(bytearray(428), update=True) == (0, 428)
    s = c.stats
    assert (s.in_bytes, s.in_bytes_dma, s.out_bytes, s.out_bytes_dma) == (200, 201, 228, 0)
    assert (s.tx_dst_unaligned, s.tx_len_unaligned) == (228, 0)
    c.drv.get()
    c.chain([], [100])
    assert c.run(bytearray(100), update=True) == (0, 100)
    s = c.stats
    assert (s.out_bytes, s.out_bytes_dma, s.tx_len_unaligned) == (328, 64, 36)
    c.close()


@pytest.mark.parametrize(("compat", "want"), [(True, 3), (False, -errno.EIO)])
def test_vop_32_stuck_dma(compat: bool, want: int) -> None:
    """VOP-32: a DMA that does not move ends the call in time: 3 on the real stack, EIO in modern mode."""
    c = Copier(compat=compat, dma=True, timeout_ms=50)
    lib.mic_dma_engine_stop(c.engine)
    c.engine = None
    c.chain([b"x" * 4096], [])
    assert c.run(bytearray(4096), update=True)[0] == want
    assert c.stats.dma_errors == 1
    assert c.published == (0, 0)
    c.close()


class Storm:
    """Signals to this thread, one after the other, while it is in here."""

    PAUSE_S, MOST = 0.02, 500

    def __enter__(self) -> Storm:
        self.was = signal.signal(signal.SIGUSR2, lambda *_: None)
        self.over, self.count, self.target = threading.Event(), 0, threading.get_ident()
        self.sender = threading.Thread(target=self._send)
        self.sender.start()
        return self

    def _send(self) -> None:
        while self.count < self.MOST and not self.over.wait(self.PAUSE_S):
            self.count += 1
            signal.pthread_kill(self.target, signal.SIGUSR2)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.sender.join()
        signal.signal(signal.SIGUSR2, self.was)


def test_vop_32_an_owner_that_hangs_under_signals() -> None:
    """The limit is one of time: a signal that comes before it does not start it again."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        c = Copier(timeout_ms=100, owner=theirs.fileno())
        c.chain([b"x" * 256], [])
        with Storm() as storm:
            assert c.run(bytearray(256)) == (-errno.EIO, 0)
        assert 0 < storm.count < storm.MOST
        c.close()


def test_vop_32_an_owner_that_takes_nothing() -> None:
    """More copies than the socket holds: each ends at its limit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        c = Copier(timeout_ms=1, owner=theirs.fileno())
        c.chain([b"x" * 256], [])
        assert {c.run(bytearray(256)) for _ in range(40)} == {(-errno.EIO, 0)}
        c.close()


def test_vop_40_bad_user_memory(copier: Copier) -> None:
    """VOP-40: an unreadable element array is EINVAL; a bad buffer, argument or out_len is EFAULT."""
    copier.chain([b"x" * 10], [10])
    assert copier.raw(BAD, 1) == -errno.EINVAL
    assert copier.run((BAD, 10))[0] == -errno.EFAULT
    assert lib.mic_copy_desc_run(copier.ptr, ffi.cast("void *", BAD)) == -errno.EFAULT
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ) as page:  # zeros: no elements, so all goes well but out_len
        assert lib.mic_copy_desc_run(copier.ptr, ffi.from_buffer(page)) == -errno.EFAULT
    got = bytearray(10)
    assert copier.run(got) == (0, 10)
    assert got == b"x" * 10
    assert copier.run((BAD, 10), update=True)[0] == -errno.EFAULT
    assert copier.published == (0, 0)


def test_completion_after_a_fault_with_bytes_moved(copier: Copier) -> None:
    """VOP 6.4 step 5: with update_used the chain completes also after an error, if bytes had moved."""
    copier.chain([b"x" * 10], [])
    assert copier.run(bytearray(4), (BAD, 6), update=True)[0] == -errno.EFAULT
    assert copier.published == (1, 1)


def test_vop_40_ring_index() -> None:
    """VOP-40: a ring that the device has not is EINVAL."""
    rig = Rig(32, num_vq=1)
    dev = FakeDevice(rig)
    setup = ffi.new("struct mic_copy_setup *")
    assert lib.mic_copy_create(dev.vdev, 1, setup) == ffi.NULL
    assert ffi.errno == errno.EINVAL
    dev.close()
    rig.close()


def test_no_status_is_enodev(copier: Copier) -> None:
    """VOP 6.4: status 0 is ENODEV; so is a removed device (VOP-55)."""
    copier.chain([b"x"], [])
    copier.rig.status = 0
    assert copier.run(bytearray(1))[0] == -errno.ENODEV
    copier.rig.status = 1
    assert copier.run(bytearray(1)) == (0, 1)
    lib.mic_copy_remove(copier.ptr)
    assert copier.run(bytearray(1))[0] == -errno.ENODEV


def test_vop_44_broken_ring_then_eio_until_reset(copier: Copier) -> None:
    """VOP-44, VOP 11: ELOOP once, NEEDS_RESET set, EIO until the reset; then it works again."""
    copier.drv.desc(0, copier.base, 4, NEXT, 0)
    copier.drv.offer(0)
    assert copier.run(bytearray(8))[0] == -errno.ELOOP
    assert copier.rig.status & NEEDS_RESET
    assert copier.run(bytearray(8))[0] == -errno.EIO
    copier.drv.reset()
    copier.dev.reset()
    lib.mic_copy_reset(copier.ptr)
    copier.chain([b"ok"], [])
    got = bytearray(2)
    assert copier.run(got, update=True) == (0, 2)
    assert got == b"ok"


def test_vop_57_reset_forgets_half_a_chain(copier: Copier) -> None:
    """VOP-57: after a reset no byte of the half consumed chain is touched."""
    back = copier.chain([b"old" * 100], [300])
    assert copier.run(bytearray(350)) == (0, 350)
    before = copier.rig.bus.gddr.read(*back[0])
    copier.drv.reset()
    copier.dev.reset()
    lib.mic_copy_reset(copier.ptr)
    assert copier.run(bytearray(b"!" * 250), update=True) == (0, 0)
    assert copier.rig.bus.gddr.read(*back[0]) == before
    assert copier.published == (0, 0)


def test_vop_55_removal_waits_for_the_copy() -> None:
    """VOP-55: removal waits for a running copy; the copies after it get ENODEV."""
    c = Copier(dma=True, timeout_ms=300)
    lib.mic_dma_engine_stop(c.engine)  # a copy now runs until its time-out
    c.engine = None
    c.chain([b"x" * 4096], [])
    results: list[tuple[int, int]] = []
    t = threading.Thread(target=lambda: results.append(c.run(bytearray(4096))))
    t.start()
    while not c.rig.bus.read("dhpr", 0):
        pass
    lib.mic_copy_remove(c.ptr)
    assert c.run(bytearray(1))[0] == -errno.ENODEV
    t.join(5)
    assert results[0][0] == -errno.EIO
    c.close()


def test_vop_51_descriptors_changed_during_a_copy(modern: Copier) -> None:
    """VOP-51: a card that rewrites descriptors during the copy changes nothing: they were read once."""
    back = modern.chain([b"r" * 8], [8])
    assert modern.run(bytearray(4)) == (0, 4)
    for k in range(3):
        modern.drv.desc(k, 1 << 40, 0xFFFFFFFF, NEXT, k)
    assert modern.run(bytearray(b"....WWWWWWWW"), update=True) == (0, 12)
    assert modern.rig.bus.gddr.read(*back[0]) == b"WWWWWWWW"
    assert modern.dev.vq[0].error == 0
