"""Two or more SCIF nodes over real card memories, in one process, without board or host driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from mic_emu import layout
from mic_emu.bar import Bus, close_all, create_slot
from mic_emu.clock import Clock
from mic_emu.memory import PageAllocator, View, create_shm, window_allocator
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.node import Node

MIB = 1 << 20
SMPT = layout.CONSTANTS["SMPT_BASE"]


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
    """Host doorbell 0 raises vector 0; the first SMPT entry maps host address 0."""
    bus.write("smpt", 0)
    bus.write("mxar", 1, 0)
    bus.write("siac0", 1)
    bus.write("sice0", 1)


def node_over(node_id: int, fd: int, view: View, clock: Clock) -> Node:
    """A node over a memory without its first MiB; a card's has its windows in the window bank."""
    allocator = PageAllocator(fd, 1 * MIB, view.size)
    bank = window_allocator(allocator, view.size) if node_id else None
    return Node(node_id, allocator, view, clock, logging.getLogger(f"scif{node_id}"), bank)


@contextlib.asynccontextmanager
async def fabric(cards: int = 1, *, clock: Clock | None = None, wait: bool = True) -> AsyncIterator[Fabric]:
    """Node 0 with ``cards`` cards, all online when ``wait``."""
    clock = clock or Clock("fast")
    host_fd = create_shm("test-host", 64 * MIB)
    fab: Fabric | None = None
    lone: Bus | None = None
    try:
        buses = [Bus(create_slot(f"t{i}", 64 * MIB, host_fd)) for i in range(max(cards, 1))]
        lone = None if cards else buses[0]
        fab = Fabric(node_over(0, host_fd, buses[0].host, clock), host_fd, clock)
        await fab.host.start()
        views = {i + 1: (b.gddr, b.fds[0]) for i, b in enumerate(buses)}
        for i in range(cards):
            bus, page = buses[i], Page()
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
                card.card_link.down()
                card.host_link.down()
            for node in fab.nodes:
                await node.close()
            for card in fab.cards:
                card.bus.close()
        if lone is not None:
            lone.close()
        close_all([host_fd])


async def eventually(condition: Callable[[], object], what: str, within_s: float = 10.0) -> None:
    """Let the loop run until ``condition`` holds; fails with ``what`` after ``within_s`` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while not condition():
        assert loop.time() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.001)
