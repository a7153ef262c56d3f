"""The host's SCIF link to one card: doorbells, addresses, publication, DMA channels (HW 7, SCIF 3.6)."""

from __future__ import annotations

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.clock import Clock
from mic_emu.dma import DmaMemory
from mic_emu.host.driver import Driver
from mic_emu.host.irq import Kind
from mic_emu.log import Log
from mic_emu.mbus import CARD_CHANNELS
from mic_emu.memory import PageAllocator, View
from mic_emu.scif.engine import RmaEngine
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.node import Node

C = L.CONSTANTS
BOOT = L.BOOTPARAM
SMPT_SHIFT: int = C["SMPT_SHIFT"]
card_doorbell = BOOT.loader("h2c_scif_db")
QUIET_MS = 200  # a descriptor takes less than one


class HostLink:
    """Exists between start and stop of a card."""

    def __init__(
        self, node: Node, peer: int, bus: Bus, driver: Driver, memory: PageAllocator, clock: Clock, log: Log
    ) -> None:
        self.node = node
        self.peer = peer
        self.bus = bus
        self.driver = driver
        self.clock = clock
        self.log = log
        self._mapped: dict[int, int] = {}  # card address of the host memory behind each SMPT entry
        db = driver.irq.next_db()
        self._db = db
        self._irq = driver.irq.request(Kind.DB, db, "SCIF_INTR")
        ports = LinkPorts(
            own_addr=self._own_addr,
            peer_view=self._peer_view,
            ring=self._ring,
            doorbell_fd=self._irq.fd,
            publish=self._publish,
            fetch=lambda: BOOT.get(driver.page, 0, "scif_card_dma_addr"),
            peer_memory=bus.gddr,
            disturbed=bus.doorbells_disturbed,
            peer_fd=bus.fds[lib.MIC_FD_GDDR],
            quiesce=self._quiesce,
            peer_bank=True,
        )
        self.link: Link = node.add_link(peer, ports)
        channels = driver.dma.channels if driver.dma else []
        self.engine = RmaEngine(node, channels, DmaMemory(memory, driver.smpt.map, driver.smpt.unmap))
        node.rma.engines[peer] = self.engine

    def start(self) -> None:
        """Publish our queue pair and look for the card's."""
        self.link.start()

    def _own_addr(self, off: int) -> int:
        """Host memory as the card sees it: the identity entries of the SMPT (HW-6).

        Mapped once for the life of the link: entries translate 16 GiB at a time.
        """
        entry = off >> SMPT_SHIFT
        addr = self._mapped.get(entry) or self.driver.smpt.map(entry << SMPT_SHIFT, C["PAGE_SIZE"])
        if not addr:
            return 0
        self._mapped[entry] = addr
        return addr + (off - (entry << SMPT_SHIFT))

    def _peer_view(self, addr: int, length: int) -> View:
        return self.bus.gddr.sub(addr, length)

    def _ring(self) -> None:
        self.bus.ring_card(card_doorbell(self.driver.page, 0), C["FAULT_TARGET_SCIF"])

    def _publish(self, addr: int) -> None:
        """Doorbell first, then the address (HW 7 ring-back). When we leave only the address goes: the
        answer to EXIT still rings."""
        if addr:
            BOOT.put(self.driver.page, 0, "c2h_scif_db", self._db)
        BOOT.put(self.driver.page, 0, "scif_host_dma_addr", addr)

    def _quiesce(self) -> None:
        """Pages of our programs are about to be freed: the card's channels must not write there any more. If
        they do not stand still, the pages wait for the reset."""
        if self.driver.board_lost:
            return
        first, count = CARD_CHANNELS.start, len(CARD_CHANNELS)
        if lib.mic_dma_quiesce(self.bus.ptr, first, count, QUIET_MS) < 0:
            self.log.warning(
                "the card's DMA channels do not stop: pages of its windows are kept until its reset"
            )
            self.link.ports.keep = self.driver.hold

    def down(self) -> None:
        """The card OS is gone without a word: remove its node (SCIF 3.7)."""
        if self.driver.board_lost:
            self._close_engine()
        self.link.down()

    def _close_engine(self) -> None:
        """Our channels are about to be released: what they copy for SCIF ends here."""
        self.engine.close(running=not self.driver.board_lost, keep=self.driver.hold)
        if self.node.rma.engines.get(self.peer) is self.engine:
            del self.node.rma.engines[self.peer]

    async def stop(self) -> None:
        """EXIT to the card when it still answers, then remove the node and free everything."""
        self._close_engine()
        await self.link.stop()
        for addr in self._mapped.values():
            self.driver.smpt.unmap(addr, C["PAGE_SIZE"])
        self._irq.free()
