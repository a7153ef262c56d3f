"""Fuzz targets for what the card reads of the host's bytes in Python, each with what must always hold.

``device_page``: the scan of the device page, and the life of what it finds, while the page changes at every wait.
``boot_parameters``: image header, command line, ramdisk, device page address, SCIF queue pair address.

A target is a context manager that yields the function to call with each input.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

from mic_emu import image
from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.board import bootstrap
from mic_emu.card.os import bringup, main, vop
from mic_emu.card.os.bringup import BootError, device_page
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.clock import PROFILES, Clock
from mic_emu.log import Log
from mic_emu.memory import PageAllocator, View
from mic_emu.scif import qp
from mic_emu.scif.errors import ScifError
from mic_emu.testing.bar import new_card
from mic_emu.vop import device_page as dp

C = L.CONSTANTS
MiB = 1 << 20
PAGE_OFF = 0x3000  # of the device page in host memory
BASE = MiB  # where the board wants its image

Target = Callable[[bytes], None]


class HostileClock(Clock):
    """No wait lasts: at each, the host makes one more change of the page, or never answers."""

    def __init__(self, page: View, changes: bytes) -> None:
        super().__init__(PROFILES["fast"])
        self._page, self._changes = page, changes

    def change(self) -> None:
        """Store the next three bytes' worth: page offset (u16), value."""
        row, self._changes = self._changes[:3], self._changes[3:]
        if len(row) == 3:
            self._page.store(int.from_bytes(row[:2], "little") % self._page.size, 1, row[2])

    async def within(self, awaitable: Coroutine[Any, Any, Any], seconds: float, what: str) -> Any:
        self.change()
        awaitable.close()
        raise TimeoutError(what)


class Driver:
    """Takes every device; how many rings it wants depends on the type."""

    features = (1 << 64) - 1

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted

    async def probe(self, dev: vop.VirtioDevice) -> None:
        await dev.setup_rings(self._wanted)
        dev.read_config(0, 8)

    def start(self) -> None:
        pass

    def remove(self) -> bool:
        return True

    def config_changed(self) -> None:
        pass


def _page_and_changes(case: bytes) -> tuple[bytes, bytes]:
    """First byte: how many changes of 3 bytes stand behind it; the rest is the page from the first slot on."""
    n = 3 * (case[0] if case else 0)
    return case[1 + n :], case[1 : 1 + n]


def _sane_walk(page: View) -> None:
    """VOP-17: whatever the page says, slots lie in it one behind the other."""
    end = C["DP_FIRST_SLOT"]
    for slot in dp.walk(page):
        assert slot.off == end
        assert slot.type != dp.FREE
        end += slot.shape.total
        assert end <= C["DP_SIZE"]
        assert slot.ctrl + L.DEVICE_CTRL.size == end
    shape = dp.SlotShape(1, 8, 8)
    room = dp.find_room(dp.walk(page), shape)
    assert room is None or room[0] + shape.total <= C["DP_SIZE"]


def _write_magic(bus: Bus, page: View) -> None:
    """What makes ring blocks good (VOP-4), wherever the slots say that they are: so that the rest is reached."""
    for slot in dp.walk(page):
        for i in range(min(slot.shape.num_vq, C["MAX_VRINGS"])):
            at = slot.off + slot.shape.vq_off(i)
            addr, num = (L.VQCONFIG.get(page, at, name) for name in ("address", "num"))
            info = addr - C["SMPT_BASE"] + dp.vring_size(num)
            if num <= C["MAX_VRING_ENTRIES"] and 0 <= info <= bus.host.size - L.VRING_INFO.size:
                bus.host.write(info, L.VRING_INFO.pack(magic=dp.ring_magic(slot.type, i)))


