"""What the node keeps for programs: the endpoint behind a descriptor, and its readiness."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.memory import PAGE
from mic_emu.scif import qp as queue
from mic_emu.scif.acceptor import Accept
from mic_emu.scif.control import Call, Reply
from mic_emu.scif.endpoint import Endpoint
from mic_emu.scif.errors import ScifError
from mic_emu.scif.state import State

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
        return self.session.fd if self.session is not None else -1

    def open_qp(self, path: Path) -> queue.QueuePair:
        qp = super().open_qp(path)
        lib.mic_scif_ctl_init(qp.control, self.session.sid if self.session is not None else 0)
        self._published = EP_NONE
        return qp

    def message_bytes(self) -> tuple[int, int] | None:
        if self.qp is None or not self.was_connected:
            return None
        return self.qp.control.sent, self.qp.control.received

    @property
    def leaving(self) -> bool:
        return super().leaving or self.session is None or self.session.released

    @property
    def copiers_died(self) -> bool:
        return self.session is not None and self.session.copiers_died()

    def changed(self) -> None:
        if self.qp is not None:
            self._publish_state(self.qp)
        super().changed()
        if self.pending and self.session is not None:  # no accept waits for it
            self.session.update_token()

    def _publish_state(self, qp: queue.QueuePair) -> None:
        if self.state is State.CONNECTED:
            state = EP_CONNECTED
        elif self.state is State.DISCONNECTED:
            state = EP_DISCONNECTED
        else:
            state = EP_NONE
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
                lib.mic_scif_token(self.session.fd)
        super().on_sent()

    def on_received(self) -> None:
        if self.qp is not None:
            lib.mic_scif_wake_tx(self.qp.page)
            if self.session is not None:
                lib.mic_scif_unfill(self.session.fd)
        super().on_received()


class Background:
    """A non-blocking connect."""

    __slots__ = ("error", "over", "session", "then")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.over = False
        self.error: ScifError | None = None
        self.then: Callable[[], None] | None = None  # who waits for its end

    def end(self, error: ScifError | None) -> None:
        """The attempt is over."""
        self.over = True
        self.error = error
        ep = self.session.ep
        if error is None and ep.qp is not None:
            ep.qp.control.uncollected = 1
        self.session.writable()
        if self.then is not None:
            self.then()


class Session:
    """One endpoint descriptor of a program: the node's end of its socket, and the endpoint behind it."""

    def __init__(self, service: ScifService, fd: int, sid: int, cookie: int, pid: int) -> None:
        self.service = service
        self.node = service.node
        self.fd = fd  # -1: closed
        self.sid = sid
        self.cookie = cookie
        self.pid = pid
        self._ep: UserEndpoint | None = None
        self.background: Background | None = None  # non-blocking connect, until it is collected
        self.accepting: dict[int, int] = {}  # accept calls that wait, by process
        self.last_acceptor = 0  # the process that took part in listening last (SCIF 2.6)
        self.copiers: set[int] = set()  # pids that mapped the connection
        self.released = False  # the last reference is closed
        self.on_released: list[Callable[[], None]] = []  # what waits for the end of the release
        self.hung_up = False
        self._token = False

    @property
    def ep(self) -> UserEndpoint:
        """The endpoint behind the descriptor. One that waits for an accept gets the connection's."""
        if self._ep is None:
            self._ep = UserEndpoint(self.node, self)
        return self._ep

    @property
    def is_unbound(self) -> bool:
        """Nothing was done with it yet."""
        return self._ep is None or self._ep.state is State.UNBOUND

    # --- readiness of the descriptor --------------------------------------------------------------

    def update_token(self) -> None:
        """Listening: a token while requests wait."""
        if self.ep.state is State.LISTENING and self.ep.pending and not self._token:
            self._token = True
            lib.mic_scif_token(self.fd)

    def surplus_token(self) -> int:
        """1 when the program must take one token off its descriptor, because no request is left."""
        if self._token and not self.ep.pending:
            self._token = False
            return 1
        return 0

    def hang_up(self) -> None:
        """The peer is gone: POLLHUP."""
        if self.hung_up:
            return
        self.hung_up = True
        if lib.mic_scif_hang_up(self.fd) < 0:
            self.release()  # the program has closed it already

    def gone(self) -> bool:
        """Has the program closed its last reference?"""
        if not self.hung_up:
            return True  # the only event that we listen to
        return bool(lib.mic_scif_gone(self.fd))

    # --- connect ----------------------------------------------------------------------------------

    def connect(self, dst: tuple[int, int], nonblock: bool, call: Call) -> None:
        """scif_connect with O_NONBLOCK or without; answers with the local port (SCIF 2.4, 2.5)."""
        if self.background is not None:
            self._collect(dst, call)
            return
        ep = self.ep
        if nonblock:
            background = Background(self)
            try:
                ep.start_connect(dst, background.end)
            except ScifError:
                self.writable()
                raise
            self.background = background
            raise ScifError(errno.EINPROGRESS, "connecting")

        def done(error: ScifError | None) -> None:
            if error is None:
                call.done(Reply((ep.port,)))
            else:
                call.fail(error)

        attempt = ep.start_connect(dst, done)

        def cancel() -> None:
            if ep.attempt is attempt:
                attempt.withdraw(errno.EINTR)

        call.on_cancel = cancel

    def _collect(self, dst: tuple[int, int], call: Call) -> None:
        """Connect again: how did the non-blocking attempt end?"""
        background = self.background
        assert background is not None
        if self.node.path(dst[0]) is None:
            raise ScifError(errno.ENODEV, "node is not online")
        if not background.over:
            raise ScifError(errno.EINPROGRESS, "connecting")
        self.background = None
        self.writable()  # the program has filled it for this call
        if self.ep.qp is not None:
            self.ep.qp.control.uncollected = 0
        if background.error is not None:
            raise background.error
        call.done(Reply((self.ep.port,)))

    def writable(self) -> None:
        """Undo what made the descriptor unwritable."""
        if self.fd >= 0:
            lib.mic_scif_unfill(self.fd)

    def mask(self) -> tuple[int, int]:
        """(poll mask of an endpoint that is not attached, 1 while a connect is pending)."""
        if self.background is not None:
            return (select.POLLOUT, 0) if self.background.over else (0, 1)
        state = self.ep.state
        if state is State.LISTENING:
            return (select.POLLIN if self.ep.pending else 0), 0
        if state is State.CONNECTED:
            return select.POLLOUT, 0  # the program attaches and looks itself
        return select.POLLERR, 0

    # --- accept -----------------------------------------------------------------------------------

    def accept(self, fresh: Session, sync: bool, pid: int, call: Call) -> None:
        """Put the oldest request behind ``fresh``; answers with the peer's (node, port)."""
        self.accepting[pid] = self.accepting.get(pid, 0) + 1

        def over() -> None:
            self.accepting[pid] -= 1
            if not self.accepting[pid]:
                del self.accepting[pid]

        def done(conn: Endpoint | None, error: ScifError | None) -> None:
            over()
            if conn is None:
                call.fail(error or ScifError(errno.EIO), Reply((0, 0, self.surplus_token())))
            elif fresh.released:
                conn.close_then(lambda: None)
                call.fail(ScifError(errno.EBADF, "the new descriptor is gone"))
            else:
                assert isinstance(conn, UserEndpoint)
                fresh.take(conn)
                call.done(Reply((*conn.peer, self.surplus_token())))

        accept = Accept(self.ep, lambda: UserEndpoint(self.node, fresh), sync, done)

        def cancel() -> None:
            over()
            accept.cancel()

        call.on_cancel = cancel
        accept.start()

    def take(self, conn: UserEndpoint) -> None:
        """An accept has ended: ``conn`` is behind the descriptor from now on."""
        old, self._ep = self._ep, conn
        if old is not None:
            old.session = None
            old.destroy()

    def flush(self, pid: int) -> None:
        """Process ``pid`` closes a descriptor of this listener: its accepts end, listening too if it
        was the last to accept (SCIF 2.6, flush rule)."""
        waiting = self.accepting.get(pid)
        if self.ep.state is State.LISTENING and (waiting or self.last_acceptor == pid):
            self.ep.stop_listening()

    # --- attach -----------------------------------------------------------------------------------

    def attach(self, pid: int) -> Reply:
        """Offsets of the connection's pages and the two memories (``enum mic_scif_attach``), for ``pid``.

        Raises ScifError ENOTCONN.
        """
        ep = self.ep
        if ep.qp is None or ep.link is None or ep.path is None:
            raise ScifError(errno.ENOTCONN, "not connected")
        if ep.state not in (State.CONNECTED, State.DISCONNECTED):
            raise ScifError(errno.ENOTCONN, "not connected")
        page = ep.link.page
        try:
            peer_fd, peer_qp = ep.path.peer_place(ep.link.addr, PAGE)
            _, ring = ep.path.peer_place(ep.link.ring_addr, queue.EP_RING)
            _, notify = ep.path.peer_place(page.notify_addr, PAGE)
        except IndexError:
            raise ScifError(errno.ENODEV, "the peer's pages are outside its memory") from None
        self.copiers.add(pid)
        nodes = self.node.id | ep.peer[0] << 16 | ep.port << 32 | ep.peer[1] << 48
        own_notify = self.node.notifier.offset
        places = (ep.qp.offset, peer_qp, ring, own_notify, notify, page.notify_slot, nodes)
        return Reply(places, (self.node.memory_fd, peer_fd))

    def copiers_died(self) -> bool:
        """Is every process that could copy gone? Then its counts in the control page mean nothing.

        A process holds connections to the service for as long as it lives.
        """
        return self.released and not self.copiers & self.service.living()

    # --- release ----------------------------------------------------------------------------------

    def release(self) -> None:
        """The last reference is closed: release the endpoint (SCIF 2.8)."""
        if self.released:
            return
        self.released = True
        background = self.background
        if background is not None and not background.over:
            background.then = self._release  # at most the node timeout
        else:
            self._release()

    def _release(self) -> None:
        if self._ep is None:
            self._released()
            return
        self._ep.close_then(self._released)
        self.node.look_at_copies()  # its process may have died in the middle of one

    def _released(self) -> None:
        if self._ep is not None:
            self._ep.session = None
        self.service.forget(self)
        os.close(self.fd)
        self.fd = -1
        waiting, self.on_released = self.on_released, []
        for callback in waiting:
            callback()
