"""The card's DMA engine as the board process owns it (HW 5.7). The work is done by C threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

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


class DmaEngine:
    """Eight channels over ``bus``; one engine per card. A context manager: leaving ends its threads.

    Raises OSError when the threads cannot be started.
    """

    def __init__(self, bus: Bus) -> None:
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

    def close(self) -> None:
        """End the threads; registers stay as they are."""
        if self._ptr != ffi.NULL:
            lib.mic_dma_engine_stop(self._ptr)
            self._ptr = ffi.NULL

    def __enter__(self) -> DmaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