@contextmanager
def fuzz_device_page() -> Iterator[Target]:
    """Scan twice, then the card goes down; afterwards no memory, no line and no descriptor is lost."""
    log = Log(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
    with new_card(gddr=16 * MiB, host=4 * MiB) as bus:
        page = bus.host.sub(PAGE_OFF, C["DP_SIZE"])
        memory = PageAllocator(bus.fds[lib.MIC_FD_GDDR], MiB, bus.gddr.size)
        for i in range(C["SMPT_ENTRIES"]):
            bus.write("smpt", i << 2, i)

        async def life(case: bytes) -> None:
            content, changes = _page_and_changes(case)
            content = content[: C["DP_SIZE"] - C["DP_FIRST_SLOT"]]
            page.zero(0, C["DP_SIZE"])
            page.write(C["DP_FIRST_SLOT"], content)
            _write_magic(bus, page)
            clock = HostileClock(page, changes)
            lines = CardInterrupts(bus)
            drivers = {k: (lambda wanted=k % 4 + 1: Driver(wanted)) for k in range(1, 100)}
            card = vop.VopCard(bus, page, memory, lines, clock, log, drivers)
            _sane_walk(page)
            await card.start()
            clock.change()
            await card.scan()
            for dev in card.devices.values():
                assert dev.status & ~0xFF == 0
            await card.close()
            assert memory.used_bytes == 0
            assert not any(lines._users), [u.name for u in lines._users if u]

        def one(case: bytes) -> None:
            before = os.open(os.devnull, os.O_RDONLY)
            os.close(before)
            loop.run_until_complete(life(case))
            after = os.open(os.devnull, os.O_RDONLY)
            os.close(after)
            assert after <= before, "a descriptor is left open"

        loop = asyncio.new_event_loop()
        try:
            yield one
        finally:
            loop.close()
            os.close(log.fd)


HEADER_FIELDS = 24  # flags, download word, size, device page address, queue pair address


def _place(bus: Bus, case: bytes) -> tuple[int, int]:
    """Registers and memory as the input says; returns base and size of the image."""
    head = case[:HEADER_FIELDS].ljust(HEADER_FIELDS, b"\0")
    flags = head[0]
    body = case[HEADER_FIELDS:]
    base = int.from_bytes(head[1:5], "little") & C["DOWNLOAD_ADDR_MASK"] if flags & 1 else BASE
    size = int.from_bytes(head[5:9], "little") if flags & 2 else len(body)
    dp_addr = int.from_bytes(head[9:15], "little") if flags & 4 else C["SMPT_BASE"] + PAGE_OFF
    qp_addr = int.from_bytes(head[15:21], "little")
    if flags & 8 and len(body) > image.HEADER_SIZE:  # a checksum that is right, so that the rest is reached
        digest = hashlib.sha256(body[image.HEADER_SIZE :]).digest()
        body = body[:32] + digest + body[64:]
    bus.write("spad", dp_addr & 0xFFFFFFFF, C["SPAD_DP_LO"])
    bus.write("spad", dp_addr >> 32, C["SPAD_DP_HI"])
    L.BOOTPARAM.put(bus.host, PAGE_OFF, "magic", C["MIC_MAGIC"])
    L.BOOTPARAM.put(bus.host, PAGE_OFF, "scif_host_dma_addr", qp_addr)
    bus.gddr.zero(BASE, 3 * 4096)
    room = bus.gddr.size - base
    if room > 0:
        bus.gddr.write(base, body[:room])
    return base, size


@contextmanager
def fuzz_boot_parameters() -> Iterator[Target]:
    """Every refusal is one of the documented exceptions; what is accepted lies in card memory."""
    log = Log(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
    with new_card(gddr=16 * MiB, host=4 * MiB) as bus:
        board = bootstrap.Bootstrap(bus, {"namespaces": False}, log)
        memory = PageAllocator(bus.fds[lib.MIC_FD_GDDR], 8 * MiB, bus.gddr.size)
        own = qp.QueuePair.create(bus.gddr, memory, qp.NODE_RING, lambda off: off)
        for i in range(C["SMPT_ENTRIES"]):
            bus.write("smpt", i << 2, i)

        def one(case: bytes) -> None:
            base, size = _place(bus, case)
            try:
                payload = board.payload(base, size)
                assert 0 < len(payload) <= size - image.HEADER_SIZE
            except bootstrap.BootRefused:
                pass
            if size and base + size <= bus.gddr.size:  # what the board checked before any card code runs
                _kernel(bus, base, size)
            try:
                page = device_page(bus)
                assert page.size == C["DP_SIZE"]
            except BootError as e:
                if e.errno not in (errno.ENOMEM, errno.EIO):
                    raise
                return
            try:
                qp.attach(own, L.BOOTPARAM.get(page, 0, "scif_host_dma_addr"), bus.card_view)
            except (ScifError, IndexError):
                pass

        try:
            yield one
        finally:
            os.close(log.fd)


def _kernel(bus: Bus, base: int, size: int) -> None:
    text = main.command_line(bus, base, size)
    assert len(text) < C["CMDLINE_MAX"] + 1
    assert all(isinstance(v, str) for pair in main.parameters(text).items() for v in pair)
    try:
        ramdisk = main.Kernel._ramdisk(SimpleNamespace(bus=bus), base)  # type: ignore[arg-type]
    except BootError as e:
        if e.errno != errno.EINVAL:
            raise
        return
    assert ramdisk is None or (ramdisk[1] and sum(ramdisk) <= bus.gddr.size)


TARGETS: dict[str, tuple[Callable[[], AbstractContextManager[Target]], list[str]]] = {
    "device_page": (fuzz_device_page, [m.__file__ or "" for m in (dp, vop)]),
    "boot_parameters": (
        fuzz_boot_parameters,
        [m.__file__ or "" for m in (image, bootstrap, main, bringup, qp)],
    ),
}
