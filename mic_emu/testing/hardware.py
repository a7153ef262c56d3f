"""A card's hardware in one process, with both halves of it that drivers use, for scripts and tests that study it.

::

    from mic_emu.dma import INTERRUPT
    from mic_emu.testing.hardware import hardware

    with hardware() as hw, hw.channel(0) as ch:
        hw.bus.gddr.write(0, b"x" * 4096)
        cookie = ch.prep_memcpy(hw.host_address(0), 0, 4096, INTERRUPT).submit()
        ch.sync_wait(cookie)

No board process, no card OS: what the script does is all that happens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mic_emu import pciconfig
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.dma import HOST_CHANNELS, DmaChannel, DmaMemory
from mic_emu.layout import CONSTANTS as C
from mic_emu.memory import PageAllocator
from mic_emu.pciconfig import ConfigSpace, PciIdentity
from mic_emu.testing.bar import new_card

if TYPE_CHECKING:
    from mic_emu.card.board.dma import DmaEngine
    from mic_emu.host.irq import Interrupts
    from mic_emu.host.smpt import Smpt

RINGS = 32 << 20  # at the end of GDDR, and from here in host memory: what channels allocate


@dataclass
class Hardware:
    """One card. Memory below ``RINGS`` bytes from the end of GDDR, and below ``RINGS`` of host memory, is the script's."""

    bus: Bus  # registers by name, GDDR, host memory, doorbells
    config: ConfigSpace  # PCI configuration cycles
    irq: Interrupts  # the host driver's: ``request`` gives a source a descriptor
    smpt: Smpt  # the host driver's address map
    engine: DmaEngine  # its counters
    host: DmaMemory
    card: DmaMemory

    def channel(self, index: int, *, interrupt: bool = False, **options: Any) -> DmaChannel:
        """A driver for channel ``index`` (0-3 the host's, 4-7 the card's). ``interrupt``: its completions signal
        ``irq_fd``, for ``on_interrupt``; else they are polled. Raises DmaError EBUSY for a channel that has halted."""
        if not interrupt:
            return DmaChannel(self.bus, index, self.host if index < HOST_CHANNELS else self.card, **options)
        if index >= HOST_CHANNELS:
            line = self.bus.irq_fd(C["CARD_IRQ_DMA"] + index - HOST_CHANNELS)
            return DmaChannel(self.bus, index, self.card, irq_fd=line, **options)
        from mic_emu.host.irq import Kind

        irq = self.irq.request(Kind.DMA, index, f"dma {index}")
        self.irq.enable()
        return DmaChannel(self.bus, index, self.host, irq_fd=irq.fd, ack=irq.ack, **options)

    def host_address(self, offset: int) -> int:
        """Card address of a byte of host memory below 512 GiB, by the identity map of the driver's probe (HW-6)."""
        return int(C["SMPT_BASE"]) + offset

    def reset(self) -> None:
        """RGCR, as the board does it: channels stop, registers go to their reset values (HW 6.2). The address map and the
        vectors are lost; ``smpt.restore`` and ``irq.restore`` write them again, as the driver does at every start."""
        self.engine.reset()
        self.bus.hw_reset()


@contextmanager
def hardware(
    identity: PciIdentity | None = None, gddr: int = 128 << 20, host: int = 17 << 30
) -> Iterator[Hardware]:
    """A card with ``gddr`` bytes of GDDR, ``host`` bytes of host memory (sparse), its PCI function, the DMA engine, and the
    host driver's probe done. Raises OSError ENOMEM, EINVAL (the identity offers no interrupt)."""
    # Imported here: a script drives both sides, the rest of mic_emu imports neither.
    from mic_emu.card.board.dma import DmaEngine
    from mic_emu.host.irq import Interrupts
    from mic_emu.host.smpt import Smpt

    with new_card(gddr, host) as bus:
        bus.set_over_pci()
        config = pciconfig.build(bus, identity)
        with DmaEngine(bus) as engine, Interrupts(bus) as irq:
            smpt = Smpt(bus, logging.getLogger("micemu.hardware"))
            smpt.init()
            memory = DmaMemory(
                PageAllocator(bus.fds[lib.MIC_FD_HOST], RINGS, 2 * RINGS), smpt.map, smpt.unmap
            )
            card = DmaMemory(PageAllocator(bus.fds[lib.MIC_FD_GDDR], gddr - RINGS, gddr))
            yield Hardware(bus, config, irq, smpt, engine, memory, card)


def rang(fd: int) -> int:
    """How often an interrupt's descriptor was signalled since the last look; 0: not at all."""
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0
