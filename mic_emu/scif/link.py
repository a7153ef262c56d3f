"""One node queue pair to a neighbour: publication, attachment, messages (SCIF 3.2-3.6).

The host has a link to each card, a card has one to the host. Everything the peer can write is
checked; what is wrong is logged and dropped.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mic_emu.bar import drain
from mic_emu.memory import View, in_bank
from mic_emu.scif import qp as queue
from mic_emu.scif.engine import Keep, free_now
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import MSG_SIZE, Msg, Op

if TYPE_CHECKING:
    from mic_emu.scif.node import Logger, Node

POLL_S = 1.0  # how often the device page is looked at (HW-46)
RING_FULL_S = 3.0
RETRY_S = 0.001
BATCH = 64  # messages handled before the loop may do something else


@dataclass
class LinkPorts:
    """How a link reaches the other side; given by whoever owns the bus.

    own_addr: bus address, as the peer sees it, of an offset in our memory.
    peer_view: memory at a bus address of the peer; IndexError when any byte is outside.
    ring: ring the peer's SCIF doorbell.
    doorbell_fd: eventfd that our own SCIF doorbell raises; stays the caller's.
    publish: write our queue pair's bus address into the device page (0 = absent).
    fetch: read the peer's queue pair address from the device page (0 = absent).
    peer_memory, peer_fd: the peer's whole memory, for programs that map parts of it.
    quiesce: the peer is about to be lost; stop its DMA channels before pages that they reach are freed.
    keep: takes what frees such pages, when the channels could not be stopped.
    disturbed: fault filters act on doorbells: what has not been rung for must not be found.
    peer_bank: the peer is a card: its windows lie in the window bank behind its memory.
    """

    own_addr: Callable[[int], int]
    peer_view: Callable[[int, int], View]
    ring: Callable[[], None]
    doorbell_fd: int
    publish: Callable[[int], None]
    fetch: Callable[[], int]
    peer_memory: View | None = None
    peer_fd: int = -1
    quiesce: Callable[[], None] = lambda: None
    keep: Keep = free_now
    disturbed: Callable[[], bool] = lambda: False
    peer_bank: bool = False


class Link:
    """The queue pair between ``node`` and its neighbour ``peer_id``."""

    def __init__(self, node: Node, peer_id: int, ports: LinkPorts, log: Logger) -> None:
        self.node = node
        self.peer_id = peer_id
        self.ports = ports
        self.log = log
        self.qp: queue.QueuePair | None = None
        self.rings: queue.Rings | None = None
        self.stuck = False
        self.service_path: str | os.PathLike[str] | None = None  # the card's socket for programs
        self.exit_acked: asyncio.Future[None] | None = None
        self._backlog: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._poller: asyncio.Task[None] | None = None
        self._poke = asyncio.Event()
        self._reading = False
        self.sent = self.received = self.dropped = 0

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Allocate and publish our queue pair, listen to the doorbell, look for the peer's.

        Raises OutOfNodeMemory (ENOMEM).
        """
        self.qp = queue.QueuePair.create(
            self.node.memory, self.node.allocator, queue.NODE_RING, self.ports.own_addr
        )
        drain(self.ports.doorbell_fd)
        self.node.events.add(self.ports.doorbell_fd, self.on_doorbell)
        self._reading = True
        self.ports.publish(self.ports.own_addr(self.qp.offset))
        self._poller = self.node.spawn(self._find_peer(), f"find node {self.peer_id}")

    def poke(self) -> None:
        """Look for the peer's address now instead of at the next tick."""
        self._poke.set()

    async def _find_peer(self) -> None:
        """Look at the device page once per second, or when poked, until the peer is attached (HW-46)."""
        while self.rings is None:
            addr = self.ports.fetch()
            if addr and self.attach(addr):
                return
            timer = self.node.clock.alarm(self.node.clock.delay(POLL_S), self._poke.set)
            await self._poke.wait()
            timer.cancel()
            self._poke.clear()

    def attach(self, peer_qp_addr: int) -> bool:
        """The peer's queue pair is at ``peer_qp_addr``: attach and send INIT. False: it is not one."""
        if self.rings is not None or self.qp is None:
            return self.rings is not None
        try:
            self.rings = queue.attach(self.qp, peer_qp_addr, self.ports.peer_view).rings
        except ScifError as e:
            self.log.warning("node %d: cannot attach to node %d: %s", self.node.id, self.peer_id, e)
            return False
        self.node.attached()
        self.send(Msg(Op.INIT, (self.node.id, 0), (self.peer_id, 0)))
        self.on_doorbell()  # the peer may have been first
        return True

    def close(self) -> None:
        """Stop listening and free the queue pair; the node has already dropped the peer."""
        if self._reading:
            self.node.events.remove(self.ports.doorbell_fd)
            self._reading = False
        if self._poller:
            self._poller.cancel()
            self._poller = None
        if self._retry:
            self._retry.cancel()
            self._retry = None
        self._backlog.clear()
        if self.rings is not None:
            self.rings = None
            self.node.attached()
        if self.qp:
            self.qp.free()
            self.qp = None

    def withdraw(self) -> None:
        """Take our address out of the device page."""
        self.ports.publish(0)

    def down(self) -> None:
        """The peer is gone without a word: node removal on this side (SCIF 3.7)."""
        self.node.members.lose_link(self)

    async def stop(self) -> None:
        """Orderly end: tell the others, EXIT, wait for EXIT_ACK at most the node timeout, drop the peer."""
        await self.node.members.leave_link(self)

    # --- messages -----------------------------------------------------------------------------

    def send(self, msg: Msg) -> None:
        """Queue one message. When the ring is full it is retried for up to 3 s, then dropped."""
        if self.node.trace:
            self.log.debug("send %s", msg)
        frame = msg.pack()
        if self.rings is None:
            self.dropped += 1
            return
        if self._backlog or not self._put(frame):
            self._backlog.append(frame)
            if self._retry is None:
                self._schedule_retry(self.node.clock.monotonic() + self.node.clock.api(RING_FULL_S))
        else:
            self.ports.ring()

    def _put(self, frame: bytes) -> bool:
        try:
            if self.rings is None or not self.rings.put(frame):
                return False
        except ScifError as e:
            self.log.error("node %d: the queue to node %d is damaged: %s", self.node.id, self.peer_id, e)
            return False
        self.sent += 1
        self.stuck = False
        return True

    def _schedule_retry(self, give_up: float) -> None:
        self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._flush, give_up)

    def _flush(self, give_up: float) -> None:
        self._retry = None
        moved = False
        while self._backlog and self._put(self._backlog[0]):
            self._backlog.popleft()
            moved = True
        if moved:
            self.ports.ring()
            give_up = self.node.clock.monotonic() + self.node.clock.api(RING_FULL_S)
        if not self._backlog:
            return
        if self.node.clock.monotonic() >= give_up:
            self.log.error(
                "node %d: node %d does not take messages; %d dropped",
                self.node.id,
                self.peer_id,
                len(self._backlog),
            )
            self.dropped += len(self._backlog)
            self._backlog.clear()
            self.stuck = True
            return
        self._schedule_retry(give_up)

    def on_doorbell(self) -> None:
        """The peer has rung."""
        drain(self.ports.doorbell_fd)
        if self.rings is None:
            self.poke()
            return
        self.take()

    def take(self) -> None:
        """Handle what the peer has sent, rung or not."""
        for _ in range(BATCH):
            rings = self.rings
            if rings is None:
                return
            try:
                frame = rings.get(MSG_SIZE)
            except ScifError as e:
                self.log.error(
                    "node %d: the queue from node %d is damaged: %s", self.node.id, self.peer_id, e
                )
                return
            if frame is None:
                return
            self.received += 1
            msg = Msg.unpack(frame)
            if self.node.trace:
                self.log.debug("recv %s", msg)
            try:
                self.node.handle(msg, self)
            except (ScifError, KeyError, ValueError, IndexError, OSError) as e:
                self.dropped += 1
                self.node.log_dropped(msg, f"node {self.peer_id}", e)
        asyncio.get_running_loop().call_soon(self.take)

    # --- path to the peer ---------------------------------------------------------------------

    def own_addr(self, offset: int) -> int:
        """Bus address at which the peer finds our memory."""
        return self.ports.own_addr(offset)

    def peer_view(self, addr: int, length: int) -> View:
        """The peer's memory at one of its bus addresses."""
        return self.ports.peer_view(addr, length)

    def peer_place(self, addr: int, length: int) -> tuple[int, int]:
        """(descriptor, offset) through which a program maps the peer's memory at ``addr``.

        Raises ScifError ENODEV when this link has no descriptor, IndexError when it is outside.
        """
        memory = self.ports.peer_memory
        if memory is None or self.ports.peer_fd < 0:
            raise ScifError(errno.ENODEV, f"memory of node {self.peer_id} cannot be mapped")
        return self.ports.peer_fd, int(self.peer_view(addr, length).pointer - memory.pointer)

    def window_place(self, addr: int, length: int) -> tuple[int, int]:
        """(descriptor, offset) of pages of a window of the peer. Raises ScifError ENODEV, IndexError."""
        memory = self.ports.peer_memory
        if memory is None or not self.ports.peer_bank:
            return self.peer_place(addr, length)
        return self.ports.peer_fd, in_bank(addr, length, memory.size)

    def dup_bank(self) -> int:
        """A descriptor of the peer's memory, for revoking its windows when it is lost; -1: it has no bank."""
        return os.dup(self.ports.peer_fd) if self.ports.peer_bank else -1
