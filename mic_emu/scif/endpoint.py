"""Endpoints as the node knows them: states, connection set-up, and the API of kernel clients.

A kernel client is code in the same process as the node (COSM, the tests); programs reach their
endpoints through the node service instead, which drives the same state machine.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mic_emu import layout
from mic_emu.clock import settle
from mic_emu.scif import qp as queue
from mic_emu.scif.errors import ScifError
from mic_emu.scif.ports import ADMIN_END
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.windows import Windows

if TYPE_CHECKING:
    from mic_emu.scif.node import Node
    from mic_emu.scif.paths import Path

NODE_ALIVE_S = 30.0
ACK_ROUND_S = 3.0
BACKLOG_MAX = 1024
POLLIN, POLLOUT, POLLERR, POLLHUP = select.POLLIN, select.POLLOUT, select.POLLERR, select.POLLHUP


class State(enum.Enum):
    """Endpoint states (SCIF 2.1); Zombie is not kept: what is released is gone."""

    UNBOUND = 0
    BOUND = 1
    LISTENING = 2
    CONNECTED = 3
    CONNECTING = 4
    MAPPING = 5
    CLOSING = 6
    CLOSE_LISTENING = 7
    DISCONNECTED = 8


@dataclass
class Request:
    """A connection request that waits at a listener."""

    peer: tuple[int, int]
    remote_id: int
    qp_addr: int


class Endpoint:
    """One endpoint. Kernel clients get it from ``node.open()``; errors are ScifError."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.id = node.new_id()
        self.state = State.UNBOUND
        self.port = 0
        self.peer: tuple[int, int] = (0, 0)
        self.remote_id = 0
        self.path: Path | None = None
        self.qp: queue.QueuePair | None = None
        self.rings: queue.Rings | None = None
        self.peer_qp_addr = 0
        self.slot = -1  # our bit in the node's notify page
        self.windows = Windows(self)
        self.backlog = 0
        self.pending: deque[Request] = deque()
        self._answer: asyncio.Future[None] | None = None  # grant or rejection of our request
        self._final: asyncio.Future[bool] | None = None  # final ack of the one we accepted
        self._gone: asyncio.Future[None] | None = None  # DISCNCT_ACK
        self._waiters: set[asyncio.Future[None]] = set()
        self._watchers: list[Callable[[], None]] = []
        node.endpoints[self.id] = self

    def __repr__(self) -> str:
        return f"<scif {self.node.id}:{self.port} {self.state.name} peer {self.peer[0]}:{self.peer[1]}>"

    # --- waiting ------------------------------------------------------------------------------

    def changed(self) -> None:
        """State, data or space changed: wake everybody who waits here."""
        waiters, self._waiters = self._waiters, set()
        for w in waiters:
            if not w.done():
                w.set_result(None)
        for watcher in list(self._watchers):
            watcher()

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after every change; returns the function that ends it."""
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    async def wait_change(self, timeout_s: float | None = None) -> bool:
        """Sleep until ``changed``; False when ``timeout_s`` seconds passed first."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        timer = None
        if timeout_s is not None:
            timer = self.node.clock.alarm(timeout_s, lambda: _expire(waiter))
        try:
            await waiter
            return True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if timeout_s is None or (task is not None and _cancelling(task)):
                raise
            return False
        finally:
            self._waiters.discard(waiter)
            if timer:
                timer.cancel()

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
        self._set(State.BOUND)
        return self.port

    def listen(self, backlog: int = 16) -> None:
        """Accept connection requests, at most ``backlog`` waiting (SCIF 2.3). Raises EINVAL, EISCONN."""
        if self.state in (State.UNBOUND, State.DISCONNECTED, State.CLOSING, State.CLOSE_LISTENING):
            raise ScifError(errno.EINVAL, f"cannot listen: {self.state.name.lower()}")
        if self.state is not State.BOUND:
            raise ScifError(errno.EISCONN, f"cannot listen: {self.state.name.lower()}")
        self.backlog = min(backlog, BACKLOG_MAX)
        self.node.listeners[self.port] = self
        self._set(State.LISTENING)

    # --- connect ------------------------------------------------------------------------------

    def check_connect(self, dst: tuple[int, int]) -> Path:
        """Rows 2-8 of SCIF 2.4; returns the path to the node."""
        path = self.node.path(dst[0])
        if path is None:
            raise ScifError(errno.ENODEV, f"node {dst[0]} is not online")
        if dst[1] == 0:
            raise ScifError(errno.EINVAL, "port 0 cannot be connected to")
        if self.state in (State.LISTENING, State.CLOSE_LISTENING):
            raise ScifError(errno.EOPNOTSUPP, "a listening endpoint cannot connect")
        if self.state in (State.CONNECTED, State.CONNECTING, State.MAPPING):
            raise ScifError(errno.EISCONN, "connected or connecting")
        if self.state in (State.DISCONNECTED, State.CLOSING):
            raise ScifError(errno.EINVAL, "disconnected")
        return path

    def start_connect(self, dst: tuple[int, int]) -> asyncio.Future[None]:
        """Check, allocate and send the request; the future ends with the answer (SCIF 3.4)."""
        path = self.check_connect(dst)
        if self.state is State.UNBOUND:
            self.bind(0)
        try:
            qp = self._open_qp(path)
        except OSError as e:
            raise ScifError(errno.ENOMEM, str(e)) from None
        self.path, self.peer = path, dst
        self._answer = asyncio.get_running_loop().create_future()
        self._set(State.CONNECTING)
        path.send(Msg(Op.CNCT_REQ, (self.node.id, self.port), dst, self.id, path.own_addr(qp.offset)))
        return self._answer

    async def connect(self, dst: tuple[int, int]) -> int:
        """Connect to ``(node, port)``; returns the local port once the peer has accepted.

        Raises ScifError ENODEV, EINVAL, EOPNOTSUPP, EISCONN, ENOSPC, ENOMEM, ECONNREFUSED (SCIF 2.4).
        """
        answer = self.start_connect(dst)
        limit = self.node.clock.alarm(self.node.clock.api(NODE_ALIVE_S), self._give_up)
        try:
            await answer
        except asyncio.CancelledError:
            self._withdraw()
            raise
        finally:
            limit.cancel()
        return self.port

    def _give_up(self) -> None:
        """Nobody answered in time: ECONNREFUSED, or ENODEV when the link is stuck or gone."""
        if self._answer is None or self._answer.done():
            return
        dead = self.path is None or getattr(self.path, "stuck", False) or self.node.path(self.peer[0]) is None
        self.connect_failed(errno.ENODEV if dead else errno.ECONNREFUSED, withdraw=not dead)

    def connect_failed(self, code: int, *, withdraw: bool = False) -> None:
        """The attempt is over: back to Bound, the same port kept."""
        answer, self._answer = self._answer, None
        if withdraw:
            self._withdraw()
        else:
            self._drop_qp()
            self._set(State.BOUND)
        if answer is not None and not answer.done():
            answer.set_exception(ScifError(code, f"connect to {self.peer[0]}:{self.peer[1]}"))
            answer.exception()  # retrieved: a background attempt may have no reader

    def _withdraw(self) -> None:
        """Take the request back; the listener drops it (the real stack leaves it there, SCIF 2.4)."""
        if self.state is not State.CONNECTING or self.path is None:
            return
        self.path.send(Msg(Op.DISCNCT, (self.node.id, self.port), self.peer, self.id, 0))
        self._drop_qp()
        self._answer = None
        self._set(State.BOUND)

    def on_grant(self, msg: Msg) -> None:
        """CNCT_GNT: attach to the acceptor's queue pair and confirm."""
        path = self.path
        if (
            self.state is not State.CONNECTING
            or path is None
            or self.qp is None
            or msg.src[0] != self.peer[0]
        ):
            raise ScifError(errno.EINVAL, "grant without request")
        self.state = State.MAPPING
        try:
            self._attach(path, msg.p1, msg.p2)
        except ScifError as e:
            path.send(msg.answer(Op.CNCT_GNTNACK, p0=msg.p2))
            self.connect_failed(e.errno or errno.EIO)
            return
        path.send(msg.answer(Op.CNCT_GNTACK, p0=msg.p2, p1=0, p2=0))
        answer, self._answer = self._answer, None
        self._set(State.CONNECTED)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def on_reject(self, msg: Msg) -> None:
        """CNCT_REJ: refused."""
        if self.state is State.CONNECTING and msg.src[0] == self.peer[0]:
            self.connect_failed(errno.ECONNREFUSED)

    def _open_qp(self, path: Path) -> queue.QueuePair:
        """Queue pair, ring and control page, reachable through a slot of our notify page."""
        self.qp = self.node.new_qp(path)
        self.slot = self.node.notifier.take(self)
        page = self.qp.page
        page.notify_addr = path.own_addr(self.node.notifier.offset)
        page.notify_slot = self.slot
        page.abi = layout.CONSTANTS["SCIF_ABI"]
        return self.qp

    @property
    def notify_fd(self) -> int:
        """Our end of the program's descriptor; -1: we are a kernel client."""
        return -1

    def _attach(self, path: Path, qp_addr: int, remote_id: int) -> None:
        assert self.qp is not None
        self.rings = queue.attach(self.qp, qp_addr, path.peer_view)
        self.peer_qp_addr = qp_addr
        self.remote_id = remote_id

    # --- accept -------------------------------------------------------------------------------

    def on_request(self, msg: Msg, path: Path) -> None:
        """CNCT_REQ for our port: queue it, or refuse."""
        if len(self.pending) >= self.backlog:
            path.send(msg.answer(Op.CNCT_REJ))
            return
        self.pending.append(Request(msg.src, msg.p0, msg.p1))
        self.changed()

    def drop_request(self, node_id: int, remote_id: int) -> bool:
        """The connector withdrew its request."""
        for r in self.pending:
            if r.peer[0] == node_id and r.remote_id == remote_id:
                self.pending.remove(r)
                self.changed()
                return True
        return False

    async def accept(self, *, sync: bool = True, factory: Callable[[], Endpoint] | None = None) -> Endpoint:
        """Take the oldest request; returns the connected endpoint, its ``peer`` is (node, port).

        Raises ScifError EINVAL (not listening), EAGAIN (not ``sync`` and no request), ENOMEM,
        ENODEV (SCIF 2.6), EINTR (the listener was closed meanwhile).
        """
        if self.state is not State.LISTENING:
            raise ScifError(errno.EINVAL, "not listening")
        while True:
            while not self.pending:
                if not sync:
                    raise ScifError(errno.EAGAIN, "no connection request")
                await self.wait_change()
                if self.state is not State.LISTENING:
                    raise ScifError(errno.EINTR, "the listener was closed")
            conn = await self._grant(self.pending.popleft(), factory or (lambda: Endpoint(self.node)))
            if conn is not None:
                return conn
            if not sync and not self.pending:
                raise ScifError(errno.EAGAIN, "the connector could not attach")

    async def _grant(self, request: Request, factory: Callable[[], Endpoint]) -> Endpoint | None:
        """Grant one request and wait for its final ack; None when the connector withdrew."""
        path = self.node.path(request.peer[0])
        if path is None:
            raise ScifError(errno.ENODEV, f"node {request.peer[0]} is gone")
        reject = Msg(Op.CNCT_REJ, (self.node.id, self.port), request.peer, request.remote_id, request.qp_addr)
        conn = factory()
        self.node.ports.share(self.port)
        conn.port, conn.peer, conn.path = self.port, request.peer, path
        try:
            qp = conn._open_qp(path)
            conn._attach(path, request.qp_addr, request.remote_id)
        except OSError as e:
            path.send(reject)
            conn.destroy()
            if e.errno == errno.ECANCELED:
                return None
            code = errno.EIO if isinstance(e, ScifError) else errno.ENOMEM
            raise ScifError(code, f"accept: {e}") from None
        conn.state = State.CONNECTING
        conn._final = asyncio.get_running_loop().create_future()
        path.send(
            Msg(Op.CNCT_GNT, (self.node.id, self.port), request.peer, request.remote_id,
                path.own_addr(qp.offset), conn.id)
        )  # fmt: skip
        self.changed()  # one request less
        try:
            ok = await asyncio.shield(conn._final)
        except ScifError:
            conn.destroy()
            raise
        except asyncio.CancelledError:
            self.node.spawn(conn.close(), "close an abandoned connection")
            raise
        if not ok:
            conn.destroy()
            return None
        return conn

    def on_final(self, msg: Msg) -> None:
        """CNCT_GNTACK or CNCT_GNTNACK: the connector is attached, or could not."""
        if self.state is not State.CONNECTING or self._final is None or msg.src[0] != self.peer[0]:
            raise ScifError(errno.EINVAL, "final ack without grant")
        final, self._final = self._final, None
        good = msg.op == Op.CNCT_GNTACK
        self._set(State.CONNECTED if good else State.CLOSING)
        if not final.done():
            final.set_result(good)

    # --- data ---------------------------------------------------------------------------------

    def _data_state(self, sending: bool) -> queue.Rings:
        if self.rings is None or self.state not in (State.CONNECTED, State.DISCONNECTED):
            raise ScifError(errno.ENOTCONN, "not connected")
        if sending and self.state is State.DISCONNECTED:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        return self.rings

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what fits; returns the count, 0 when the ring is full. Raises ENOTCONN, ECONNRESET."""
        if not len(data):
            return 0
        rings = self._data_state(sending=True)
        try:
            n = min(rings.room(), len(data))
            if n:
                rings.put(data[:n])
                self._tell(Op.CLIENT_SENT)
            if n < len(data):
                rings.want_room()
        except ScifError:
            self._damaged()
            raise ScifError(errno.ECONNRESET, "the peer damaged its ring") from None
        return n

    async def send(self, data: bytes) -> int:
        """Send all of ``data``; returns the bytes sent, fewer only when the peer closed meanwhile."""
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                n = self.send_nowait(view[done:])
            except ScifError:
                if done:
                    return done
                raise
            done += n
            if done < len(view) and not n:
                await self.wait_change()
        return done

    def recv_nowait(self, length: int) -> bytes:
        """Up to ``length`` bytes, b"" when there are none. Raises ENOTCONN, ECONNRESET after draining."""
        if not length:
            return b""
        rings = self._data_state(sending=False)
        try:
            n = min(rings.used(), length)
            data = (rings.get(n) if n else b"") or b""
        except ScifError:
            self._damaged()
            raise ScifError(errno.ECONNRESET, "the peer damaged its ring") from None
        if n == 0 or not rings.used():
            rings.drained()
        if not data and self.state is State.DISCONNECTED:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        if data and self.state is State.CONNECTED:
            self._tell(Op.CLIENT_RCVD)
        return data

    async def recv(self, length: int) -> bytes:
        """Exactly ``length`` bytes; fewer only when the peer closed after sending them."""
        out = bytearray()
        while len(out) < length:
            try:
                data = self.recv_nowait(length - len(out))
            except ScifError:
                if out:
                    break
                raise
            out += data
            if len(out) < length and not data:
                await self.wait_change()
        return bytes(out)

    def _tell(self, op: Op) -> None:
        if self.path is not None:
            self.path.send(Msg(op, (self.node.id, self.port), self.peer, self.remote_id))

    def _damaged(self) -> None:
        """The peer wrote rubbish into our indices: treat it as gone."""
        self.node.log.error("node %d: %r: damaged ring, disconnected", self.node.id, self)
        self.disconnected()

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

    # --- poll ---------------------------------------------------------------------------------

    def mask(self) -> int:
        """What poll reports now (SCIF 2.9)."""
        if self.state is State.LISTENING:
            return POLLIN if self.pending else 0
        if self.rings is None or self.state not in (State.CONNECTED, State.DISCONNECTED):
            return POLLERR
        bits = POLLHUP if self.state is State.DISCONNECTED else 0
        try:
            bits |= (POLLIN if self.rings.used() else 0) | (POLLOUT if self.rings.room() else 0)
        except ScifError:
            bits |= POLLHUP
        return bits

    async def poll(self, events: int, timeout_s: float | None = None) -> int:
        """Wait until one of ``events``, POLLERR or POLLHUP holds; returns the mask, 0 after the time-out."""
        give_up = None if timeout_s is None else self.node.clock.monotonic() + timeout_s
        while True:
            bits = self.mask() & (events | POLLERR | POLLHUP)
            if bits:
                return bits
            left = None if give_up is None else give_up - self.node.clock.monotonic()
            if left is not None and left <= 0:
                return 0
            await self.wait_change(left)

    # --- end ----------------------------------------------------------------------------------

    def on_disconnect(self, msg: Msg) -> None:
        """DISCNCT: the peer closed."""
        if self.remote_id != msg.p0 or self.peer[0] != msg.src[0]:
            raise ScifError(errno.EINVAL, "disconnect from a stranger")
        if self.state is State.CONNECTED:
            self.disconnected()

    def disconnected(self) -> None:
        """The peer closed or its node is lost: what it sent can still be read."""
        self._set(State.DISCONNECTED)

    def on_disconnect_ack(self) -> None:
        """DISCNCT_ACK: the peer has let go."""
        if self._gone is not None:
            settle(self._gone)

    def node_lost(self, node_id: int) -> None:
        """Node ``node_id`` is gone: end everything that depends on it (SCIF 3.7)."""
        for r in [r for r in self.pending if r.peer[0] == node_id]:
            self.pending.remove(r)
        if self.peer[0] != node_id:
            return
        if self._answer is not None:
            self.connect_failed(errno.ENODEV)
        if self._final is not None and not self._final.done():
            self._final.set_exception(ScifError(errno.ENODEV, f"node {node_id} is gone"))
        if self.state is State.CONNECTED:
            self.disconnected()
        self.on_disconnect_ack()
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
        self._set(State.CLOSE_LISTENING)

    async def close(self) -> None:
        """Release the endpoint; waits for the peer's acknowledgement at most the node timeout (SCIF 2.8)."""
        self.stop_listening()
        if self.state is State.CONNECTING and self._answer is not None:
            self.connect_failed(errno.EINTR, withdraw=True)
        await self.windows.release()
        if self.state is State.CONNECTED and self.path is not None:
            self._gone = asyncio.get_running_loop().create_future()
            self._set(State.CLOSING)
            self.path.send(Msg(Op.DISCNCT, (self.node.id, self.port), self.peer, self.id, self.remote_id))
            gone = self._gone
            limit = self.node.clock.alarm(self.node.clock.api(NODE_ALIVE_S), lambda: settle(gone))
            try:
                await gone
            finally:
                limit.cancel()
                self.destroy()
            return
        self.destroy()

    def destroy(self) -> None:
        """Forget the endpoint at once: port, memory, id."""
        if self.node.endpoints.pop(self.id, None) is None:
            return
        if self.port:
            self.node.ports.drop(self.port)
        self._drop_qp()
        self.state = State.CLOSING
        self.changed()

    def _drop_qp(self) -> None:
        self.rings = None
        if self.qp is not None:
            self.node.notifier.give_back(self.slot)
            self.node.retire_qp(self.qp)
            self.qp = None
            self.slot = -1

    def _set(self, state: State) -> None:
        self.state = state
        self.changed()


def _cancelling(task: asyncio.Task[object]) -> bool:
    """Was the task itself cancelled (and not only the future that it waits for)?"""
    count = getattr(task, "cancelling", None)  # Python 3.11
    return bool(count()) if count is not None else False


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.cancel()
