"""The card's DMA engine as the board process owns it (HW 5.7). The work is done by C threads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from mic_emu._native import ffi, lib
from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS as C

CHANNELS = C["DMA_CHANNELS"]


@dataclass(frozen=True)
class ChannelStats:
    """What a channel did since the engine started: descriptors retired, bytes copied, interrupts
    raised (masked ones included), faults, thread wake-ups, descriptors cut off by a reset."""

    descriptors: int
    bytes: int
    interrupts: int
    faults: int
    wakeups: int
    aborts: int


def _bits(channels: Iterable[int]) -> int:
    return sum(1 << c for c in set(channels))


class FaultKind(IntEnum):
    """What a fault filter does to a descriptor."""

    DELAY = lib.MIC_DMA_FAULT_DELAY  # param: nanoseconds
    FAIL = lib.MIC_DMA_FAULT_FAIL  # param: DCHERR bits; halts the channel
    CORRUPT = lib.MIC_DMA_FAULT_CORRUPT  # flips bits of one byte that was written
    SKIP = lib.MIC_DMA_FAULT_SKIP  # retires without executing
    NO_INTERRUPT = lib.MIC_DMA_FAULT_NO_INTERRUPT


@dataclass(frozen=True)
class Fault:
    """A filter over the descriptors of some channels.

    ``chance`` 0..1 per descriptor; ``count`` hits until it is spent, 0 = no end; the same ``seed``
    hits the same descriptors of a channel again. ``hits`` counts.
    """

    kind: FaultKind
    channels: tuple[int, ...] = tuple(range(CHANNELS))
    chance: float = 1.0
    count: int = 0
    param: int = 0
    seed: int = 0
    hits: int = 0


class DmaEngine:
    """Eight channels over ``bus``; one engine per card. A context manager: leaving ends its threads.

    Raises OSError when the threads cannot be started.
    """

    def __init__(self, bus: Bus) -> None:
        self._faults: dict[int, Fault] = {}
        self._ptr = lib.mic_dma_engine_start(bus.ptr)
        if self._ptr == ffi.NULL:
            raise OSError(ffi.errno, f"DMA engine: {os.strerror(ffi.errno)}")

    def reset(self) -> None:
        """Card reset: when this returns no byte moves and the channel registers are at reset (HW-52)."""
        lib.mic_dma_engine_reset(self._ptr)

    def stats(self) -> list[ChannelStats]:
        """Counters of channels 0 to 7."""
        out = ffi.new("struct mic_dma_stats *")
        rows = []
        for c in range(CHANNELS):
            lib.mic_dma_engine_stats(self._ptr, c, out)
            rows.append(
                ChannelStats(out.descriptors, out.bytes, out.interrupts, out.faults, out.wakeups, out.aborts)
            )
        return rows

    def add_fault(self, fault: Fault) -> int:
        """Put a filter in front of the descriptors; returns its number.

        Raises OSError EINVAL (FAIL without bits), ENOSPC (eight are there), ValueError (ranges).
        """
        if not 0 <= fault.chance <= 1 or any(not 0 <= c < CHANNELS for c in fault.channels):
            raise ValueError(f"no such fault filter: {fault}")
        c = ffi.new("struct mic_dma_fault *")
        c.kind, c.channels = fault.kind, _bits(fault.channels)
        c.chance = min(int(fault.chance * 2**32), 2**32 - 1)
        c.count, c.param, c.seed = fault.count, fault.param, fault.seed
        rc = int(lib.mic_dma_fault_add(self._ptr, c))
        if rc < 0:
            raise OSError(-rc, f"DMA fault filter: {os.strerror(-rc)}")
        self._faults[rc] = fault
        return rc

    def remove_fault(self, number: int) -> None:
        """Take a filter out. Raises KeyError."""
        del self._faults[number]
        lib.mic_dma_fault_remove(self._ptr, number)

    def faults(self) -> dict[int, Fault]:
        """The filters with their hits."""
        c = ffi.new("struct mic_dma_fault *")
        rows = {}
        for number, fault in self._faults.items():
            lib.mic_dma_fault_get(self._ptr, number, c)
            rows[number] = replace(fault, hits=int(c.hits))
        return rows

    def close(self) -> None:
        """End the threads; registers stay as they are."""
        if self._ptr != ffi.NULL:
            lib.mic_dma_engine_stop(self._ptr)
            self._ptr = ffi.NULL

    def __enter__(self) -> DmaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
