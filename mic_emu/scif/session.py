"""What the node keeps for programs: endpoints behind descriptors, requests on control connections."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import struct
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mic_emu._native import lib
from mic_emu.layout import SCIF_QP
from mic_emu.memory import PAGE
from mic_emu.scif import qp as queue
from mic_emu.scif.endpoint import NODE_ALIVE_S, Endpoint, State
from mic_emu.scif.errors import ScifError

if TYPE_CHECKING:
    from mic_emu.scif.node import Node
    from mic_emu.scif.paths import Path
    from mic_emu.scif.service import ScifService

EP_NONE, EP_CONNECTED, EP_DISCONNECTED = range(3)


class UserEndpoint(Endpoint):
    """An endpoint whose data path is a program's: state goes to its control page and descriptor."""

    def __init__(self, node: Node, session: Session) -> None:
        self.session: Session | None = session
        self._published = EP_NONE
        super().__init__(node)

    @property
    def notify_fd(self) -> int:
        return self.session.sock.fileno() if self.session is not None else -1

    def _open_qp(self, path: Path) -> queue.QueuePair:
        qp = super()._open_qp(path)
        lib.mic_scif_ctl_init(qp.control, self.session.sid if self.session is not None else 0)
        self._published = EP_NONE
        return qp

    def changed(self) -> None:
        if self.qp is not None:
            self._publish_state(self.qp)
        if self.session is not None:
            self.session.update_token()
        super().changed()

    def _publish_state(self, qp: queue.QueuePair) -> None:
        state = {State.CONNECTED: EP_CONNECTED, State.DISCONNECTED: EP_DISCONNECTED}.get(self.state, EP_NONE)
        if state == self._published:
            return
        if state == EP_NONE and self._published == EP_CONNECTED:
            state = EP_DISCONNECTED  # closing: whoever still sleeps in a call must leave it
        self._published = state
        lib.mic_scif_ctl_state(qp.control, qp.page, state)
        if state == EP_DISCONNECTED and self.session is not None:
            self.session.hang_up()

    def on_sent(self) -> None:
        if self.qp is not None:
            lib.mic_scif_wake_rx(self.qp.page)
            if self.session is not None:
                lib.mic_scif_token(self.session.sock.fileno())
        super().on_sent()

    def on_received(self) -> None:
        if self.qp is not None:
            lib.mic_scif_wake_tx(self.qp.page)
            if self.session is not None:
                lib.mic_scif_unfill(self.session.sock.fileno())
        super().on_received()


