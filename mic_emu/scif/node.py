"""A SCIF node: peers, message routing, node membership (SCIF 3). One per host and per card OS.

It lives in an asyncio loop. Cards reach each other through the host, which forwards their messages;
the bytes of their connections go straight through memory that the host made known to both.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.clock import Alarm, Clock, settle
from mic_emu.memory import PAGE, OutOfNodeMemory, PageAllocator, View
from mic_emu.scif import qp as queue
from mic_emu.scif.endpoint import NODE_ALIVE_S, Endpoint
from mic_emu.scif.errors import ScifError
from mic_emu.scif.fences import Fences
from mic_emu.scif.link import Link, LinkPorts
from mic_emu.scif.notifier import Notifier
from mic_emu.scif.pages import Pages
from mic_emu.scif.ports import Ports
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.windows import WindowTable

HOST = 0
RETIRE_S = 0.5
HAND_OVER_S = 5.0
PeerCallback = Callable[[int, bool], None]


class Logger(Protocol):
    """What the node needs of a log: ``mic_emu.log.Log`` or ``logging.Logger``."""

    def debug(self, msg: str, /, *args: object) -> None: ...
    def info(self, msg: str, /, *args: object) -> None: ...
    def warning(self, msg: str, /, *args: object) -> None: ...
    def error(self, msg: str, /, *args: object) -> None: ...


class Path(Protocol):
    """How messages and memory of one online node are reached."""

    def send(self, msg: Msg) -> None: ...
    def own_addr(self, offset: int) -> int: ...
    def peer_view(self, addr: int, length: int) -> View: ...
    def peer_place(self, addr: int, length: int) -> tuple[int, int]: ...


class SelfPath:
    """Loopback: the node is its own peer; messages go through the loop, never through the caller."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def send(self, msg: Msg) -> None:
        """Deliver after the current callback, in order."""
        asyncio.get_running_loop().call_soon(self._deliver, msg)

    def _deliver(self, msg: Msg) -> None:
        try:
            self.node.handle(msg, None)
        except (ScifError, KeyError, ValueError) as e:
            self.node.log.warning("node %d: dropped %s from itself: %s", self.node.id, msg, e)

    def own_addr(self, offset: int) -> int:
        """Our offsets are the addresses."""
        return offset

    def peer_view(self, addr: int, length: int) -> View:
        """Our own memory."""
        return self.node.memory.sub(addr, length)

    def peer_place(self, addr: int, length: int) -> tuple[int, int]:
        """Our own memory, by descriptor."""
        self.node.memory.sub(addr, length)
        return self.node.memory_fd, addr


class RelayPath:
    """Another card: messages through the host, memory through its descriptor (offset = address)."""

    def __init__(self, link: Link, memory: View, fd: int) -> None:
        self.link, self.memory, self.fd = link, memory, fd

    def send(self, msg: Msg) -> None:
        """Hand it to the host, which forwards it."""
        self.link.send(msg)

    def own_addr(self, offset: int) -> int:
        """Our offsets are the addresses."""
        return offset

    def peer_view(self, addr: int, length: int) -> View:
        """The other card's memory."""
        return self.memory.sub(addr, length)

    def peer_place(self, addr: int, length: int) -> tuple[int, int]:
        """The other card's memory, by descriptor."""
        self.memory.sub(addr, length)
        return self.fd, addr


async def hand_over_memory(to: Link, of: Link) -> None:
    """Give the card behind ``to`` the memory of the card behind ``of``, through its programs' socket.

    A card that cannot take it answers NODE_ADD_NACK, and the two are not peers.
    """
    memory = of.ports.peer_memory
    if to.service_path is None or memory is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        packet = struct.pack("<IIQ6Q", lib.MIC_SCIF_MEMORY, 0, 0, of.peer_id, memory.size, 0, 0, 0, 0)
        try:
            sock.connect(os.fspath(to.service_path))
            socket.send_fds(sock, [packet], [of.ports.peer_fd])
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 256), HAND_OVER_S)
        except (OSError, asyncio.TimeoutError) as e:
            to.log.warning("node %d: cannot hand over memory to node %d: %s", to.node.id, to.peer_id, e)


