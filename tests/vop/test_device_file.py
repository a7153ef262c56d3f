"""The character device as an object: VOP-5, 19, 20, 29, 31, 33 to 43, 54, 55 by ioctl, poll and mmap."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from life import DESC, TYPE, VERSION_1, VQ, C, Life, ProbeDriver, until

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.host.vop_files import VopFiles
from mic_emu.testing.machine import Machine, eventually
from mic_emu.vop import device_file
from mic_emu.vop.device_file import ADD_DEVICE, CONFIG_CHANGE, COPY_DESC, COUNTERS, DeviceFile
from mic_emu.vop.device_page import ring_magic, vring_size
from mic_emu.wire import Channel
from mic_emu.wire_aio import AsyncChannel

EINVAL, ENODEV, EFAULT = errno.EINVAL, errno.ENODEV, errno.EFAULT


def block(kind: int = TYPE, num_vq: int = 1, num: int = 8, features: int = VERSION_1, config: bytes = b"",
          feature_len: int = 8) -> bytearray:  # fmt: skip
    """The argument of ADD_DEVICE (VOP 6.3)."""
    header = DESC.pack(type=kind, num_vq=num_vq, feature_len=feature_len, config_len=len(config))
    words = (features & ((1 << 8 * feature_len) - 1)).to_bytes(feature_len, "little") + bytes(feature_len)
    return bytearray(header + VQ.pack(num=num & 0xFFFF) * num_vq + words + config)


class Lab:
    """Host and card roles in a loop of their own thread; files are opened from the test's thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.life = Life()
        self.files: VopFiles
        self.call(self._start())
        self._served: list[Any] = []
        self.host_end: socket.socket  # of the last file's channel

    async def _start(self) -> None:
        self.files = VopFiles(self.life.host, "modern", self.life.log)
        await self.life.card.start()

    def call(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Run something in the loop."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result(20)

    def open(self) -> DeviceFile:
        """One more open file."""
        ours, theirs = socket.socketpair()
        self.host_end = theirs

        async def serve() -> None:
            task = asyncio.ensure_future(self.files.serve(AsyncChannel(theirs)))
            self._served.append(task)

        self.call(serve())
        return DeviceFile(Channel(ours))

    def added(self, **shape: Any) -> DeviceFile:
        """A file with a device that the card drives."""
        f = self.open()
        f.ioctl(ADD_DEVICE, block(**shape))
        eventually(lambda: self.status(f) & C["VIRTIO_DRIVER_OK"], 30, "DRIVER_OK")
        self.call(until(lambda: not self.life.card._scan_lock.locked(), "the card's last word"))
        return f

    def status(self, f: DeviceFile) -> int:
        return DESC.get(self.life.page, f.slot_offset, "status")

    def driver(self) -> ProbeDriver:
        """The card's driver of the last device."""
        return self.life.probed[-1]

    def offer(self, readable: list[bytes], writable: list[int]) -> list[int]:
        """The card makes one chain available and kicks; returns the addresses of its writable segments."""
        dev = self.driver().dev
        assert dev
        segments, back = [], []
        for data in readable:
            at = self.life.gddr.alloc(max(1, len(data)))
            self.life.bus.gddr.write(at, data)
            segments.append((at, len(data)))
        for n in writable:
            back.append(self.life.gddr.alloc(n))
            segments.append((back[-1], n))
        dq = ffi.addressof(dev.vdrv.dq, 0)
        assert lib.mic_dq_add(dq, ffi.new("struct mic_seg[]", segments), len(readable), len(writable), 1) == 0
        dev.kick()
        return back

    def close(self) -> None:
        self.call(self.files.close())
        self.call(self.life.host.close())
        self.call(self._drain())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        self.life.__exit__()
        self.loop.close()

    async def _drain(self) -> None:
        self.files._closing = True
        for task in self._served:
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def number(call: Callable[[], Any]) -> int:
    """errno of a call that must fail."""
    with pytest.raises(OSError) as e:
        call()
    return int(e.value.errno or 0)


def result(call: Callable[[], Any]) -> int:
    """0, or the errno of a call that may fail."""
    try:
        call()
    except OSError as e:
        return int(e.errno or 0)
    return 0


class Copy:
    """A struct mic_copy_desc with its elements."""

    def __init__(self, *elements: bytearray, ring: int = 0, update: bool = False) -> None:
        self.elements = elements
        self._keep = [ffi.from_buffer(e) for e in elements]
        self._iov = ffi.new("struct iovec[]", [(ffi.cast("void *", k), len(k)) for k in self._keep])
        at = int(ffi.cast("uintptr_t", self._iov))
        self.arg = bytearray(
            L.COPY_DESC.pack(iov=at, iovcnt=len(elements), vr_idx=ring, update_used=int(update))
        )

    @property
    def out_len(self) -> int:
        return L.COPY_DESC.unpack(bytes(self.arg))["out_len"]


def test_vop_05_numbers() -> None:
    """VOP-5: the three ioctl numbers, whose size field is a pointer's."""
    assert (ADD_DEVICE, COPY_DESC, CONFIG_CHANGE) == (0xC0087301, 0xC0087302, 0xC0087305)
    assert all(n >> 16 & 0x3FFF == 8 and n >> 30 == 3 for n in (ADD_DEVICE, COPY_DESC, CONFIG_CHANGE))


def test_vop_23_29_31_a_request_from_kick_to_completion(lab: Lab) -> None:
    """Poll wakes once per doorbell, COPY_DESC moves both directions, counters and used ring follow."""
    with lab.added(num=8) as f:
        while f.poll(0.05):
            pass
        (answer,) = lab.offer([b"question"], [6])
        assert f.poll(20) == select.POLLIN | select.POLLOUT
        assert f.poll(0) == 0  # VOP-29: one wake per edge, though a chain is pending
        text, reply = bytearray(8), bytearray(b"answer")
        copy = Copy(text, reply, update=True)
        assert f.ioctl(COPY_DESC, copy.arg) == 0
        assert (text, copy.out_len) == (b"question", 14)
        assert lab.life.bus.gddr.read(answer, 6) == b"answer"
        counters = f.counters(0)
        assert (counters["in_bytes"], counters["out_bytes"]) == (8, 6)
        empty = Copy(bytearray(8))
        assert f.ioctl(COPY_DESC, empty.arg) == 0  # VOP-21
        assert empty.out_len == 0


def test_vop_21_no_rings_yet(lab: Lab) -> None:
    """VOP-21: with a status and no rings of the card yet, COPY_DESC finds nothing and the device is not broken."""
    with lab.open() as f:
        f.ioctl(ADD_DEVICE, block(kind=TYPE + 1))  # nobody drives it
        eventually(lambda: lab.status(f) == C["VIRTIO_ACKNOWLEDGE"], 30, "ACKNOWLEDGE")
        for _ in range(2):
            copy = Copy(bytearray(8), update=True)
            assert f.ioctl(COPY_DESC, copy.arg) == 0
            assert copy.out_len == 0
        assert lab.status(f) == C["VIRTIO_ACKNOWLEDGE"]


def test_vop_57_reset_forgets_chains_that_wait(lab: Lab) -> None:
    """VOP-57: after a reset, whatever the status, neither the half consumed chain nor the one behind it is served."""
    with lab.added() as f:
        answers = [*lab.offer([b"first"], [4]), *lab.offer([b"second"], [4])]
        head = Copy(bytearray(3))
        assert f.ioctl(COPY_DESC, head.arg) == 0
        assert head.out_len == 3
        dev = lab.driver().dev
        assert dev
        lab.call(dev.reset())
        dev.add_status(C["VIRTIO_ACKNOWLEDGE"])
        mine = bytearray(b"." * 16)
        copy = Copy(mine, update=True)
        assert f.ioctl(COPY_DESC, copy.arg) == 0
        assert (copy.out_len, mine) == (0, b"." * 16)
        assert [lab.life.bus.gddr.read(at, 4) for at in answers] == [bytes(4)] * 2
        assert lab.status(f) == C["VIRTIO_ACKNOWLEDGE"]


def test_vop_31_host_knows_the_counters(lab: Lab) -> None:
    """VOP-31: the host asks each file for its bytes; one whose process hangs is left out, and asked again later."""
    with lab.added() as f, lab.open():
        (device,) = lab.life.host.devices
        assert lab.call(lab.files.counters(5.0)) == {id(device): f.counters(0)}
        lab.offer([b"abc"], [8])
        assert f.poll(5)
        copy = Copy(bytearray(5), update=True)
        f.ioctl(COPY_DESC, copy.arg)
        assert copy.out_len == 5
        want = dict.fromkeys(COUNTERS, 0) | {"in_bytes": 3, "out_bytes": 2}
        assert lab.call(lab.files.counters(5.0)) == {id(device): want}
        with f._rings, f._sending:  # it cannot answer
            assert lab.call(lab.files.counters(0.05)) == {}
        assert lab.call(lab.files.counters(5.0)) == {id(device): want}


def test_vop_33_34_35_refused_blocks(lab: Lab) -> None:
    """VOP-33 to 35: what the driver refuses leaves the page as it was, and the file can try again."""
    before = lab.life.page.read(24, 4072)
    with lab.open() as f:
        wrong: list[bytearray] = [
            block(num_vq=5),
            block(config=bytes(220)),
            block(num_vq=0),
            block(kind=0),
            block(kind=-1),
        ]
        wrong += [block(num=n) for n in (0, 3, 129, 256, 65535)]
        wrong += [block(feature_len=0)]
        mixed = block(num_vq=2)
        mixed[8 + 24 + 16] = 16  # ring 1 has other entries than ring 0
        for arg in [*wrong, mixed]:
            assert number(lambda arg=arg: f.ioctl(ADD_DEVICE, arg)) == EINVAL  # type: ignore[misc]
        assert lab.life.page.read(24, 4072) == before
        assert f.ioctl(ADD_DEVICE, block()) == 0


def test_vop_36_header_that_changes(lab: Lab) -> None:
    """VOP-36: a header that another thread changes is EINVAL or taken whole, never a mixture."""
    first, second = block(config=b"a" * 8), block(config=b"b" * 16)
    area = ctypes.create_string_buffer(bytes(second), len(second))
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for b in (first, second):
                ctypes.memmove(area, bytes(b[:8]), 8)

    thread = threading.Thread(target=flip)
    thread.start()
    seen: set[int] = set()
    codes: set[int] = set()
    try:
        for _ in range(60):
            with lab.open() as f:
                code = result(lambda: f.ioctl(ADD_DEVICE, ctypes.addressof(area)))
                codes.add(code)
                if code == 0:
                    seen.add(DESC.get(lab.life.page, f.slot_offset, "config_len"))
    finally:
        stop.set()
        thread.join()
    assert seen <= {8, 16}
    assert codes <= {0, EINVAL}


@pytest.mark.parametrize("at", range(8))
def test_vop_36_header_that_differs_the_second_time(
    lab: Lab, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VOP-36: any byte of the header changed between its two reads: EINVAL, page unchanged; unchanged it is taken."""
    arg, fetch = block(config=b"a" * 8), device_file._fetch
    reads: list[int] = []

    def changing(memory: Any, length: int) -> bytes:
        data = fetch(memory, length)
        reads.append(length)
        if len(reads) == 1:
            arg[at] ^= 4
        return data

    before = lab.life.page.read(24, 4072)
    with lab.open() as f:
        monkeypatch.setattr(device_file, "_fetch", changing)
        assert number(lambda: f.ioctl(ADD_DEVICE, arg)) == EINVAL
        monkeypatch.undo()
        assert reads[0] == 8
        assert lab.life.page.read(24, 4072) == before
        arg[at] ^= 4
        assert f.ioctl(ADD_DEVICE, arg) == 0


def test_vop_37_page_full_then_room(lab: Lab) -> None:
    """VOP-37: no room is an error, and after one file is closed the next ADD succeeds."""
    files = []
    while True:
        f = lab.open()
        code = result(lambda: f.ioctl(ADD_DEVICE, block()))  # noqa: B023 - called at once
        if code:
            assert code in (
                EINVAL,
                errno.ENOSPC,
            )  # the page, or the card's nine vectors, whichever ends first
            break
        files.append(f)
    assert len(files) >= 4
    off = files[1].slot_offset
    files[1].close()
    eventually(lambda: len(lab.life.host.devices) == len(files) - 1, 30, "the removal")
    assert f.ioctl(ADD_DEVICE, block()) == 0
    assert f.slot_offset == off
    for x in (*files, f):
        x.close()


def test_vop_38_second_add(lab: Lab) -> None:
    """VOP-38: EBUSY, and the first device goes on."""
    with lab.added() as f:
        off = f.slot_offset
        assert number(lambda: f.ioctl(ADD_DEVICE, block())) == errno.EBUSY
        assert f.slot_offset == off
        assert lab.status(f) & C["VIRTIO_DRIVER_OK"]


def test_vop_39_two_files_of_one_type(lab: Lab) -> None:
    """VOP-39: two files may carry two devices of one type; closing one leaves the other."""
    one = lab.added()
    with lab.added() as two:
        assert one.slot_offset != two.slot_offset
        one.close()
        eventually(lambda: len(lab.life.host.devices) == 1, 30, "the removal")
        assert lab.status(two) & C["VIRTIO_DRIVER_OK"]


def test_vop_40_bad_arguments(lab: Lab) -> None:
    """VOP-40: vr_idx, element array, buffer and out_len that are wrong have the errno of 6.4."""
    with lab.added() as f:
        lab.offer([b"12345678"], [4])
        assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4), ring=1).arg)) == EINVAL
        assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4), ring=255).arg)) == EINVAL
        assert number(lambda: f.ioctl(COPY_DESC, 8)) == EFAULT
        assert number(lambda: f.ioctl(COPY_DESC, bytearray(23))) == EFAULT
        assert number(lambda: f.ioctl(COPY_DESC, bytes(Copy(bytearray(4)).arg))) == EFAULT
        assert number(lambda: f.ioctl(ADD_DEVICE, 8)) == errno.EBUSY
        no_array = bytearray(L.COPY_DESC.pack(iov=8, iovcnt=1))
        assert number(lambda: f.ioctl(COPY_DESC, no_array)) == EINVAL
        iov = ffi.new("struct iovec[]", [(ffi.cast("void *", 8), 4)])
        no_buffer = bytearray(L.COPY_DESC.pack(iov=int(ffi.cast("uintptr_t", iov)), iovcnt=1))
        assert number(lambda: f.ioctl(COPY_DESC, no_buffer)) == EFAULT
    with lab.open() as fresh:
        assert number(lambda: fresh.ioctl(ADD_DEVICE, 8)) == EFAULT
        assert number(lambda: fresh.ioctl(ADD_DEVICE, block()[:20])) == EFAULT


def test_vop_41_nothing_works_before_add(lab: Lab) -> None:
    """VOP-41: EINVAL, POLLERR at once and every time; never a crash."""
    with lab.open() as f:
        assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4)).arg)) == EINVAL
        assert number(lambda: f.ioctl(CONFIG_CHANGE, b"")) == EINVAL
        assert number(lambda: f.mmap(0, 4096)) == EINVAL
        assert [f.poll(None), f.poll(20)] == [select.POLLERR] * 2


def test_vop_42_mmap(lab: Lab) -> None:
    """VOP-42: page and ring blocks, read only for good; writable is EACCES, odd ranges are EINVAL."""
    with lab.added(num_vq=2, num=128) as f:
        with f.mmap(0, 4096 + 2 * 8192) as m:
            assert int.from_bytes(m.view[:4], "little") == C["MIC_MAGIC"]
            assert m.view[f.slot_offset] == TYPE
            for i in range(2):
                magic = 4096 + 8192 * i + vring_size(128) + 4
                assert int.from_bytes(m.view[magic : magic + 4], "little") == ring_magic(TYPE, i)
            with pytest.raises(TypeError):
                m.view[0] = 1  # type: ignore[index]
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(m.address), 4096, 3) == -1
            assert ctypes.get_errno() == errno.EACCES
        with f.mmap(4096 + 8192, 8192) as ring:
            assert int.from_bytes(ring.view[vring_size(128) + 4 :][:4], "little") == ring_magic(TYPE, 1)
        assert number(lambda: f.mmap(0, 4096, writable=True)) == errno.EACCES
        for offset, length in (
            (0, 8192),
            (4096, 4096),
            (8192, 8192),
            (0, 0),
            (1, 4096),
            (4096 + 3 * 8192, 8192),
            (0, 1 << 20),
        ):
            assert number(lambda o=offset, n=length: f.mmap(o, n)) == EINVAL  # type: ignore[misc]


def test_vop_43_unknown_ioctl(lab: Lab) -> None:
    """VOP-43: ENOTTY, with and without a device."""
    with lab.open() as f:
        for command in (0, 0xC0087303, 0xC0047301, 0xC0087306):
            assert number(lambda c=command: f.ioctl(c, b"")) == errno.ENOTTY  # type: ignore[misc]


def test_vop_15_config_change_by_ioctl(lab: Lab) -> None:
    """VOP-15: a positive result when the card has acknowledged; short arguments are EFAULT."""
    with lab.added(config=b"before") as f:
        assert f.ioctl(CONFIG_CHANGE, b"after!") > 0
        assert lab.driver().configs == [b"after!"]
        assert f.ioctl(CONFIG_CHANGE, b"again!") > 0
        assert number(lambda: f.ioctl(CONFIG_CHANGE, b"short")) == EFAULT


def test_vop_19_files_after_the_card_stopped(lab: Lab) -> None:
    """VOP-19: ENODEV and POLLERR on old files, no new device, and closing does not hang."""
    f, idle = lab.added(), lab.open()
    lab.call(lab.files.close())
    assert lab.life.host.devices == []
    eventually(lambda: f.poll(0) == select.POLLERR, 20, "POLLERR")
    for call in (
        lambda: f.ioctl(COPY_DESC, Copy(bytearray(4)).arg), lambda: f.ioctl(CONFIG_CHANGE, b""), lambda: f.mmap(0, 4096),
        lambda: idle.ioctl(ADD_DEVICE, block()),
    ):  # fmt: skip
        assert number(call) == ENODEV
    began = time.monotonic()
    f.close()
    idle.close()
    f.close()
    assert time.monotonic() - began < 8


def test_vop_19_host_process_that_vanishes(lab: Lab) -> None:
    """VOP-19: without a word of the host, too, an open file answers ENODEV and POLLERR, and closes."""
    f = lab.added()
    lab.host_end.shutdown(socket.SHUT_RDWR)
    eventually(lambda: f.poll(0) == select.POLLERR, 20, "POLLERR")
    assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4)).arg)) == ENODEV
    assert number(lambda: f.ioctl(CONFIG_CHANGE, b"")) == ENODEV
    f.close()
    eventually(lambda: not lab.life.host.devices, 20, "the removal")


def test_vop_55_removal_waits_for_a_copy(lab: Lab) -> None:
    """VOP-55: the stop does not take the rings from a copy in progress; the next one gets ENODEV."""
    f = lab.added()
    lab.offer([b"x" * 64], [])
    f._rings.acquire()  # a copy in progress
    closing = asyncio.run_coroutine_threadsafe(lab.files.close(), lab.loop)
    with pytest.raises(concurrent.futures.TimeoutError):
        closing.result(0.3)
    assert lab.life.host.devices[0].slot.blocks
    f._rings.release()
    closing.result(20)
    assert lab.life.host.devices == []
    assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(64)).arg)) == ENODEV
    f.close()


def test_vop_13_copy_without_status_is_enodev(lab: Lab) -> None:
    """VOP 6.4: with status 0, before the driver or after its reset, COPY_DESC is ENODEV."""
    with lab.added() as f:
        dev = lab.driver().dev
        assert dev
        lab.call(dev.reset())
        assert lab.status(f) == 0
        assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4)).arg)) == ENODEV


def test_vop_21_ring_that_was_not_handed_over_is_empty(lab: Lab) -> None:
    """VOP-21: between the card's first status and its rings, at the start and after a reset, COPY_DESC moves nothing and
    breaks nothing."""
    with lab.added() as f:
        lab.offer([b"abc"], [])
        copy = Copy(bytearray(3), update=True)
        f.ioctl(COPY_DESC, copy.arg)
        assert copy.out_len == 3
        dev = lab.driver().dev
        assert dev
        lab.call(dev.reset())
        DESC.put(lab.life.page, f.slot_offset, "status", C["VIRTIO_ACKNOWLEDGE"])
        for _ in range(2):
            copy = Copy(bytearray(3), update=True)
            assert f.ioctl(COPY_DESC, copy.arg) == 0
            assert copy.out_len == 0
        assert lab.status(f) == C["VIRTIO_ACKNOWLEDGE"]  # not NEEDS_RESET


def test_vop_54_card_dies_with_a_chain_pending(lab: Lab) -> None:
    """VOP-54: copies still end at once; after the stop ENODEV and POLLERR; a new boot takes new files."""
    f = lab.added()
    lab.offer([b"12345678"], [8])
    lab.life.host.peer_alive = lambda: False
    lab.loop.call_soon_threadsafe(lab.life.host.peer_died)
    began = time.monotonic()
    pending = Copy(bytearray(4))  # alive during the call: the element array is its
    result(lambda: f.ioctl(COPY_DESC, pending.arg))
    lab.call(lab.files.close())
    lab.call(lab.life.host.close())
    assert time.monotonic() - began < 8
    assert number(lambda: f.ioctl(COPY_DESC, Copy(bytearray(4)).arg)) == ENODEV
    assert f.poll(20) == select.POLLERR
    f.close()

    async def boot_again() -> None:
        lab.life.page.zero(24, 4072)
        lab.life.host, lab.life.card = lab.life.new_host(), lab.life.new_card()
        await lab._start()

    lab.call(boot_again())
    with lab.added() as fresh:
        assert fresh.slot_offset == 24


def test_vop_29_close_wakes_a_waiting_poll(lab: Lab) -> None:
    """A thread in poll without a limit returns POLLERR when another one closes the file."""
    f = lab.added()
    while f.poll(0.05):
        pass
    found: list[int] = []
    waiter = threading.Thread(target=lambda: found.append(f.poll(None)))
    waiter.start()
    f.close()
    waiter.join(20)
    assert found == [select.POLLERR]


def test_vop_16_close_returns_when_the_device_is_gone(lab: Lab) -> None:
    """VOP-16, VOP 4.7: as the real close; so the next device finds the interrupt and the slot of this one free."""
    for _ in range(3):
        f = lab.added()
        f.close()
        assert lab.life.host.devices == []
    f = lab.open()  # one without a device has nothing to wait for
    f.close()


@pytest.mark.system
def test_vop_20_killed_process_takes_its_device_along(machine: Machine) -> None:
    """VOP-20: kill -9 of a program with an open device file: the card sees its device go."""
    import subprocess
    import sys

    card = machine.boot("--disk", "none", "--net", "none")["cards"][0]
    program = (
        "import sys, time\n"
        "from mic_emu import layout as L\n"
        "from mic_emu.vop.device_file import ADD_DEVICE, DeviceFile\n"
        f"f = DeviceFile.open({card['run_dir'] + '/vop.sock'!r})\n"
        "b = L.DEVICE_DESC.pack(type=4, num_vq=1, feature_len=8) + L.VQCONFIG.pack(num=8) + bytes([0,0,0,0,1,0,0,0]) + bytes(8)\n"
        "print(f.ioctl(ADD_DEVICE, bytearray(b)), flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=machine.env
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == "0\n"
        log = machine.run_dir / "log.jsonl"
        eventually(lambda: "virtio4@" in log.read_text(), 30, "the device on the card")
        child.kill()
        eventually(lambda: "device is gone" in log.read_text(), 30, "the removal on the card")
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    assert machine.card()["state"] == "online"
    assert os.path.exists(card["run_dir"] + "/vop.sock")
    machine.micemu("shutdown")
    assert not os.path.exists(card["run_dir"] + "/vop.sock")
