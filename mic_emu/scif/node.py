"""A SCIF node: its tables, its memory, the routing of messages (SCIF 3). One per host and per card OS.

It lives in an asyncio loop. Cards reach each other through the host, which forwards their messages;
the bytes of their connections go straight through memory that the host made known to both.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from mic_emu.clock import Clock
from mic_emu.memory import PageAllocator, View
from mic_emu.scif.deadlines import Deadlines
from mic_emu.scif.endpoint import Endpoint
from mic_emu.scif.errors import Late, ScifError
from mic_emu.scif.events import Events
from mic_emu.scif.fences import Fences
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.limits import NODE_ALIVE_S
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.lists import Lists
from mic_emu.scif.membership import HOST, Membership, PeerCallback
from mic_emu.scif.notifier import Notifier
from mic_emu.scif.pages import Pages
from mic_emu.scif.paths import Path, SelfPath
from mic_emu.scif.ports import Ports
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.questions import Questions
from mic_emu.scif.queue_pairs import QueuePairs
from mic_emu.scif.records import Records
from mic_emu.scif.rma import Rma
from mic_emu.scif.traffic import Traffic
from mic_emu.scif.windows import WindowTable


class Logger(Protocol):
    """What the node needs of a log: ``mic_emu.log.Log`` or ``logging.Logger``."""

    def debug(self, msg: str, /, *args: object) -> None: ...
    def info(self, msg: str, /, *args: object) -> None: ...
    def warning(self, msg: str, /, *args: object) -> None: ...
    def error(self, msg: str, /, *args: object) -> None: ...


class Node:
    """Node ``node_id``: 0 is the host, n the card n - 1 (SCIF-126).

    allocator, memory: our node memory; programs map parts of it through the allocator's descriptor.
    window_allocator: pages for programs' windows, of the same object (a card's window bank).
    """

    def __init__(
        self,
        node_id: int,
        allocator: PageAllocator,
        memory: View,
        clock: Clock | None = None,
        log: Logger | None = None,
        window_allocator: PageAllocator | None = None,
    ) -> None:
        self.id = node_id
        self.allocator = allocator
        self.window_allocator = window_allocator or allocator
        self.memory = memory
        self.memory_fd = allocator.fd
        self.clock = clock or Clock()
        self.log: Logger = log or logging.getLogger("micemu.scif")
        self.answers = Deadlines(self.clock, self.clock.api(NODE_ALIVE_S))  # of connects and closes
        self.trace = False  # log every message (SCIF 3.8)
        self.ports = Ports()
        self.endpoints: dict[int, Endpoint] = {}
        self.draining: set[Lists] = set()  # window lists with copies that somebody waits for
        self.listeners: dict[int, Endpoint] = {}
        self.links: dict[int, Link] = {}
        self.events = Events()
        self.notifier = Notifier(self)
        self.queue_pairs = QueuePairs(self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ids = itertools.count(secrets.randbits(24) << 32 | 1)
        self._handlers: dict[int, Callable[[Msg, Link | None], None]] = {
            Op.CNCT_REQ: self._on_request,
            Op.CNCT_GNT: self._on_grant,
            Op.CNCT_GNTACK: lambda msg, link: self._endpoint(msg.p0).on_final(msg),
            Op.CNCT_GNTNACK: lambda msg, link: self._endpoint(msg.p0).on_final(msg),
            Op.CNCT_REJ: lambda msg, link: self._endpoint(msg.p0).on_reject(msg),
            Op.DISCNCT: self._on_disconnect,
            Op.DISCNCT_ACK: self._on_disconnect_ack,
            Op.CLIENT_SENT: lambda msg, link: self._of_peer(msg).on_sent(),
            Op.CLIENT_RCVD: lambda msg, link: self._of_peer(msg).on_received(),
        }  # fmt: skip
        self.members = Membership(self, SelfPath(self))
        self.pages = Pages(self)
        self.questions = Questions(self)
        self.records = Records(self)
        self.windows = WindowTable(self)
        self.rma = Rma(self)
        self.fences = Fences(self)
        self.traffic = Traffic(self)

    def add_handler(self, op: Op, handler: Callable[[Msg, Link | None], None]) -> None:
        """Serve an opcode."""
        self._handlers[op] = handler

    # --- what clients use ---------------------------------------------------------------------

    async def start(self) -> None:
        """Ready for use; the node is its own first peer (loopback needs no card)."""
        self.notifier.start()

    def open(self) -> KernelEndpoint:
        """A new unbound endpoint for a kernel client."""
        return KernelEndpoint(self)

    @property
    def used_bytes(self) -> int:
        """Node memory in use: by the node, and by programs' windows."""
        used = self.allocator.used_bytes
        return used if self.window_allocator is self.allocator else used + self.window_allocator.used_bytes

    def node_ids(self) -> list[int]:
        """Online nodes including this one, ascending (SCIF-125)."""
        return self.members.ids()

    def on_peer(self, callback: PeerCallback) -> Callable[[], None]:
        """Call ``callback(node, online)`` for every peer, now and on every change (``Membership.on_peer``)."""
        return self.members.on_peer(callback)

    @property
    def maxid(self) -> int:
        """The highest node id that was ever seen."""
        return self.members.maxid

    def add_link(self, peer_id: int, ports: LinkPorts) -> Link:
        """A link to a neighbour; the caller starts it. Replaces one that is down."""
        old = self.links.get(peer_id)
        if old is not None:
            self.members.lose_link(old)
        link = Link(self, peer_id, ports, self.log)
        self.links[peer_id] = link
        return link

    def attached(self) -> None:
        """A link has got its rings, or has lost them."""
        self.events.set_links([link for link in self.links.values() if link.rings is not None])

    async def close(self) -> None:
        """Leave: every link orderly down, every task ended."""
        for link in list(self.links.values()):
            await link.stop()
        for ep in list(self.endpoints.values()):
            ep.destroy()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.queue_pairs.close()
        self.answers.close()
        self.pages.close()
        self.members.close()
        self.notifier.stop()
        self.events.close()

    # --- what endpoints and links use ---------------------------------------------------------

    def new_id(self) -> int:
        """An opaque 64-bit id, never used before."""
        return next(self._ids)

    def path(self, node_id: int) -> Path | None:
        """The way to an online node, None when it is not."""
        return self.members.online.get(node_id)

    def look_at_copies(self) -> None:
        """A copy of a program has ended, or a process."""
        for lists in list(self.draining):
            lists.look()

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a task of the node; its failure is logged."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ScifError):  # those went to whoever waits
            self.log.error("node %d: %s failed: %r", self.id, task.get_name(), error)

    def _endpoint(self, ep_id: int) -> Endpoint:
        try:
            return self.endpoints[ep_id]
        except KeyError:
            raise Late(errno.EINVAL, f"no endpoint {ep_id:#x}") from None

    def _of_peer(self, msg: Msg) -> Endpoint:
        """The endpoint that its peer writes about. Raises ScifError."""
        ep = self._endpoint(msg.p0)
        if ep.peer[0] != msg.src[0]:
            raise ScifError(errno.EINVAL, f"{ep!r} is not connected to node {msg.src[0]}")
        return ep

    # --- messages -----------------------------------------------------------------------------

    def handle(self, msg: Msg, link: Link | None) -> None:
        """One message from ``link`` (None: from ourselves). Raises ScifError when it makes no sense."""
        if link is not None and not self._plausible(msg, link):
            raise ScifError(errno.EINVAL, "wrong node ids")
        if msg.dst[0] != self.id:
            self._forward(msg)
            return
        handler = self._handlers.get(msg.op)
        if handler is None:
            raise ScifError(errno.EINVAL, f"unknown opcode {msg.op}")
        handler(msg, link)

    def log_dropped(self, msg: Msg, sender: str, error: Exception) -> None:
        """``handle`` has raised ``error``."""
        log = self.log.debug if isinstance(error, Late) else self.log.warning
        log("node %d: dropped %s from %s: %s", self.id, msg, sender, error)

    def _plausible(self, msg: Msg, link: Link) -> bool:
        """Does the source match the link it came from? On a card the host relays for other cards."""
        if self.id == HOST:
            return msg.src[0] == link.peer_id
        return msg.src[0] != self.id and msg.dst[0] == self.id

    def _forward(self, msg: Msg) -> None:
        path = self.members.online.get(msg.dst[0])
        if path is None or msg.dst[0] == msg.src[0]:
            raise ScifError(errno.ENODEV, f"node {msg.dst[0]} is not online")
        path.send(msg)

    def _on_request(self, msg: Msg, link: Link | None) -> None:
        path = self.members.online.get(msg.src[0])
        if path is None:
            raise ScifError(errno.ENODEV, "request from a node that is not online")
        listener = self.listeners.get(msg.dst[1])
        if listener is None:
            path.send(msg.answer(Op.CNCT_REJ))
        else:
            listener.on_request(msg, path)

    def _on_grant(self, msg: Msg, link: Link | None) -> None:
        ep = self.endpoints.get(msg.p0)
        try:
            if ep is None:
                raise Late(errno.EINVAL, "grant for nobody")
            ep.on_grant(msg)
        except ScifError:
            # The request was withdrawn: the acceptor must not wait for us (SCIF-37).
            path = self.members.online.get(msg.src[0])
            if path is not None:
                path.send(msg.answer(Op.CNCT_GNTNACK, p0=msg.p2, p1=0, p2=0))
            raise

    def _on_disconnect(self, msg: Msg, link: Link | None) -> None:
        path = self.members.online.get(msg.src[0])
        try:
            if msg.p1:
                if not self.queue_pairs.peer_closed(msg.p1, msg.src[0]):
                    self._endpoint(msg.p1).on_disconnect(msg)
            else:
                listener = self.listeners.get(msg.dst[1])
                if listener is not None:
                    listener.drop_request(msg.src[0], msg.p0)
        finally:
            if path is not None:
                path.send(msg.answer(Op.DISCNCT_ACK))

    def _on_disconnect_ack(self, msg: Msg, link: Link | None) -> None:
        if msg.p0 in self.endpoints:  # else a withdrawn request's: nobody waits
            self._of_peer(msg).on_disconnect_ack()
