"""VopHost and VopCard of one card in one event loop, over real card memories and lines."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from mic_emu import layout as L
from mic_emu.bar import Bus, create_slot, drain
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.card.os.vop import VirtioDevice, VopCard
from mic_emu.clock import Clock, ManualClock
from mic_emu.host.irq import Interrupts
from mic_emu.host.smpt import Smpt
from mic_emu.host.vop import VopDevice, VopHost
from mic_emu.log import Log
from mic_emu.memory import PAGE, PageAllocator, View, create_shm

C = L.CONSTANTS
DESC, CTRL, VQ, BOOT = L.DEVICE_DESC, L.DEVICE_CTRL, L.VQCONFIG, L.BOOTPARAM
TYPE = 42  # a device type that nobody has a driver for, but ours
VERSION_1 = 1 << C["VIRTIO_F_VERSION_1"]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], Any], what: str, within_s: float = 20.0) -> None:
    """Let the loop run until ``condition``; fails with ``what``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        await asyncio.sleep(0)


class ProbeDriver:
    """A driver that sets its rings up and notes what happens to it."""

    features = VERSION_1
    rings = 1

    def __init__(self, life: Life) -> None:
        self.life = life
        self.calls: list[str] = []
        self.configs: list[bytes] = []
        self.dev: VirtioDevice | None = None
        self.before_probe: Callable[[VirtioDevice], Awaitable[None]] | None = None
        life.probed.append(self)

    async def probe(self, dev: VirtioDevice) -> None:
        self.dev = dev
        self.calls.append("probe")
        await dev.setup_rings(self.rings)

    def start(self) -> None:
        self.calls.append("start")

    def remove(self) -> bool:
        self.calls.append("remove")
        return True

    def config_changed(self) -> None:
        assert self.dev
        self.configs.append(self.dev.read_config(0, self.dev.slot.shape.config_len))


class Trace(View):
    """A view that calls ``seen(off, size, value)`` before each store."""

    seen: Callable[[int, int, Any], None]

    def store(self, off: int, size: int, value: int) -> None:
        self.seen(off, size, value)
        super().store(off, size, value)

    def write(self, off: int, data: Any) -> None:
        self.seen(off, len(data), bytes(data))
        super().write(off, data)


class Life:
    """Both halves of one card; a context manager inside a running loop."""

    def __init__(self, clock: Clock | None = None, driver: type[ProbeDriver] = ProbeDriver) -> None:
        host_fd = create_shm("life-host", 8 << 20)
        self.bus = Bus(create_slot("life", 16 << 20, host_fd))
        os.close(host_fd)
        self.bus.hw_reset()
        self.card_bus = Bus([os.dup(fd) for fd in self.bus.fds])
        self.records: list[dict[str, Any]] = []
        self._null = os.open(os.devnull, os.O_WRONLY)
        self.log = Log(self._null, self.records.append)
        self.clock = clock or Clock("fast")
        self.memory = PageAllocator(self.bus.fds[2], 1 << 20, 8 << 20)
        self.gddr = PageAllocator(self.bus.fds[0], PAGE, 16 << 20)
        self.irq = Interrupts(self.bus, log=self.log)
        self.irq.enable()
        self.smpt = Smpt(self.bus, self.log)
        self.smpt.init()
        self.page_off = self.memory.alloc(PAGE)
        self.page = View(self.bus.host.pointer + self.page_off, PAGE)
        self.page.write(
            0,
            BOOT.pack(magic=C["MIC_MAGIC"], h2c_config_db=-1, node_id=1, h2c_scif_db=0xFF, c2h_scif_db=0xFF),
        )
        self.probed: list[ProbeDriver] = []
        self.driver = driver
        self.host = self.new_host()
        self.card = self.new_card()

    def new_host(self) -> VopHost:
        """The host role of the next boot."""
        return VopHost(self.bus, self.page_off, self.memory, self.smpt, self.irq, self.clock, self.log)

    def new_card(self) -> VopCard:
        """The card role of the next boot."""
        addr = self.smpt.map(self.page_off, PAGE)
        page = self.card_bus.card_view(addr, PAGE)
        self.smpt.unmap(addr, PAGE)
        drivers: dict[int, Any] = {TYPE: lambda: self.driver(self)}
        self.lines = CardInterrupts(self.card_bus)
        return VopCard(self.card_bus, page, self.gddr, self.lines, self.clock, self.log, drivers)

    async def add(self, kind: int = TYPE, num_vq: int = 1, num: int = 8, features: int = VERSION_1, config: bytes = b"",
                  served: bool = True, feature_len: int = 8) -> VopDevice:  # fmt: skip
        """ADD_DEVICE; the host process answers its hand-shakes unless ``served`` is False."""
        dev = await self.host.add(kind, num_vq, num, features, config, feature_len)
        if served:
            self.host.backend_gone(dev)
        return dev

    async def up(self, dev: VopDevice) -> None:
        """Wait for DRIVER_OK."""
        await until(lambda: dev.driver_ok, f"{dev.name} is driven")
        await until(lambda: not self.card._scan_lock.locked(), "the end of the scan")

    def answer(self, dev: VopDevice, act: Callable[[], None]) -> None:
        """Be the host half of a device's doorbell yourself."""

        def rang() -> None:
            drain(dev.irq.fd)
            act()

        asyncio.get_running_loop().add_reader(dev.irq.fd, rang)
        dev.served = False
        act()

    def ctrl(self, dev: VopDevice, name: str) -> int:
        """A byte of the device's control block."""
        return CTRL.get(self.page, dev.slot.off + dev.slot.shape.ctrl_off, name)

    def put_ctrl(self, dev: VopDevice, name: str, value: int) -> None:
        CTRL.put(self.page, dev.slot.off + dev.slot.shape.ctrl_off, name, value)

    def desc(self, dev: VopDevice, name: str) -> int:
        """A field of the device's header."""
        return DESC.get(self.page, dev.slot.off, name)

    @property
    def types(self) -> list[int]:
        """Type bytes of all slots, as the page says."""
        from mic_emu.vop import device_page as dp

        return [s.type for s in dp.walk(self.page)]

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exc: object) -> None:
        self.irq.close()
        self.card_bus.close()
        self.bus.close()
        os.close(self._null)


def manual() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()
