"""Endpoints as the node knows them: states, ports, release.

Two kinds are built on it: those of kernel clients (``kernel``) and those of programs (``session``).
Connections are made by ``connector`` and ``acceptor``. Nothing here waits: whatever takes time ends in
a callback.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mic_emu.scif import qp as queue
from mic_emu.scif.connector import Attempt, Done, check_connect
from mic_emu.scif.errors import Late, ScifError
from mic_emu.scif.ports import ADMIN_END
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.rma import Copies
from mic_emu.scif.state import State
from mic_emu.scif.windows import Windows

if TYPE_CHECKING:
    from mic_emu.scif.acceptor import Accept
    from mic_emu.scif.deadlines import Deadline
    from mic_emu.scif.node import Node
    from mic_emu.scif.paths import Path

BACKLOG_MAX = 1024


@dataclass
class Request:
    """A connection request that waits at a listener."""

    peer: tuple[int, int]
    remote_id: int
    qp_addr: int


class Endpoint:
    """One endpoint; errors are ScifError."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.id = node.new_id()
        self.state = State.UNBOUND
        self.port = 0
        self.peer: tuple[int, int] = (0, 0)
        self.remote_id = 0
        self.path: Path | None = None
        self.qp: queue.QueuePair | None = None
        self.link: queue.Attachment | None = None  # the peer's queue pair
        self.slot = -1  # our bit in the node's notify page
        self._windows: Windows | None = None
        self.questions = 0  # to the peer's node, not answered yet
        self._copies: Copies | None = None
        self.released = False  # nothing new: its owner is done with it
        self.backlog = 0
        self.pending: deque[Request] = deque()
        self.accepts: deque[Accept] = deque()  # accept calls that wait for a request
        self.attempt: Attempt | None = None  # our request, until it is answered
        self.accept_call: Accept | None = None  # it granted us, until the connector confirms
        self._gone: Callable[[], None] | None = None  # the peer's DISCNCT_ACK
        self._limit: Deadline | None = None
        self._serving = False
        self.was_connected = self._was_closed = self._peer_closed = False
        node.endpoints[self.id] = self

    @property
    def windows(self) -> Windows:
        """Both lists; most endpoints never have any."""
        if self._windows is None:
            self._windows = Windows(self)
        return self._windows

    @property
    def copies(self) -> Copies:
        """What DMA channels do for it."""
        if self._copies is None:
            self._copies = Copies(self)
        return self._copies

    def __repr__(self) -> str:
        return f"<scif {self.node.id}:{self.port} {self.state.name} peer {self.peer[0]}:{self.peer[1]}>"

    def changed(self) -> None:
        """State, data or space changed: go on with whatever waits for that."""
        if self.accepts:
            self.serve_accepts()
        if self.questions and self.state is not State.CONNECTED:
            self.node.questions.give_up(self)

    def set_state(self, state: State) -> None:
        """A new state."""
        self.state = state
        self.was_connected |= state is State.CONNECTED
        self.changed()

    # --- bind, listen -------------------------------------------------------------------------

    def bind(self, port: int = 0, *, privileged: bool = True) -> int:
        """Take a port, 0 = the lowest free ephemeral one; returns it (SCIF 2.2).

        Raises ScifError EACCES, EINVAL, EISCONN, ENOSPC.
        """
        if 0 < port < ADMIN_END and not privileged:
            raise ScifError(errno.EACCES, f"port {port} is privileged")
        if self.state is State.BOUND:
            raise ScifError(errno.EINVAL, "already bound")
        if self.state is not State.UNBOUND:
            raise ScifError(errno.EISCONN, f"cannot bind: {self.state.name.lower()}")
        self.port = self.node.ports.take(port)
        self.set_state(State.BOUND)
        return self.port

    def listen(self, backlog: int = 16) -> None:
        """Accept connection requests, at most ``backlog`` waiting (SCIF 2.3). Raises EINVAL, EISCONN."""
        if self.state in (State.UNBOUND, State.DISCONNECTED, State.CLOSING, State.CLOSE_LISTENING):
            raise ScifError(errno.EINVAL, f"cannot listen: {self.state.name.lower()}")
        if self.state is not State.BOUND:
            raise ScifError(errno.EISCONN, f"cannot listen: {self.state.name.lower()}")
        self.backlog = min(backlog, BACKLOG_MAX)
        self.node.listeners[self.port] = self
        self.set_state(State.LISTENING)

    def on_request(self, msg: Msg, path: Path) -> None:
        """CNCT_REQ for our port: queue it, or refuse."""
        if len(self.pending) >= self.backlog:
            path.send(msg.answer(Op.CNCT_REJ))
            return
        self.pending.append(Request(msg.src, msg.p0, msg.p1))
        self.changed()

    def drop_request(self, node_id: int, remote_id: int) -> None:
        """The connector withdrew its request; nothing when it was granted meanwhile."""
        for r in self.pending:
            if r.peer[0] == node_id and r.remote_id == remote_id:
                self.pending.remove(r)
                self.changed()
                return

    def serve_accepts(self) -> None:
        """Oldest request to oldest accept call."""
        if self._serving:
            return
        self._serving = True
        try:
            while self.accepts and self.pending:
                self.accepts.popleft().grant(self.pending.popleft())
        finally:
            self._serving = False

    # --- connection ---------------------------------------------------------------------------

    def start_connect(self, dst: tuple[int, int], done: Done) -> Attempt:
        """Ask ``dst``; ``done`` hears how it ended (SCIF 3.4).

        Raises ScifError ENODEV, EINVAL, EOPNOTSUPP, EISCONN, ENOSPC, ENOMEM (SCIF 2.4).
        """
        path = check_connect(self, dst)
        if self.state is State.UNBOUND:
            self.bind(0)
        try:
            qp = self.open_qp(path)
        except OSError as e:
            raise ScifError(errno.ENOMEM, str(e)) from None
        self.path, self.peer = path, dst
        attempt = self.attempt = Attempt(self, path, done)
        self.set_state(State.CONNECTING)
        path.send(Msg(Op.CNCT_REQ, (self.node.id, self.port), dst, self.id, path.own_addr(qp.offset)))
        self.node.events.expect()
        return attempt

    def on_grant(self, msg: Msg) -> None:
        """CNCT_GNT: attach to the acceptor's queue pair and confirm."""
        if self.attempt is None or msg.src[0] != self.peer[0]:
            raise Late(errno.EINVAL, "grant without request")
        self.attempt.granted(msg)

    def on_reject(self, msg: Msg) -> None:
        """CNCT_REJ: refused."""
        if self.attempt is not None and msg.src[0] == self.peer[0]:
            self.attempt.fail(errno.ECONNREFUSED)

    def on_final(self, msg: Msg) -> None:
        """CNCT_GNTACK or CNCT_GNTNACK: the connector is attached, or could not."""
        if self.accept_call is None or msg.src[0] != self.peer[0]:
            raise ScifError(errno.EINVAL, "final ack without grant")
        self.accept_call.confirmed(self, msg.op == Op.CNCT_GNTACK)

    def open_qp(self, path: Path) -> queue.QueuePair:
        """Queue pair, ring and control page, reachable through a slot of our notify page.

        Raises OSError ENOMEM.
        """
        qp = self.node.queue_pairs.create(path)
        try:
            self.slot = self.node.notifier.take(self)
        except ScifError:
            self.node.queue_pairs.retire(qp)
            raise
        self.qp = qp
        qp.announce(path.own_addr(self.node.notifier.offset), self.slot)
        return qp

    @property
    def notify_fd(self) -> int:
        """Our end of the program's descriptor; -1: we are a kernel client."""
        return -1

    def attach(self, path: Path, qp_addr: int, remote_id: int) -> None:
        """The peer's queue pair is at ``qp_addr``. Raises ScifError EIO, ECANCELED."""
        assert self.qp is not None
        self.link = queue.attach(self.qp, qp_addr, path.peer_view)
        self.remote_id = remote_id

    def drop_qp(self) -> None:
        """Give the queue pair back; copies that still run in it harm nobody."""
        self.link = None
        if self.qp is not None:
            self.node.traffic.end(self)
            self.node.notifier.give_back(self.slot)
            if self._peer_is_open:
                self.node.queue_pairs.hold(self.id, self.qp, self.peer[0])
            else:
                self.node.queue_pairs.retire(self.qp)
            self.qp = None
            self.slot = -1
            if self._windows is not None:
                self._windows.lists.look()

    def message_bytes(self) -> tuple[int, int] | None:
        """(sent, received) of this connection; None when it never had one."""
        return None

    # --- what the peer did, and checks ------------------------------------------------------------

    def on_sent(self) -> None:
        """CLIENT_SENT: bytes arrived."""
        self.changed()

    def on_received(self) -> None:
        """CLIENT_RCVD: there is room again."""
        self.changed()

    @property
    def is_connected(self) -> bool:
        """Connected now."""
        return self.state is State.CONNECTED

    @property
    def leaving(self) -> bool:
        """Is its owner done with it?"""
        return self.released

    @property
    def copiers_died(self) -> bool:
        """Is no process left that could be in the middle of a copy?"""
        return False

    def check_connected(self) -> None:
        """The checks before every RMA, window or fence call (SCIF 2.10-2.15).

        Raises ScifError ECONNRESET, ENOTCONN, ENODEV.
        """
        if self.state is State.DISCONNECTED:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        if self.state is not State.CONNECTED:
            raise ScifError(errno.ENOTCONN, "not connected")
        if self.node.path(self.peer[0]) is None:
            raise ScifError(errno.ENODEV, "the peer's node is gone")

    # --- end ----------------------------------------------------------------------------------

    def on_disconnect(self, msg: Msg) -> None:
        """DISCNCT: the peer closed."""
        if self.remote_id != msg.p0 or self.peer[0] != msg.src[0]:
            raise ScifError(errno.EINVAL, "disconnect from a stranger")
        self._peer_closed = True
        if self.state is State.CONNECTED:
            self.disconnected()

    def disconnected(self) -> None:
        """The peer closed or its node is lost: what it sent can still be read."""
        self.set_state(State.DISCONNECTED)

    def node_lost(self, node_id: int) -> None:
        """Node ``node_id`` is gone: end everything that depends on it (SCIF 3.7)."""
        for r in [r for r in self.pending if r.peer[0] == node_id]:
            self.pending.remove(r)
        if self.peer[0] != node_id:
            return
        if self.attempt is not None:
            self.attempt.fail(errno.ENODEV)
        if self.accept_call is not None:
            self.accept_call.node_lost(self)
        if self.state is State.CONNECTED:
            self.disconnected()
        self.on_disconnect_ack()
        if self.questions:
            self.node.questions.give_up(self)
        self.changed()

    def stop_listening(self) -> None:
        """End listening: waiting requests are refused, sleeping accepts woken (SCIF 2.8)."""
        if self.state is not State.LISTENING:
            return
        self.node.listeners.pop(self.port, None)
        pending, self.pending = self.pending, deque()
        for r in pending:
            path = self.node.path(r.peer[0])
            if path is not None:
                path.send(Msg(Op.CNCT_REJ, (self.node.id, self.port), r.peer, r.remote_id, r.qp_addr))
        self.set_state(State.CLOSE_LISTENING)
        while self.accepts:
            self.accepts.popleft().fail(errno.EINTR)

    def close_then(self, done: Callable[[], None]) -> None:
        """Release the endpoint (SCIF 2.8); ``done`` comes with the peer's acknowledgement, at most after
        the node timeout."""
        self.stop_listening()
        if self.attempt is not None:
            self.attempt.withdraw(errno.EINTR)
        self.released = True
        if self._windows is None:
            self._part(done)
        else:
            self._windows.release(lambda: self._part(done))

    def _part(self, done: Callable[[], None]) -> None:
        if self.state is not State.CONNECTED or self.path is None:
            self.destroy()
            done()
            return
        self._gone = done
        self._say_closed()  # first: the peer works on it while we go on
        self.set_state(State.CLOSING)
        self._limit = self.node.answers.start(self.on_disconnect_ack)
        self.node.events.expect()

    @property
    def _peer_is_open(self) -> bool:
        """Have programs of the peer been able to reach our queue pair, and can they still?"""
        reachable = self.path is not None and self.node.path(self.peer[0]) is self.path
        return self.was_connected and not self._peer_closed and reachable

    def _say_closed(self) -> None:
        """DISCNCT: to a peer that is connected, and to one that closed before us and keeps its queue pair."""
        if self.was_connected and self.path is not None and self.node.path(self.peer[0]) is self.path:
            self._was_closed = True
            self.path.send(Msg(Op.DISCNCT, (self.node.id, self.port), self.peer, self.id, self.remote_id))

    def on_disconnect_ack(self) -> None:
        """DISCNCT_ACK: the peer has let go."""
        if self._gone is not None:
            self.destroy()

    def destroy(self) -> None:
        """Forget the endpoint at once: port, memory, id."""
        if self.node.endpoints.pop(self.id, None) is None:
            return
        if self.port:
            self.node.ports.drop(self.port)
        if self.attempt is not None:
            self.attempt.forget()
        if not self._was_closed:
            self._say_closed()
        self.drop_qp()
        self.state = State.CLOSING
        self.changed()
        gone, self._gone = self._gone, None
        if self._limit is not None:
            self._limit.cancel()
        if gone is not None:
            gone()
