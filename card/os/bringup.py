"""The card driver's probe: is this an X100, what did the host announce, what does the card have (HW 7)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from mic_emu import layout as L
from mic_emu.bar import Bus
from mic_emu.card.os import dma
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.dma import DmaError
from mic_emu.log import Logger
from mic_emu.mbus import DmaDevice
from mic_emu.memory import PageAllocator, View

C = L.CONSTANTS
X100_CPU = (11, 1)  # family and model


class BootError(Exception):
    """The card cannot come up; the sentence says why, ``errno`` is the card driver's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


@dataclass
class CardDriver:
    """What the probe found; ``remove`` undoes it."""

    page: View
    node_id: int
    interrupts: CardInterrupts
    dma: DmaDevice

    @classmethod
    def probe(cls, boot: dict[str, Any], bus: Bus, memory: PageAllocator, log: Logger) -> CardDriver:
        """HW 7 steps 1 to 8. Raises BootError ENODEV, ENOMEM, EIO; then nothing is left (HW-44)."""
        cpu = tuple(boot.get("cpu", X100_CPU))
        if cpu != X100_CPU:
            raise BootError(f"not running on X100: CPU family {cpu[0]} model {cpu[1]}", errno.ENODEV)
        page = device_page(bus)
        interrupts = CardInterrupts(bus)
        try:
            channels = dma.acquire(bus, memory, log)
        except DmaError as e:
            raise BootError(
                f"the card driver needs a DMA channel: {e.strerror}", e.errno or errno.ENODEV
            ) from e
        return cls(page, L.BOOTPARAM.get(page, 0, "node_id"), interrupts, channels)

    def remove(self, drain_s: float) -> None:
        """The devices above are gone: free the channels, each drained within ``drain_s``."""
        self.dma.release(drain_s)


def device_page(bus: Bus) -> View:
    """HW 7 steps 5 and 6: map the page the host announced, check its magic."""
    lo, hi = (bus.read("spad", C[name]) for name in ("SPAD_DP_LO", "SPAD_DP_HI"))
    try:
        page = bus.card_view(hi << 32 | lo, C["DP_SIZE"])
    except IndexError as e:
        raise BootError(f"the device page cannot be mapped: {e}", errno.ENOMEM) from e
    magic = L.BOOTPARAM.get(page, 0, "magic")
    if magic != C["MIC_MAGIC"]:
        raise BootError(f"the device page has magic {magic:#x} instead of {C['MIC_MAGIC']:#x}", errno.EIO)
    return page
