"""Two or more SCIF nodes over real card memories, in one process, without board or host driver.

With ``dma`` each card has its DMA engine, and both sides their channels of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.bar import Bus, close_all, create_slot
from mic_emu.card.board.dma import DmaEngine
from mic_emu.clock import Clock
from mic_emu.dma import DmaMemory
from mic_emu.faults import FaultTable
from mic_emu.mbus import CARD_CHANNELS, CARD_ID, HOST_CHANNELS, DmaDevice, Line, host_id
from mic_emu.memory import PageAllocator, View, create_shm, window_allocator
from mic_emu.scif.engine import RmaEngine
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.node import Node

MIB = 1 << 20
C = layout.CONSTANTS
SMPT = C["SMPT_BASE"]
LOG = logging.getLogger("dma")


class Dma:
    """The engine of card ``index`` with the drivers of both sides."""

    def __init__(self, index: int, bus: Bus, host: Node, card: Node) -> None:
        self.bus, self.host, self.card, self.index = bus, host, card, index
        self.engine = DmaEngine(bus)
        self.faults = FaultTable(bus.faults)
        self.start()

    def start(self) -> None:
        """Take the channels and give them to SCIF."""
        bus, loop = self.bus, asyncio.get_running_loop()
        host_memory = DmaMemory(self.host.allocator, lambda off, size: SMPT + off)
        card_memory = DmaMemory(self.card.allocator)
        self.devices = [
            DmaDevice.acquire(
                host_id(self.index), bus, HOST_CHANNELS, host_memory, lambda c: Line(bus.vector_fd(1 + c)), LOG
            ),
            DmaDevice.acquire(
                CARD_ID, bus, CARD_CHANNELS, card_memory, lambda c: Line(bus.irq_fd(C["CARD_IRQ_DMA"] + c - 4)), LOG
            ),
        ]  # fmt: skip
        for device in self.devices:
            device.attach(loop)
        ours = RmaEngine(self.host, self.devices[0].channels, host_memory)
        theirs = RmaEngine(self.card, self.devices[1].channels, card_memory)
        self.rma = [ours, theirs]
        self.host.rma.engines[self.card.id] = ours
        self.card.rma.engines[0] = self.card.rma.engines[self.card.id] = theirs

    def stop(self) -> None:
        """As the drivers do before the card is reset."""
        for rma in self.rma:
            rma.close()
        for device in self.devices:
            device.release(0.2)

    def channel(self, c: int) -> Any:
        """Channel ``c`` as its driver has it."""
        return self.devices[c // 4].channels[c % 4]

    def quiesce(self) -> None:
        """The host stops the channels of a card that it loses."""
        assert lib.mic_dma_quiesce(self.bus.ptr, 4, 4, 1000) == 0


@dataclass
class Page:
    """The SCIF fields of a device page."""

    host_addr: int = 0
    card_addr: int = 0


@dataclass
class Card:
    """One card: its bus, its node, the two ends of its link."""

    bus: Bus
    page: Page
    node: Node
    host_link: Link
    card_link: Link
    dma: Dma | None = None

    def fall_asleep(self) -> None:
        """It does not hear its doorbell until ``wake_up``."""
        asyncio.get_running_loop().remove_reader(self.bus.irq_fd(1))
        self.node.events._epoll.modify(self.bus.irq_fd(1), 0)

    def wake_up(self) -> None:
        """It looks at its queue first, as after any doorbell."""
        asyncio.get_running_loop().add_reader(self.bus.irq_fd(1), self.node.events._serve)
        self.node.events._epoll.modify(self.bus.irq_fd(1), select.EPOLLIN)
        self.card_link.on_doorbell()

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Asleep, and up again."""
        self.fall_asleep()
        try:
            yield
        finally:
            self.wake_up()


@dataclass
class Fabric:
    """Node 0 and its cards."""

    host: Node
    host_fd: int
    clock: Clock
    cards: list[Card] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [self.host] + [c.node for c in self.cards]


