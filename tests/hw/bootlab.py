"""A host driver and a card driver over one card's hardware, without processes: the lab of the boot tests."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from hwcard import new_card

from mic_emu import layout as L
from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.card.os.bringup import CardDriver
from mic_emu.clock import Clock, ManualClock
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.driver import Driver
from mic_emu.log import Log
from mic_emu.memory import PageAllocator
from mic_emu.testing.cosm import FakeOps

C = L.CONSTANTS
BOOT = L.BOOTPARAM
MiB = 1 << 20
BASE = 16 * MiB  # where the bootstrap of a 64 MiB card wants its image
FRESH = {
    "magic": 0xC0FFEE00, "h2c_config_db": -1, "node_id": 1, "h2c_scif_db": 0xFF, "c2h_scif_db": 0xFF,
    "scif_host_dma_addr": 0, "scif_card_dma_addr": 0,
}  # fmt: skip


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Lab:
    """A host driver over a card whose firmware is ready; the board is its DMA engine alone."""

    def __init__(self, bus: Bus, null: int, clock: Clock) -> None:
        self.bus = bus
        self.records: list[dict[str, Any]] = []
        self.log = Log(null, self.records.append)
        self.pages = PageAllocator(bus.fds[2], MiB, 64 * MiB)
        self.gddr = PageAllocator(bus.fds[0], 32 * MiB, 64 * MiB)
        self.driver = Driver(bus, 0, self.pages, clock, self.log)
        self.firmware()

    def firmware(self) -> None:
        """The bootstrap waits for a download."""
        self.bus.hw_store("spad", BASE | 4 << 1 | 1, C["SPAD_DOWNLOAD"])

    @property
    def bootparam(self) -> dict[str, int]:
        return BOOT.unpack(self.driver.page.read(0, BOOT.size))

    def probe(self, **boot: Any) -> CardDriver:
        """The card driver's probe."""
        return CardDriver.probe({**boot}, self.bus, self.gddr, logging.getLogger("test"))

    def log_text(self) -> str:
        return "\n".join(r["message"] for r in self.records)


@contextmanager
def open_lab(gddr: int = 64 * MiB, clock: Clock | None = None) -> Iterator[Lab]:
    """``gddr`` bytes of card memory; ``clock``: the driver's, else the fast one."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        with new_card(gddr=gddr, host=64 * MiB) as bus, DmaEngine(bus):
            lab = Lab(bus, null, clock or Clock("fast"))
            yield lab
            lab.driver.remove()
    finally:
        os.close(null)


def state_machine() -> tuple[CosmDevice, FakeOps, ManualClock]:
    """COSM's state machine on fake hardware."""
    ops, clock = FakeOps(), ManualClock()
    return CosmDevice(0, ops, clock, Log(-1)), ops, clock
