"""The MIC bus: the DMA controller is no PCI function, so each side makes one virtual device (HW 5.1).

``DmaDevice`` is that device with its channels: four on the host (0-3), four on the card (4-7).
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mic_emu.bar import Bus
from mic_emu.dma import DRAIN_S, RING_SIZE, DmaChannel, DmaError, DmaMemory
from mic_emu.layout import CONSTANTS as C
from mic_emu.log import Logger
from mic_emu.memory import OutOfNodeMemory

ANY_ID = 0xFFFFFFFF
DMA_HOST, DMA_CARD = 2, 3
SMALL_RING = 4096  # when memory is short: the real ring takes 2 MiB per channel
INTERRUPT_NAME = "mic dma_channel"


@dataclass(frozen=True)
class MbusId:
    """Identity of a device on the bus named ``mic_bus``."""

    name: str
    device: int
    vendor: int = ANY_ID

    def matches(self, device: int, vendor: int = ANY_ID) -> bool:
        """Does a driver's table entry fit? ``ANY_ID`` in the entry fits everything."""
        return device in (ANY_ID, self.device) and vendor in (ANY_ID, self.vendor)

    def attributes(self) -> dict[str, str]:
        """The sysfs attributes."""
        return {
            "device": f"0x{self.device:04x}",
            "vendor": f"0x{self.vendor:04x}",
            "modalias": f"mbus:d{self.device:08X}v{self.vendor:08X}",
        }


@dataclass
class Line:
    """A channel's interrupt: descriptor to wait on, the bus's acknowledge, how to give it back."""

    fd: int
    ack: Callable[[], None] | None = None
    free: Callable[[], None] = lambda: None


@dataclass
class DmaDevice:
    """A side's channels with their interrupts; ``acquire`` makes one, ``release`` undoes it.

    Channel [0] is VOP's, SCIF may use all (HW 5.1).
    """

    ident: MbusId
    channels: list[DmaChannel] = field(default_factory=list)
    _lines: list[Line] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def acquire(
        cls,
        ident: MbusId,
        bus: Bus,
        indices: Sequence[int],
        memory: DmaMemory,
        request: Callable[[int], Line],
        log: Logger,
    ) -> DmaDevice:
        """Take the channels that work; a broken one (HW-33) is logged and left out.

        ``request(c)`` takes channel c's interrupt; its error undoes everything. Raises DmaError
        ENODEV when no channel is left, OSError of ``request``.
        """
        dev = cls(ident)
        try:
            for c in indices:
                dev._take(bus, c, memory, request(c), log)
        except BaseException:
            dev.release(0)
            raise
        if not dev.channels:
            raise DmaError(errno.ENODEV, f"{ident.name}: no DMA channel can be used")
        return dev

    def _take(self, bus: Bus, c: int, memory: DmaMemory, line: Line, log: Logger) -> None:
        def channel(size: int) -> DmaChannel:
            return DmaChannel(bus, c, memory, irq_fd=line.fd, ack=line.ack, ring_size=size, log=log)

        try:
            try:
                ch = channel(RING_SIZE)
            except OutOfNodeMemory:
                ch = channel(SMALL_RING)
                log.warning(f"{self.ident.name}: memory is short, channel {c} has a ring of {SMALL_RING}")
        except OSError as e:
            line.free()
            log.warning(f"{self.ident.name}: channel {c} is left out: {e.strerror or e}")
            return
        self.channels.append(ch)
        self._lines.append(line)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run the channels' interrupt handlers in ``loop``."""
        self._loop = loop
        for ch, line in zip(self.channels, self._lines, strict=True):
            loop.add_reader(line.fd, ch.on_interrupt)

    def release(self, drain_s: float = DRAIN_S) -> None:
        """Drain and free every channel (all within ``drain_s``), and the interrupts."""
        end = time.monotonic() + drain_s
        for ch, line in zip(self.channels, self._lines, strict=True):
            if self._loop:
                self._loop.remove_reader(line.fd)
            ch.free(max(end - time.monotonic(), 0))
            line.free()
        self.channels, self._lines, self._loop = [], [], None


def host_id(index: int) -> MbusId:
    """The host's device for card ``index``."""
    return MbusId(f"mbus-dev{index}", DMA_HOST)


CARD_ID = MbusId("mbus-dev0", DMA_CARD)
HOST_CHANNELS = range(C["DMA_HOST_CHANNELS"])
CARD_CHANNELS = range(C["DMA_HOST_CHANNELS"], C["DMA_CHANNELS"])
