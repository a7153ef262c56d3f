"""Announcing a window to the peer: ALLOC_REQ, ALLOC_GNT, the record, REGISTER, REGISTER_ACK (SCIF 3.4)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mic_emu.scif import records
from mic_emu.scif.connector import Done
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import Window

if TYPE_CHECKING:
    from mic_emu.scif.windows import Windows


def _refusal(answer: Msg) -> ScifError:
    """Rows 11 and 12 of SCIF 2.10: the peer has no room for its record, or is closing."""
    if answer.p3 == errno.ENOTCONN:
        return ScifError(errno.ENOTCONN, "the peer closes")
    return ScifError(errno.ENOMEM, "the peer refused the window")


class Announcement:
    """One window on its way to the peer; ``done`` hears how it ended, once. Until then it is not usable."""

    __slots__ = ("_done", "_window", "_windows")

    def __init__(self, windows: Windows, window: Window, done: Done) -> None:
        self._windows = windows
        self._window = window
        self._done = done

    def start(self) -> None:
        """Ask for room for the record."""
        ep = self._windows.ep
        key = ep.node.new_id()
        src = (ep.node.id, ep.port)
        msg = Msg(Op.ALLOC_REQ, src, ep.peer, ep.remote_id, len(self._window.segments), key)
        ep.node.questions.put(ep, msg, key, self._granted)

    def _granted(self, grant: Msg | None, error: ScifError | None) -> None:
        ep, window = self._windows.ep, self._window
        path = ep.path
        if grant is None or path is None:
            self._done(error or ScifError(errno.ENOTCONN))
            return
        if grant.op != Op.ALLOC_GNT:
            self._done(_refusal(grant))
            return
        record = records.pack(window, path)
        try:
            path.peer_view(grant.p1, len(record)).write(0, record)
        except IndexError:
            self._done(ScifError(errno.ENOMEM, "the peer's record is outside its memory"))
            return
        window.peer_id = grant.p0
        src = (ep.node.id, ep.port)
        msg = Msg(Op.REGISTER, src, ep.peer, ep.remote_id, grant.p0, window.id)
        # From here on the peer may know it: an answer comes, and only that says that it does not.
        ep.node.questions.put(ep, msg, window.id, self._registered, patient=True)

    def _registered(self, answer: Msg | None, error: ScifError | None) -> None:
        if answer is None:
            self._done(error)
        elif answer.op != Op.REGISTER_ACK:
            self._done(_refusal(answer))
        else:
            self._windows.announced(self._window, self._done)
