"""The connecting end: a request, its answer, the confirmation (SCIF 2.4, 3.4)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.state import State

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.paths import Path

Done = Callable[["ScifError | None"], None]


def check_connect(ep: Endpoint, dst: tuple[int, int]) -> Path:
    """Rows 2-8 of SCIF 2.4; returns the path to the node. Raises ScifError."""
    path = ep.node.path(dst[0])
    if path is None:
        raise ScifError(errno.ENODEV, f"node {dst[0]} is not online")
    if dst[1] == 0:
        raise ScifError(errno.EINVAL, "port 0 cannot be connected to")
    if ep.state in (State.LISTENING, State.CLOSE_LISTENING):
        raise ScifError(errno.EOPNOTSUPP, "a listening endpoint cannot connect")
    if ep.state in (State.CONNECTED, State.CONNECTING, State.MAPPING):
        raise ScifError(errno.EISCONN, "connected or connecting")
    if ep.state in (State.DISCONNECTED, State.CLOSING):
        raise ScifError(errno.EINVAL, "disconnected")
    return path


class Attempt:
    """A request that was sent and is not answered; ``done`` hears the outcome, once."""

    __slots__ = ("_done", "_limit", "_path", "ep")

    def __init__(self, ep: Endpoint, path: Path, done: Done) -> None:
        self.ep = ep
        self._path = path
        self._done = done
        self._limit = ep.node.answers.start(self._give_up)

    def _end(self, error: ScifError | None) -> None:
        self._limit.cancel()
        self._done(error)

    def granted(self, msg: Msg) -> None:
        """CNCT_GNT: attach to the acceptor's queue pair and confirm."""
        ep = self.ep
        ep.state = State.MAPPING
        try:
            ep.attach(self._path, msg.p1, msg.p2)
        except ScifError as e:
            self._path.send(msg.answer(Op.CNCT_GNTNACK, p0=msg.p2))
            self.fail(e.errno or errno.EIO)
            return
        self._path.send(msg.answer(Op.CNCT_GNTACK, p0=msg.p2, p1=0, p2=0))
        ep.attempt = None
        ep.set_state(State.CONNECTED)
        self._end(None)

    def fail(self, code: int) -> None:
        """It is over: back to Bound, the same port kept."""
        ep = self.ep
        ep.attempt = None
        ep.drop_qp()
        ep.set_state(State.BOUND)
        self._end(ScifError(code, f"connect to {ep.peer[0]}:{ep.peer[1]}"))

    def withdraw(self, code: int) -> None:
        """Take the request back; the listener drops it (the real stack leaves it there, SCIF 2.4)."""
        ep = self.ep
        self._path.send(Msg(Op.DISCNCT, (ep.node.id, ep.port), ep.peer, ep.id, 0))
        self.fail(code)

    def forget(self) -> None:
        """The endpoint is destroyed without a word."""
        self.ep.attempt = None
        self._limit.cancel()

    def _give_up(self) -> None:
        """Nobody answered in time: ECONNREFUSED, or ENODEV when the link is stuck or gone."""
        if self.ep.attempt is not self:
            return
        if self._path.stuck or self.ep.node.path(self.ep.peer[0]) is None:
            self.fail(errno.ENODEV)
        else:
            self.withdraw(errno.ECONNREFUSED)