def host_ports(bus: Bus, page: Page) -> LinkPorts:
    """The host's side of a link: SMPT entry 0 maps host memory at 0."""
    return LinkPorts(
        own_addr=lambda off: SMPT + off,
        peer_view=bus.gddr.sub,
        ring=lambda: bus.ring_card(1),
        doorbell_fd=bus.vector_fd(0),
        publish=lambda addr: setattr(page, "host_addr", addr),
        fetch=lambda: page.card_addr,
        peer_memory=bus.gddr,
        peer_fd=bus.fds[0],
        peer_bank=True,
    )


def card_ports(bus: Bus, page: Page) -> LinkPorts:
    """The card's side."""
    return LinkPorts(
        own_addr=lambda off: off,
        peer_view=bus.card_view,
        ring=lambda: bus.ring_host(0),
        doorbell_fd=bus.irq_fd(1),
        publish=lambda addr: setattr(page, "card_addr", addr),
        fetch=lambda: page.host_addr,
        peer_memory=bus.host,
        peer_fd=bus.fds[2],
    )


def connect_irq(bus: Bus) -> None:
    """Host doorbell 0 raises vector 0, DMA channel c vector 1 + c; SMPT entry 0 maps host address 0."""
    bus.write("smpt", 0)
    bus.write("mxar", 1, 0)
    for c in HOST_CHANNELS:
        bus.write("mxar", 1 << C["SRC_DMA"] + c, 1 + c)
    causes = 1 | 0xF << C["SRC_DMA"]
    bus.write("siac0", causes)
    bus.write("sice0", causes)


def node_over(node_id: int, fd: int, view: View, clock: Clock) -> Node:
    """A node over a memory without its first MiB; a card's has its windows in the window bank."""
    allocator = PageAllocator(fd, 1 * MIB, view.size)
    bank = window_allocator(allocator, view.size) if node_id else None
    return Node(node_id, allocator, view, clock, logging.getLogger(f"scif{node_id}"), bank)


@contextlib.asynccontextmanager
async def fabric(
    cards: int = 1,
    *,
    clock: Clock | None = None,
    wait: bool = True,
    dma: bool = False,
    memory: int = 64 * MIB,
) -> AsyncIterator[Fabric]:
    """Node 0 with ``cards`` cards, all online when ``wait``; each node has ``memory`` bytes."""
    clock = clock or Clock("fast")
    host_fd = create_shm("test-host", memory)
    fab: Fabric | None = None
    lone: Bus | None = None
    try:
        buses = [Bus(create_slot(f"t{i}", memory, host_fd)) for i in range(max(cards, 1))]
        lone = None if cards else buses[0]
        fab = Fabric(node_over(0, host_fd, buses[0].host, clock), host_fd, clock)
        await fab.host.start()
        views = {i + 1: (b.gddr, b.fds[0]) for i, b in enumerate(buses)}
        for i in range(cards):
            bus, page = buses[i], Page()
            bus.hw_reset()
            connect_irq(bus)
            node = node_over(i + 1, bus.fds[0], bus.gddr, clock)
            await node.start()
            for other, (view, fd) in views.items():
                if other != i + 1:
                    node.members.add_memory(other, view, fd)
            card = Card(
                bus,
                page,
                node,
                fab.host.add_link(i + 1, host_ports(bus, page)),
                node.add_link(0, card_ports(bus, page)),
            )
            fab.cards.append(card)
            if dma:
                card.dma = Dma(i, bus, fab.host, node)
                card.host_link.ports.quiesce = card.dma.quiesce
            card.host_link.start()
            card.card_link.start()
            card.host_link.poke()
        if wait:
            await eventually(
                lambda: all(len(n.node_ids()) == cards + 1 for n in fab.nodes), "all nodes online"
            )
        yield fab
    finally:
        if fab is not None:
            for card in fab.cards:
                if card.dma is not None:
                    card.dma.stop()
                card.card_link.down()
                card.host_link.down()
                if card.dma is not None:
                    card.dma.engine.close()
            for node in fab.nodes:
                await node.close()
            for card in fab.cards:
                card.bus.close()
        if lone is not None:
            lone.close()
        close_all([host_fd])


async def eventually(condition: Callable[[], object], what: str, within_s: float = 20.0) -> None:
    """Let the loop run until ``condition`` holds; fails with ``what`` after ``within_s`` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while not condition():
        assert loop.time() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.001)