class Node:
    """Node ``node_id``: 0 is the host, n the card n - 1 (SCIF-126).

    allocator, memory: our node memory; programs map parts of it through the allocator's descriptor.
    """

    def __init__(
        self,
        node_id: int,
        allocator: PageAllocator,
        memory: View,
        clock: Clock | None = None,
        log: Logger | None = None,
    ) -> None:
        self.id = node_id
        self.allocator = allocator
        self.memory = memory
        self.memory_fd = allocator.fd
        self.clock = clock or Clock()
        self.log: Logger = log or logging.getLogger("micemu.scif")
        self.trace = False  # log every message (SCIF 3.8)
        self.ports = Ports()
        self.endpoints: dict[int, Endpoint] = {}
        self.listeners: dict[int, Endpoint] = {}
        self.links: dict[int, Link] = {}
        self.maxid = node_id
        self.notifier = Notifier(self)
        self._reaper: Alarm | None = None
        self._retired: deque[tuple[float, queue.QueuePair]] = deque()
        self._self_path = SelfPath(self)
        self._online: dict[int, Path] = {node_id: self._self_path}
        self._memories: dict[int, tuple[View, int]] = {}
        self._callbacks: list[PeerCallback] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ids = itertools.count(secrets.randbits(24) << 32 | 1)
        self._info: dict[int, asyncio.Future[None]] = {}
        self._handlers: dict[int, Callable[[Msg, Link | None], None]] = {
            Op.INIT: self._on_init,
            Op.EXIT: self._on_exit,
            Op.EXIT_ACK: self._on_exit_ack,
            Op.NODE_ADD: self._on_node_add,
            Op.NODE_ADD_ACK: self._on_node_add_ack,
            Op.NODE_ADD_NACK: self._on_node_add_nack,
            Op.NODE_REMOVE: self._on_node_remove,
            Op.NODE_REMOVE_ACK: lambda msg, link: None,
            Op.GET_NODE_INFO: self._on_node_info,
            Op.CNCT_REQ: self._on_request,
            Op.CNCT_GNT: self._on_grant,
            Op.CNCT_GNTACK: lambda msg, link: self._endpoint(msg.p0).on_final(msg),
            Op.CNCT_GNTNACK: lambda msg, link: self._endpoint(msg.p0).on_final(msg),
            Op.CNCT_REJ: lambda msg, link: self._endpoint(msg.p0).on_reject(msg),
            Op.DISCNCT: self._on_disconnect,
            Op.DISCNCT_ACK: self._on_disconnect_ack,
            Op.CLIENT_SENT: lambda msg, link: self._endpoint(msg.p0).on_sent(),
            Op.CLIENT_RCVD: lambda msg, link: self._endpoint(msg.p0).on_received(),
        }  # fmt: skip
        self.pages = Pages(self)
        self.windows = WindowTable(self)
        self.fences = Fences(self)

    def add_handler(self, op: Op, handler: Callable[[Msg, Link | None], None]) -> None:
        """Serve an opcode."""
        self._handlers[op] = handler

    # --- what clients use ---------------------------------------------------------------------

    async def start(self) -> None:
        """Ready for use; the node is its own first peer (loopback needs no card)."""
        self.notifier.start()

    def open(self) -> Endpoint:
        """A new unbound endpoint for a kernel client."""
        return Endpoint(self)

    def node_ids(self) -> list[int]:
        """Online nodes including this one, ascending (SCIF-125)."""
        return sorted(self._online)

    def on_peer(self, callback: PeerCallback) -> Callable[[], None]:
        """Call ``callback(node, online)`` for every peer that is online now or changes later.

        Online comes when the node can be connected to, offline before its endpoints are torn down
        (SCIF-131). Returns the function that ends it.
        """
        self._callbacks.append(callback)
        for node_id in self.node_ids():
            callback(node_id, True)
        return lambda: self._callbacks.remove(callback)

    def add_link(self, peer_id: int, ports: LinkPorts) -> Link:
        """A link to a neighbour; the caller starts it. Replaces one that is down."""
        old = self.links.get(peer_id)
        if old is not None:
            self.lose_link(old)
        link = Link(self, peer_id, ports, self.log)
        self.links[peer_id] = link
        return link

    def add_memory(self, node_id: int, memory: View, fd: int) -> None:
        """Memory of another card, for card-to-card connections; before its NODE_ADD arrives.

        ``fd`` is duplicated.
        """
        self._forget_memory(node_id)
        self._memories[node_id] = (memory, os.dup(fd))

    def _forget_memory(self, node_id: int) -> None:
        known = self._memories.pop(node_id, None)
        if known is not None:
            os.close(known[1])

    async def refresh_info(self) -> None:
        """Ask the host for the highest id (GET_NODE_INFO); on the host there is nothing to ask."""
        link = self.links.get(HOST)
        if self.id == HOST or link is None:
            return
        key = next(self._ids)
        self._info[key] = asyncio.get_running_loop().create_future()
        try:
            link.send(Msg(Op.GET_NODE_INFO, (self.id, 0), (HOST, 0), p3=key))
            await asyncio.wait_for(self._info[key], self.clock.api(NODE_ALIVE_S))
        finally:
            del self._info[key]

    async def close(self) -> None:
        """Leave: every link orderly down, every task ended."""
        for link in list(self.links.values()):
            await link.stop()
        for ep in list(self.endpoints.values()):
            ep.destroy()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reaper is not None:
            self._reaper.cancel()
        self.free_retired()
        self.pages.close()
        for node_id in list(self._memories):
            self._forget_memory(node_id)
        self.notifier.stop()

    # --- what endpoints and links use ---------------------------------------------------------

    def new_id(self) -> int:
        """An opaque 64-bit id, never used before."""
        return next(self._ids)

    def path(self, node_id: int) -> Path | None:
        """The way to an online node, None when it is not."""
        return self._online.get(node_id)

    def new_qp(self, path: Path) -> queue.QueuePair:
        """Queue pair, ring and control page of one endpoint. Raises OutOfNodeMemory."""
        self.notifier.start()
        self._reap(self.clock.monotonic() - RETIRE_S)
        try:
            return self._new_qp(path)
        except OutOfNodeMemory:
            self.free_retired()
            return self._new_qp(path)

    def retire_qp(self, qp: queue.QueuePair) -> None:
        """Free a queue pair after a while: a program in the middle of a copy may still write into it."""
        qp.invalidate()
        qp.control.sid = 0
        now = self.clock.monotonic()
        self._retired.append((now, qp))
        if self._reaper is None:
            self._reaper = self.clock.alarm(RETIRE_S, self._reap_tick)

    def free_retired(self) -> None:
        """Free what waits for that now."""
        self._reap(float("inf"))

    def _reap_tick(self) -> None:
        self._reaper = None
        self._reap(self.clock.monotonic() - RETIRE_S)
        if self._retired:
            self._reaper = self.clock.alarm(RETIRE_S, self._reap_tick)

    def _reap(self, before: float) -> None:
        while self._retired and self._retired[0][0] <= before:
            self._retired.popleft()[1].free()

    def _new_qp(self, path: Path) -> queue.QueuePair:
        return queue.QueuePair.create(self.memory, self.allocator, queue.EP_RING, path.own_addr, PAGE)

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
            raise ScifError(errno.EINVAL, f"no endpoint {ep_id:#x}") from None

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

    def _plausible(self, msg: Msg, link: Link) -> bool:
        """Does the source match the link it came from? On a card the host relays for other cards."""
        if self.id == HOST:
            return msg.src[0] == link.peer_id
        return msg.src[0] != self.id and msg.dst[0] == self.id

    def _forward(self, msg: Msg) -> None:
        path = self._online.get(msg.dst[0])
        if path is None or msg.dst[0] == msg.src[0]:
            raise ScifError(errno.ENODEV, f"node {msg.dst[0]} is not online")
        path.send(msg)

    def _on_request(self, msg: Msg, link: Link | None) -> None:
        path = self._online.get(msg.src[0])
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
                raise ScifError(errno.EINVAL, "grant for nobody")
            ep.on_grant(msg)
        except ScifError:
            # The request was withdrawn: the acceptor must not wait for us (SCIF-37).
            path = self._online.get(msg.src[0])
            if path is not None:
                path.send(msg.answer(Op.CNCT_GNTNACK, p0=msg.p2, p1=0, p2=0))
            raise

    def _on_disconnect(self, msg: Msg, link: Link | None) -> None:
        path = self._online.get(msg.src[0])
        try:
            if msg.p1:
                self._endpoint(msg.p1).on_disconnect(msg)
            else:
                listener = self.listeners.get(msg.dst[1])
                if listener is not None:
                    listener.drop_request(msg.src[0], msg.p0)
        finally:
            if path is not None:
                path.send(msg.answer(Op.DISCNCT_ACK))

    def _on_disconnect_ack(self, msg: Msg, link: Link | None) -> None:
        ep = self.endpoints.get(msg.p0)
        if ep is not None:  # else a withdrawn request's: nobody waits
            ep.on_disconnect_ack()

    # --- membership ---------------------------------------------------------------------------

    def _on_init(self, msg: Msg, link: Link | None) -> None:
        if link is None:
            raise ScifError(errno.EINVAL, "INIT from ourselves")
        self._peer_online(link.peer_id, link)
        if self.id == HOST:
            for other in self.node_ids():
                if other not in (HOST, link.peer_id):
                    self.spawn(self._introduce(other, link.peer_id), "introduce two cards")

    async def _introduce(self, i: int, j: int) -> None:
        """Tell two cards about each other (NODE_ADD); each first gets the other's memory."""
        for a, b in ((i, j), (j, i)):
            if a in self.links and b in self.links:
                await hand_over_memory(self.links[a], self.links[b])
        for a, b in ((i, j), (j, i)):
            path, link = self._online.get(a), self.links.get(b)
            if path is None or link is None or b not in self._online:
                return
            size = link.ports.peer_memory.size if link.ports.peer_memory is not None else 0
            path.send(Msg(Op.NODE_ADD, (b, 0), (a, 0), 0, layout.CONSTANTS["CARD_MMIO_BASE"], 0, size))

    def _on_node_add(self, msg: Msg, link: Link | None) -> None:
        if link is None or link.peer_id != HOST:
            raise ScifError(errno.EINVAL, "NODE_ADD comes from the host")
        known = msg.src[0] in self._memories
        link.send(msg.answer(Op.NODE_ADD_ACK if known else Op.NODE_ADD_NACK))

    def _on_node_add_ack(self, msg: Msg, link: Link | None) -> None:
        if link is None or self.id == HOST or msg.src[0] not in self._memories:
            raise ScifError(errno.EINVAL, "NODE_ADD_ACK for nobody")
        memory, fd = self._memories[msg.src[0]]
        self._peer_online(msg.src[0], RelayPath(link, memory, fd))

    def _on_node_add_nack(self, msg: Msg, link: Link | None) -> None:
        self.log.info("node %d: node %d cannot reach our memory: no direct connections", self.id, msg.src[0])

    def _on_node_remove(self, msg: Msg, link: Link | None) -> None:
        if link is None or link.peer_id != HOST or msg.p0 == HOST:
            raise ScifError(errno.EINVAL, "NODE_REMOVE comes from the host")
        self.peer_lost(msg.p0)
        link.send(msg.answer(Op.NODE_REMOVE_ACK))

    def _on_node_info(self, msg: Msg, link: Link | None) -> None:
        if self.id == HOST:
            path = self._online[msg.src[0]]
            path.send(msg.answer(Op.GET_NODE_INFO, p1=self.maxid, p2=len(self._online)))
            return
        self.maxid = max(self.maxid, msg.p1 & 0xFFFF)
        waiter = self._info.get(msg.p3)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _peer_online(self, node_id: int, path: Path) -> None:
        if self._online.get(node_id) is path:
            return
        if node_id in self._online:
            self.peer_lost(node_id)
        self._online[node_id] = path
        self.maxid = max(self.maxid, node_id)
        self.log.info("node %d: node %d is online", self.id, node_id)
        self._tell_clients(node_id, True)

    def peer_lost(self, node_id: int) -> None:
        """Cleanup for a lost node: clients first, then its endpoints (SCIF 3.7)."""
        if node_id == self.id or node_id not in self._online:
            return
        self.log.info("node %d: node %d is offline", self.id, node_id)
        self._tell_clients(node_id, False)
        del self._online[node_id]
        for ep in list(self.endpoints.values()):
            ep.node_lost(node_id)
        self.windows.node_lost(node_id)
        if self.id != HOST:
            self._forget_memory(node_id)

    def _tell_clients(self, node_id: int, online: bool) -> None:
        for callback in list(self._callbacks):
            try:
                callback(node_id, online)
            except Exception as e:  # a client's mistake must not take the node down
                self.log.error("node %d: a client failed on node %d: %r", self.id, node_id, e)

    def lose_link(self, link: Link) -> None:
        """The neighbour is gone: drop it, and on a card everybody behind it; tell the others."""
        if self.links.get(link.peer_id) is link:
            del self.links[link.peer_id]
        elif link.qp is None:
            return
        if link.exit_acked is not None and not link.exit_acked.done():
            link.exit_acked.set_result(None)
        if self.id == HOST:
            self._announce_loss(link.peer_id)
            self.peer_lost(link.peer_id)
        else:
            for other in self.node_ids():
                self.peer_lost(other)
        link.close()

    def _announce_loss(self, node_id: int) -> None:
        for other, path in list(self._online.items()):
            if other not in (HOST, node_id):
                path.send(Msg(Op.NODE_REMOVE, (HOST, 0), (other, 0), node_id))

    async def leave_link(self, link: Link) -> None:
        """Orderly end of one link (SCIF 3.7): EXIT, EXIT_ACK within the node timeout, drop."""
        if self.links.get(link.peer_id) is not link:
            return
        link.withdraw()
        if self.id == HOST:
            self._announce_loss(link.peer_id)
        elif link.rings is not None:
            for other in self.node_ids():
                if other != HOST:
                    self.peer_lost(other)
        if link.rings is not None and link.peer_id in self._online and not link.stuck:
            link.exit_acked = asyncio.get_running_loop().create_future()
            link.send(Msg(Op.EXIT, (self.id, 0), (link.peer_id, 0)))
            acked = link.exit_acked
            limit = self.clock.alarm(self.clock.limit(NODE_ALIVE_S), lambda: settle(acked))
            try:
                await acked
            finally:
                limit.cancel()
        self.lose_link(link)

    def _on_exit(self, msg: Msg, link: Link | None) -> None:
        """The neighbour leaves: drop it, then acknowledge (the last message on this queue)."""
        if link is None:
            raise ScifError(errno.EINVAL, "EXIT from ourselves")
        if self.id == HOST:
            self._announce_loss(link.peer_id)
            self.peer_lost(link.peer_id)
        else:
            for other in self.node_ids():
                self.peer_lost(other)
        link.send(msg.answer(Op.EXIT_ACK))

    def _on_exit_ack(self, msg: Msg, link: Link | None) -> None:
        if link is not None and link.exit_acked is not None and not link.exit_acked.done():
            link.exit_acked.set_result(None)
