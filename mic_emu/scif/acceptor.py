"""The accepting end: grant the oldest request, wait for the connector's confirmation (SCIF 2.6, 3.4)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from mic_emu.scif.endpoint import Endpoint, Request
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.state import State

Accepted = Callable[["Endpoint | None", "ScifError | None"], None]


class Accept:
    """One accept call: ``done`` hears of the connection or the error, once.

    ``make`` gives the new endpoint. ``sync``: wait for a request. Errors: EINVAL (not listening), EAGAIN
    (not ``sync`` and no request), ENOMEM, EIO, ENODEV (SCIF 2.6), EINTR (the listener was closed).
    """

    __slots__ = ("_done", "_make", "_sync", "listener")

    def __init__(self, listener: Endpoint, make: Callable[[], Endpoint], sync: bool, done: Accepted) -> None:
        self.listener = listener
        self._make = make
        self._sync = sync
        self._done: Accepted | None = done

    def start(self) -> None:
        """Take a request, now or when one comes."""
        if self.listener.state is not State.LISTENING:
            self.fail(errno.EINVAL)
        elif not self._sync and not self.listener.pending:
            self.fail(errno.EAGAIN)
        else:
            self.listener.accepts.append(self)
            self.listener.serve_accepts()

    def fail(self, code: int, what: str = "accept") -> None:
        """It is over without a connection."""
        self._end(None, ScifError(code, what))

    def _end(self, conn: Endpoint | None, error: ScifError | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(conn, error)

    def cancel(self) -> None:
        """The caller is gone: no answer; a connection that still comes is closed."""
        self._done = None
        if self in self.listener.accepts:
            self.listener.accepts.remove(self)

    def grant(self, request: Request) -> None:
        """Grant ``request`` and wait for the final ack."""
        listener = self.listener
        node = listener.node
        path = node.path(request.peer[0])
        if path is None:
            self.fail(errno.ENODEV, f"node {request.peer[0]} is gone")
            return
        conn = self._make()
        node.ports.share(listener.port)
        conn.port, conn.peer, conn.path = listener.port, request.peer, path
        src = (node.id, listener.port)
        try:
            qp = conn.open_qp(path)
            conn.attach(path, request.qp_addr, request.remote_id)
        except OSError as e:
            path.send(Msg(Op.CNCT_REJ, src, request.peer, request.remote_id, request.qp_addr))
            conn.destroy()
            if e.errno == errno.ECANCELED:
                self._again()
            else:
                self.fail(errno.EIO if isinstance(e, ScifError) else errno.ENOMEM, f"accept: {e}")
            return
        conn.state = State.CONNECTING
        conn.accept_call = self
        addr = path.own_addr(qp.offset)
        path.send(Msg(Op.CNCT_GNT, src, request.peer, request.remote_id, addr, conn.id))
        node.events.expect()
        listener.changed()  # one request less

    def _again(self) -> None:
        """The connector withdrew: the next request, if this call may wait for one."""
        if not self._sync and not self.listener.pending:
            self.fail(errno.EAGAIN)
        elif self.listener.state is not State.LISTENING:
            self.fail(errno.EINTR)
        elif self._done is not None:
            self.listener.accepts.appendleft(self)
            self.listener.serve_accepts()

    def confirmed(self, conn: Endpoint, good: bool) -> None:
        """The final ack of ``conn``; not ``good``: the connector could not attach."""
        conn.accept_call = None
        conn.set_state(State.CONNECTED if good else State.CLOSING)
        if not good:
            conn.destroy()
            self._again()
        elif self._done is None:
            conn.close_then(lambda: None)  # nobody waits for it any more
        else:
            self._end(conn, None)

    def node_lost(self, conn: Endpoint) -> None:
        """The connector's node is gone before it confirmed."""
        conn.accept_call = None
        node = conn.peer[0]
        conn.destroy()
        self.fail(errno.ENODEV, f"node {node} is gone")
