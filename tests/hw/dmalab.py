"""A card whose DMA engine runs, and the memories that the drivers of both sides allocate from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from hwcard import GiB, MiB, new_card

from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.dma import DmaChannel, DmaMemory
from mic_emu.host.smpt import Smpt
from mic_emu.layout import CONSTANTS as C
from mic_emu.memory import PageAllocator

SMPT = C["SMPT_BASE"]


@dataclass
class Lab:
    """A card whose engine runs, with the memories that both drivers allocate from."""

    bus: Bus
    engine: DmaEngine
    host: DmaMemory
    card: DmaMemory

    def channel(self, c: int, **options: object) -> DmaChannel:
        memory = self.host if c < 4 else self.card
        return DmaChannel(self.bus, c, memory, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def make_lab() -> Iterator[Lab]:
    with new_card(gddr=128 * MiB, host=17 * GiB) as bus, DmaEngine(bus) as engine:
        smpt = Smpt(bus, logging.getLogger("t"))
        smpt.init()
        host = DmaMemory(PageAllocator(bus.fds[2], 64 * MiB, 96 * MiB), smpt.map, smpt.unmap)
        card = DmaMemory(PageAllocator(bus.fds[0], 64 * MiB, 96 * MiB))
        yield Lab(bus, engine, host, card)
        assert host.pages.used_bytes == card.pages.used_bytes == 0, "a channel kept memory"
        assert all(r.refs == 0 for r in smpt.rows()), "a channel kept a mapping"


def local(ch: DmaChannel) -> int:
    """Card address of a scratch area in the memory of the channel's owner."""
    return SMPT + MiB if ch.index < 4 else MiB
