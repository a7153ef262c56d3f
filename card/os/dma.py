"""The card's DMA device: channels 4-7 with rings in GDDR, made at probe (HW 7 step 3)."""

from __future__ import annotations

from mic_emu.bar import Bus, drain
from mic_emu.dma import DmaMemory
from mic_emu.layout import CONSTANTS as C
from mic_emu.log import Logger
from mic_emu.mbus import CARD_CHANNELS, CARD_ID, DmaDevice, Line
from mic_emu.memory import PageAllocator


def acquire(bus: Bus, pages: PageAllocator, log: Logger) -> DmaDevice:
    """Up to four channels; interrupt line = channel number (HW 4.4), acknowledged by nothing.

    Raises DmaError ENODEV when none works (HW-44).
    """

    def request(c: int) -> Line:
        fd = bus.irq_fd(C["CARD_IRQ_DMA"] + c - CARD_CHANNELS.start)
        drain(fd)
        return Line(fd)

    return DmaDevice.acquire(CARD_ID, bus, CARD_CHANNELS, DmaMemory(pages), request, log)