class Session:
    """One endpoint descriptor of a program: the node's end of its socket, and the endpoint behind it."""

    def __init__(
        self, service: ScifService, sock: socket.socket, sid: int, cookie: int, pid: int, privileged: bool
    ) -> None:
        self.service = service
        self.node = service.node
        self.sock = sock
        self.sid = sid
        self.cookie = cookie
        self.pid = pid
        self.privileged = privileged
        self.ep = UserEndpoint(service.node, self)
        self.attempt: asyncio.Task[int] | None = None  # non-blocking connect, until it is collected
        self.accepting: dict[int, set[asyncio.Task[Any]]] = {}  # by process
        self.released: asyncio.Task[None] | None = None
        self.hung_up = False
        self._token = False

    # --- readiness of the descriptor --------------------------------------------------------------

    def update_token(self) -> None:
        """Listening: a token while requests wait."""
        if self.ep.state is State.LISTENING and self.ep.pending and not self._token:
            self._token = True
            lib.mic_scif_token(self.sock.fileno())

    def surplus_token(self) -> int:
        """1 when the program must take one token off its descriptor, because no request is left."""
        if self._token and not self.ep.pending:
            self._token = False
            return 1
        return 0

    def hang_up(self) -> None:
        """The peer is gone: POLLHUP. The last token stays unread, by it we notice the close."""
        if self.hung_up:
            return
        self.hung_up = True
        try:
            self.sock.send(b"D", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.sock.shutdown(socket.SHUT_RDWR)
        except BlockingIOError:
            pass  # full of tokens: not empty, which is what matters
        except OSError:
            self.release()  # the program has closed it already

    def gone(self) -> bool:
        """Has the program closed its last reference?"""
        if not self.hung_up:
            return True  # the only event that we listen to
        return bool(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    # --- connect ----------------------------------------------------------------------------------

    async def connect(self, dst: tuple[int, int], nonblock: bool) -> int:
        """scif_connect with O_NONBLOCK or without; returns the local port (SCIF 2.4, 2.5)."""
        if self.attempt is not None:
            if self.node.path(dst[0]) is None:
                raise ScifError(errno.ENODEV, "node is not online")
            if not self.attempt.done():
                raise ScifError(errno.EINPROGRESS, "connecting")
            attempt, self.attempt = self.attempt, None
            if self.ep.qp is not None:
                self.ep.qp.control.uncollected = 0
            return attempt.result()
        ep = self.ep
        if not nonblock:
            return await ep.connect(dst)
        self.node.path(dst[0])
        ep.check_connect(dst)
        if ep.state is State.UNBOUND:
            ep.bind(0)
        self.attempt = self.node.spawn(self._background(ep, dst), "non-blocking connect")
        raise ScifError(errno.EINPROGRESS, "connecting")

    async def _background(self, ep: UserEndpoint, dst: tuple[int, int]) -> int:
        try:
            port = await ep.connect(dst)
            if ep.qp is not None:
                ep.qp.control.uncollected = 1
            return port
        finally:
            asyncio.get_running_loop().call_soon(self._writable)

    def _writable(self) -> None:
        if self.sock.fileno() >= 0:
            lib.mic_scif_unfill(self.sock.fileno())

    def mask(self) -> tuple[int, int]:
        """(poll mask of an endpoint that is not attached, 1 while a connect is pending)."""
        if self.attempt is not None:
            return (select.POLLOUT, 0) if self.attempt.done() else (0, 1)
        state = self.ep.state
        if state is State.LISTENING:
            return (select.POLLIN if self.ep.pending else 0), 0
        if state is State.CONNECTED:
            return select.POLLOUT, 0  # the program attaches and looks itself
        return select.POLLERR, 0

    # --- accept -----------------------------------------------------------------------------------

    async def accept(self, fresh: Session, sync: bool, pid: int) -> tuple[int, int]:
        """Put the oldest request behind ``fresh``; returns the peer's (node, port)."""
        task = asyncio.current_task()
        assert task is not None
        self.accepting.setdefault(pid, set()).add(task)
        try:
            conn = await self.ep.accept(sync=sync, factory=lambda: UserEndpoint(self.node, fresh))
        finally:
            self.accepting[pid].discard(task)
        assert isinstance(conn, UserEndpoint)
        if fresh.released is not None:
            await conn.close()
            raise ScifError(errno.EBADF, "the new descriptor is gone")
        old, fresh.ep = fresh.ep, conn
        old.session = None
        old.destroy()
        return conn.peer

    def flush(self, pid: int) -> None:
        """Process ``pid`` closes a descriptor of this listener: its accepts end, listening too if it
        was the last to accept (SCIF 2.6, flush rule)."""
        waiting = self.accepting.get(pid)
        if self.ep.state is State.LISTENING and (waiting or self.last_acceptor == pid):
            self.ep.stop_listening()

    last_acceptor = 0

    # --- attach -----------------------------------------------------------------------------------

    def attach(self) -> tuple[list[int], list[int]]:
        """Offsets of the connection's pages and the two memories (``enum mic_scif_attach``).

        Raises ScifError ENOTCONN.
        """
        ep = self.ep
        if ep.qp is None or ep.rings is None or ep.path is None:
            raise ScifError(errno.ENOTCONN, "not connected")
        if ep.state not in (State.CONNECTED, State.DISCONNECTED):
            raise ScifError(errno.ENOTCONN, "not connected")
        try:
            peer_fd, peer_qp = ep.path.peer_place(ep.peer_qp_addr, PAGE)
            _, ring = ep.path.peer_place(self._remote("remote_buf"), queue.EP_RING)
            _, notify = ep.path.peer_place(ep.rings.peer_page.notify_addr, PAGE)
        except IndexError:
            raise ScifError(errno.ENODEV, "the peer's pages are outside its memory") from None
        nodes = self.node.id | ep.peer[0] << 16 | ep.port << 32 | ep.peer[1] << 48
        own = ep.qp.offset
        places = [
            own,
            peer_qp,
            ring,
            self.node.notifier.offset,
            notify,
            ep.rings.peer_page.notify_slot,
            nodes,
        ]
        return places, [self.node.memory_fd, peer_fd]

    def _remote(self, field: str) -> int:
        assert self.ep.qp is not None
        return SCIF_QP.get(self.node.memory, self.ep.qp.offset, field)

    # --- release ----------------------------------------------------------------------------------

    def release(self) -> asyncio.Task[None]:
        """The last reference is closed: release the endpoint (SCIF 2.8)."""
        if self.released is None:
            self.released = self.node.spawn(self._release(), "release an endpoint")
        return self.released

    async def _release(self) -> None:
        ep = self.ep
        try:
            if self.attempt is not None and not self.attempt.done():
                await asyncio.wait([self.attempt], timeout=self.node.clock.api(NODE_ALIVE_S))
            ep.stop_listening()
            await ep.close()
        finally:
            ep.session = None
            self.service.forget(self)
            self.sock.close()


@dataclass
class Reply:
    """What a request gives back besides its status."""

    values: Sequence[int] = ()
    fds: Sequence[int] = ()
    data: bytes = b""


Answer = Reply | Coroutine[Any, Any, Reply]


class Control:
    """A control connection of a process: one request at a time, answered in order."""

    REQUEST = struct.Struct("<IIQ6Q")
    REPLY = struct.Struct("<iI8Q")

    def __init__(self, service: ScifService, sock: socket.socket, pid: int, process: int) -> None:
        self.service = service
        self.sock = sock
        self.pid = pid
        self.process = process  # the pid as the program itself sees it
        self.task: asyncio.Task[None] | None = None

    def on_packet(self, packet: bytes) -> bool:
        """Serve the request in ``packet``; False when it makes no sense."""
        if len(packet) < self.REQUEST.size:
            return False
        op, ndata, sid, *args = self.REQUEST.unpack_from(packet)
        if op == lib.MIC_SCIF_CANCEL:
            if self.task is not None:
                self.task.cancel()
            return True
        if self.task is not None or ndata != len(packet) - self.REQUEST.size:
            return False
        try:
            result = self.service.serve(self, op, sid, args, packet[self.REQUEST.size :])
        except OSError as e:
            self.answer(-(e.errno or errno.EIO))
            return True
        if isinstance(result, Reply):
            self.answer(0, result)
        else:
            self.task = self.service.node.spawn(self._finish(result), "a program's request")
            self.task.add_done_callback(lambda _: result.close())  # cancelled before it began
        return True

    async def _finish(self, work: Coroutine[Any, Any, Reply]) -> None:
        status, reply = -errno.EIO, Reply()
        try:
            reply = await work
            status = 0
        except OSError as e:
            status = -(e.errno or errno.EIO)
            reply = getattr(e, "reply", reply)
        except asyncio.CancelledError:
            status = -errno.EINTR
        finally:
            self.task = None
            self.answer(status, reply)

    def answer(self, status: int, reply: Reply | None = None) -> None:
        """Send the answer; a process that is gone does not get it."""
        reply = reply or Reply()
        v = [*reply.values, *([0] * (8 - len(reply.values)))]
        packet = self.REPLY.pack(status, len(reply.data), *v) + reply.data
        try:
            if reply.fds:
                socket.send_fds(self.sock, [packet], list(reply.fds), socket.MSG_NOSIGNAL)
            else:
                self.sock.send(packet, socket.MSG_NOSIGNAL)
        except OSError:
            pass

    def close(self) -> None:
        """The process closed it or died: what it waited for is over."""
        if self.task is not None:
            self.task.cancel()
        self.sock.close()


def caller_is_privileged(pid: int, uid: int) -> bool:
    """Effective uid 0, or CAP_SYS_ADMIN (SCIF 6, D14), as seen from this node's namespaces."""
    if uid == 0:
        return True
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> 21 & 1)
    except OSError:
        pass
    return False


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
