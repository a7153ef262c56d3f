"""The host's DMA device of one card: channels 0-3, made at every start, gone at every stop (HW 6.3)."""

from __future__ import annotations

from mic_emu.bar import Bus
from mic_emu.dma import DmaMemory
from mic_emu.host.irq import Interrupts, Kind
from mic_emu.host.smpt import Smpt
from mic_emu.log import Logger
from mic_emu.mbus import HOST_CHANNELS, INTERRUPT_NAME, DmaDevice, Line, host_id
from mic_emu.memory import PageAllocator


def acquire(
    index: int, bus: Bus, irqs: Interrupts, smpt: Smpt, pages: PageAllocator, log: Logger
) -> DmaDevice:
    """Up to four channels whose rings lie in host memory behind the SMPT.

    Raises DmaError ENODEV (none works), OSError ENOSPC (no interrupt vector).
    """

    def request(c: int) -> Line:
        irq = irqs.request(Kind.DMA, c, INTERRUPT_NAME)
        return Line(irq.fd, irq.ack, irq.free)

    memory = DmaMemory(pages, smpt.map, smpt.unmap)
    return DmaDevice.acquire(host_id(index), bus, HOST_CHANNELS, memory, request, log)
