"""A card's hardware inside one process: no board, no host process."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable

from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS as C
from mic_emu.testing.bar import new_card as new_card

MiB = 1 << 20
GiB = 1 << 30


def rang(fd: int) -> int:
    """Take what an eventfd has counted; 0 when it did not ring."""
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0


def wait_for(what: str, true: Callable[[], bool], within_s: float = 20.0) -> None:
    """Look until ``true()``; fails with ``what`` after ``within_s`` seconds."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"{what}: not within {within_s} s"
        os.sched_yield()


# --- raw DMA descriptors, straight from HW 5.3 ----------------------------------------------------


def memcpy_desc(src: int, dst: int, length: int, extra: int = 0) -> bytes:
    """Type 1: ``length`` bytes, encoded in 64-byte units."""
    return struct.pack("<QQ", src | (length // 64) << 46, dst | extra | 1 << 60)


def status_desc(dst: int, value: int, interrupt: bool = False) -> bytes:
    """Type 2: a 64-bit store."""
    return struct.pack("<QQ", value, dst | int(interrupt) << 59 | 2 << 60)


def general_desc(dst: int, value: int) -> bytes:
    """Type 3: a 32-bit store."""
    return struct.pack("<QQ", value, dst | 3 << 60)


NOP = bytes(16)


class RawChannel:
    """One channel programmed by hand: a ring of ``size`` descriptors in GDDR or host memory.

    ``ring`` is an offset in that memory; host rings go through the SMPT entry that shows it.
    """

    def __init__(self, bus: Bus, c: int, ring: int, size: int, host: bool | None = None) -> None:
        self.bus, self.c, self.size = bus, c, size
        self.host = c < 4 if host is None else host
        self.memory = bus.host if self.host else bus.gddr
        self.ring = ring
        self.head = bus.read("dtpr", c)

    def setup(self, unmask: bool = True) -> None:
        """Ring registers, mask or unmask, enable."""
        hi = self.size << 4 | (self.ring >> 32 & (3 if self.host else 0xF))
        if self.host:
            hi |= 1 << 26 | (self.ring >> 34 & 0x1F) << 21
        self.bus.write("drar_lo", self.ring & 0xFFFFFFFF, self.c)
        self.bus.write("drar_hi", hi, self.c)
        if unmask:
            self.bus.write("dcar", 0, self.c)
        self.enable()

    def enable(self, on: bool = True) -> None:
        bit = 2 << 2 * self.c
        lib.mic_dcr_update(self.bus.ptr, 0 if on else bit, bit if on else 0)

    def put(self, *descriptors: bytes) -> None:
        """Fill slots; nothing starts before ``go``."""
        for d in descriptors:
            self.memory.write(self.ring + 16 * self.head, d)
            self.head = (self.head + 1) % self.size

    def go(self, *descriptors: bytes) -> None:
        """Fill slots and move the head."""
        self.put(*descriptors)
        self.bus.write("dhpr", self.head, self.c)

    @property
    def count(self) -> int:
        return self.bus.read("dstat", self.c) & 0x1FFFF

    @property
    def active(self) -> bool:
        return bool(self.bus.read("dstat", self.c) & C["DMA_DSTAT_ACTIVE"])

    @property
    def error(self) -> int:
        return self.bus.read("dcherr", self.c)

    def done(self) -> None:
        """Wait until the channel has retired everything."""
        wait_for(f"channel {self.c} at {self.head}", lambda: self.count == self.head and not self.active)

    def halted(self) -> int:
        """Wait for a fault; returns DCHERR."""
        wait_for(f"channel {self.c} halts", lambda: bool(self.bus.read("dstat", self.c) & 1 << 29))
        wait_for("engine idle", lambda: not self.active)
        return self.error
