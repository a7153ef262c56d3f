"""The card's SCIF link to the host, and the DMA channels for it (HW 7, SCIF 3.6)."""

from __future__ import annotations

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.dma import DmaMemory
from mic_emu.mbus import DmaDevice
from mic_emu.memory import View
from mic_emu.scif.engine import RmaEngine
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.node import Node

BOOT = L.BOOTPARAM
host_doorbell = BOOT.loader("c2h_scif_db")


class CardLink:
    """Publishes the card's queue pair and reaches the host's through the SMPT."""

    def __init__(
        self, node: Node, bus: Bus, page: View, interrupts: CardInterrupts, dma: DmaDevice | None = None
    ) -> None:
        self.node = node
        self.bus = bus
        self.page = page
        self._line = interrupts.request("SCIF_INTR")
        ports = LinkPorts(
            own_addr=lambda off: off,  # card physical addresses are what the host uses
            peer_view=bus.card_view,
            ring=lambda: bus.ring_host(host_doorbell(page, 0), L.CONSTANTS["FAULT_TARGET_SCIF"]),
            doorbell_fd=self._line.fd,
            publish=self._publish,
            fetch=lambda: BOOT.get(page, 0, "scif_host_dma_addr"),
            peer_memory=bus.host,
            disturbed=bus.doorbells_disturbed,
            peer_fd=bus.fds[lib.MIC_FD_HOST],
        )
        self.link: Link = node.add_link(0, ports)
        memory = DmaMemory(node.allocator, lambda off, size: ports.own_addr(off))
        self.engine = RmaEngine(node, dma.channels if dma else [], memory)
        for peer in (0, node.id):  # the host, and our own programs among each other
            node.rma.engines[peer] = self.engine

    def start(self) -> None:
        """Publish and look for the host; a first ring wakes a host that published before us (HW-46)."""
        self.link.start()

    def _publish(self, addr: int) -> None:
        """Doorbell first, then the address. When we leave only the address goes: the answer to EXIT still
        rings."""
        if addr:
            BOOT.put(self.page, 0, "h2c_scif_db", self._line.doorbell)
        BOOT.put(self.page, 0, "scif_card_dma_addr", addr)

    async def stop(self) -> None:
        """Orderly: copies cut off, EXIT and its answer, address withdrawn."""
        self.engine.close()
        self.node.rma.engines.clear()
        await self.link.stop()
        BOOT.put(self.page, 0, "h2c_scif_db", 0xFF)
        self._line.free()
