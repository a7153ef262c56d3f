"""Node membership: who is online, how nodes come, leave and are lost (SCIF 3.3, 3.7).

The host introduces its cards to each other; each first gets the other's memory.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.clock import settle, wait_for
from mic_emu.memory import View, revoke_windows
from mic_emu.scif.errors import ScifError
from mic_emu.scif.limits import NODE_ALIVE_S
from mic_emu.scif.paths import Path, RelayPath
from mic_emu.scif.proto import Msg, Op

if TYPE_CHECKING:
    from mic_emu.scif.link import Link
    from mic_emu.scif.lists import Grace
    from mic_emu.scif.node import Node

HOST = 0
HAND_OVER_S = 5.0
PeerCallback = Callable[[int, bool], None]


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
            await wait_for(asyncio.get_running_loop().sock_recv(sock, 256), HAND_OVER_S)
        except (OSError, asyncio.TimeoutError) as e:
            to.log.warning("node %d: cannot hand over memory to node %d: %s", to.node.id, to.peer_id, e)


def revoke_after(copies: list[Grace], fd: int) -> None:
    """Take the pages of a lost node's windows away from whoever maps them (SCIF-102).

    ``copies`` in progress may end first, for at most DRAIN_S: who is stopped in one, or on another card,
    finds the pages gone in the middle of it. ``fd`` is that node's memory at its loss, and is closed: a
    reset in the meantime has put another object in its place.
    """
    left = len(copies)

    def ended() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            revoke_windows(fd)
            os.close(fd)

    if not copies:
        ended()
    for grace in copies:
        grace.then(ended)


class Membership:
    """The online nodes as one node sees them; itself is always one of them."""

    def __init__(self, node: Node, own_path: Path) -> None:
        self.node = node
        self.maxid = node.id
        self.online: dict[int, Path] = {node.id: own_path}
        self._memories: dict[int, tuple[View, int]] = {}
        self._callbacks: list[PeerCallback] = []
        self._info: dict[int, asyncio.Future[None]] = {}
        self._introducing: dict[frozenset[int], bool] = {}  # two cards each; True: once more behind it
        on = node.add_handler
        on(Op.INIT, self._on_init)
        on(Op.EXIT, self._on_exit)
        on(Op.EXIT_ACK, self._on_exit_ack)
        on(Op.NODE_ADD, self._on_node_add)
        on(Op.NODE_ADD_ACK, self._on_node_add_ack)
        on(Op.NODE_ADD_NACK, self._on_node_add_nack)
        on(Op.NODE_REMOVE, self._on_node_remove)
        on(Op.NODE_REMOVE_ACK, lambda msg, link: None)
        on(Op.GET_NODE_INFO, self._on_node_info)

    def ids(self) -> list[int]:
        """Online nodes including this one, ascending (SCIF-125)."""
        return sorted(self.online)

    def on_peer(self, callback: PeerCallback) -> Callable[[], None]:
        """Call ``callback(node, online)`` for every peer that is online now or changes later.

        Online comes when the node can be connected to, offline before its endpoints are torn down
        (SCIF-131). Returns the function that ends it.
        """
        self._callbacks.append(callback)
        for node_id in self.ids():
            callback(node_id, True)
        return lambda: self._callbacks.remove(callback)

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
        link = self.node.links.get(HOST)
        if self.node.id == HOST or link is None:
            return
        key = self.node.new_id()
        self._info[key] = asyncio.get_running_loop().create_future()
        try:
            link.send(Msg(Op.GET_NODE_INFO, (self.node.id, 0), (HOST, 0), p3=key))
            await wait_for(self._info[key], self.node.clock.api(NODE_ALIVE_S))
        finally:
            del self._info[key]

    def close(self) -> None:
        """Forget the memory of other cards."""
        for node_id in list(self._memories):
            self._forget_memory(node_id)

    # --- coming -----------------------------------------------------------------------------------

    def _on_init(self, msg: Msg, link: Link | None) -> None:
        if link is None:
            raise ScifError(errno.EINVAL, "INIT from ourselves")
        known = self.online.get(link.peer_id) is link
        self._peer_online(link.peer_id, link)
        if self.node.id == HOST and not known:  # a card that repeats itself starts nothing anew
            for other in self.ids():
                if other not in (HOST, link.peer_id):
                    self._begin_to_introduce(other, link.peer_id)

    def _begin_to_introduce(self, i: int, j: int) -> None:
        """However often a card comes and goes: one introduction at a time, and one that follows it."""
        pair = frozenset((i, j))
        if pair in self._introducing:
            self._introducing[pair] = True
        else:
            self._introducing[pair] = False
            self.node.spawn(self._introduce_all(i, j, pair), "introduce two cards")

    async def _introduce_all(self, i: int, j: int, pair: frozenset[int]) -> None:
        try:
            await self._introduce(i, j)
            while self._introducing[pair]:
                self._introducing[pair] = False
                await self._introduce(i, j)
        finally:
            del self._introducing[pair]

    async def _introduce(self, i: int, j: int) -> None:
        """Tell two cards about each other (NODE_ADD); each first gets the other's memory."""
        for a, b in ((i, j), (j, i)):
            if a in self.node.links and b in self.node.links:
                await hand_over_memory(self.node.links[a], self.node.links[b])
        for a, b in ((i, j), (j, i)):
            path, link = self.online.get(a), self.node.links.get(b)
            if path is None or link is None or b not in self.online:
                return
            size = link.ports.peer_memory.size if link.ports.peer_memory is not None else 0
            path.send(Msg(Op.NODE_ADD, (b, 0), (a, 0), 0, layout.CONSTANTS["CARD_MMIO_BASE"], 0, size))

    def _on_node_add(self, msg: Msg, link: Link | None) -> None:
        if link is None or link.peer_id != HOST:
            raise ScifError(errno.EINVAL, "NODE_ADD comes from the host")
        known = msg.src[0] in self._memories
        link.send(msg.answer(Op.NODE_ADD_ACK if known else Op.NODE_ADD_NACK))

    def _on_node_add_ack(self, msg: Msg, link: Link | None) -> None:
        if link is None or self.node.id == HOST or msg.src[0] not in self._memories:
            raise ScifError(errno.EINVAL, "NODE_ADD_ACK for nobody")
        memory, fd = self._memories[msg.src[0]]
        self._peer_online(msg.src[0], RelayPath(link, memory, fd))

    def _on_node_add_nack(self, msg: Msg, link: Link | None) -> None:
        self.node.log.info(
            "node %d: node %d cannot reach our memory: no direct connections", self.node.id, msg.src[0]
        )

    def _on_node_remove(self, msg: Msg, link: Link | None) -> None:
        if link is None or link.peer_id != HOST or msg.p0 == HOST:
            raise ScifError(errno.EINVAL, "NODE_REMOVE comes from the host")
        self.peer_lost(msg.p0)
        link.send(msg.answer(Op.NODE_REMOVE_ACK))

    def _on_node_info(self, msg: Msg, link: Link | None) -> None:
        if self.node.id == HOST:
            path = self.online[msg.src[0]]
            path.send(msg.answer(Op.GET_NODE_INFO, p1=self.maxid, p2=len(self.online)))
            return
        self.maxid = max(self.maxid, msg.p1 & 0xFFFF)
        waiter = self._info.get(msg.p3)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _peer_online(self, node_id: int, path: Path) -> None:
        if self.online.get(node_id) is path:
            return
        if node_id in self.online:
            self.peer_lost(node_id)
        self.online[node_id] = path
        self.maxid = max(self.maxid, node_id)
        self.node.log.info("node %d: node %d is online", self.node.id, node_id)
        self._tell_clients(node_id, True)

    # --- going ------------------------------------------------------------------------------------

    def peer_lost(self, node_id: int, *, alive: bool = False) -> None:
        """Cleanup for a lost node: clients first, then its endpoints, then its memory (SCIF 3.7).

        ``alive``: the card goes on until the reset that comes next, which takes its memory away; its own
        programs must not lose theirs before.
        """
        if node_id == self.node.id or node_id not in self.online:
            return
        self.node.log.info("node %d: node %d is offline", self.node.id, node_id)
        self._tell_clients(node_id, False)
        path = self.online.pop(node_id)
        for ep in list(self.node.endpoints.values()):
            ep.node_lost(node_id)
        self.node.queue_pairs.node_lost(node_id)
        copies = self.node.windows.node_lost(node_id)
        if not alive and (fd := path.dup_bank()) >= 0:
            revoke_after(copies, fd)
        if self.node.id != HOST:
            self._forget_memory(node_id)

    def _tell_clients(self, node_id: int, online: bool) -> None:
        for callback in list(self._callbacks):
            try:
                callback(node_id, online)
            except Exception as e:  # a client's mistake must not take the node down
                self.node.log.error("node %d: a client failed on node %d: %r", self.node.id, node_id, e)

    def lose_link(self, link: Link, *, alive: bool = False) -> None:
        """The neighbour is gone: drop it, and on a card everybody behind it; tell the others."""
        if self.node.links.get(link.peer_id) is link:
            del self.node.links[link.peer_id]
        elif link.qp is None:
            return
        if link.exit_acked is not None and not link.exit_acked.done():
            link.exit_acked.set_result(None)
        if link.peer_id in self.online:  # else it said EXIT: its channels have ended their copies
            link.ports.quiesce()
        if self.node.id == HOST:
            self._announce_loss(link.peer_id)
            self.peer_lost(link.peer_id, alive=alive)
        else:
            for other in self.ids():
                self.peer_lost(other)
        link.close()

    def _announce_loss(self, node_id: int) -> None:
        for other, path in list(self.online.items()):
            if other not in (HOST, node_id):
                path.send(Msg(Op.NODE_REMOVE, (HOST, 0), (other, 0), node_id))

    async def leave_link(self, link: Link) -> None:
        """Orderly end of one link (SCIF 3.7): EXIT, EXIT_ACK within the node timeout, drop."""
        if self.node.links.get(link.peer_id) is not link:
            return
        link.withdraw()
        if self.node.id == HOST:
            self._announce_loss(link.peer_id)
        elif link.rings is not None:
            for other in self.ids():
                if other != HOST:
                    self.peer_lost(other)
        if link.rings is not None and link.peer_id in self.online and not link.stuck:
            link.exit_acked = asyncio.get_running_loop().create_future()
            link.send(Msg(Op.EXIT, (self.node.id, 0), (link.peer_id, 0)))
            acked = link.exit_acked
            limit = self.node.clock.alarm(self.node.clock.limit(NODE_ALIVE_S), lambda: settle(acked))
            try:
                await acked
            finally:
                limit.cancel()
        self.lose_link(link, alive=True)

    def _on_exit(self, msg: Msg, link: Link | None) -> None:
        """The neighbour leaves: drop it, then acknowledge (the last message on this queue)."""
        if link is None:
            raise ScifError(errno.EINVAL, "EXIT from ourselves")
        if self.node.id == HOST:
            self._announce_loss(link.peer_id)
            self.peer_lost(link.peer_id)
        else:
            for other in self.ids():
                self.peer_lost(other)
        link.send(msg.answer(Op.EXIT_ACK))

    def _on_exit_ack(self, msg: Msg, link: Link | None) -> None:
        if link is not None and link.exit_acked is not None and not link.exit_acked.done():
            link.exit_acked.set_result(None)
