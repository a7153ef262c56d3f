"""Requests of programs about windows, mappings and fences (SCIF 2.10-2.15)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.scif.control import Answer, Call, Control, Reply
from mic_emu.scif.errors import ScifError
from mic_emu.scif.ras import Segment, Window
from mic_emu.scif.session import Session

if TYPE_CHECKING:
    from mic_emu.scif.service import ScifService
    from mic_emu.scif.windows import Windows

_SEG = struct.Struct("<2Q")
_WIN = struct.Struct("<3Q2I")


def signed(value: int) -> int:
    """An off_t that travelled as 64 unsigned bits."""
    return value - (1 << 64) if value >> 63 else value


@dataclass
class Ticket:
    """A registration between BEGIN and COMMIT."""

    windows: Windows
    window: Window
    run: int | None
    pid: int
    sid: int


class MemoryRequests:
    """The part of the service that deals with memory."""

    def __init__(self, service: ScifService) -> None:
        self.node = service.node
        self._tickets: dict[int, Ticket] = {}
        self.handlers: dict[int, Callable[[Control, Session, list[int], bytes], Answer]] = {
            lib.MIC_SCIF_REG_BEGIN: self._begin,
            lib.MIC_SCIF_REG_COMMIT: self._commit,
            lib.MIC_SCIF_REG_ABORT: self._abort,
            lib.MIC_SCIF_UNREGISTER: self._unregister,
            lib.MIC_SCIF_WINDOWS: self._windows,
            lib.MIC_SCIF_MMAP: self._mmap,
            lib.MIC_SCIF_MUNMAP: self._munmap,
            lib.MIC_SCIF_FENCE_MARK: self._mark,
            lib.MIC_SCIF_FENCE_WAIT: self._wait,
            lib.MIC_SCIF_FENCE_SIGNAL: self._signal,
            lib.MIC_SCIF_COPY: self._copy,
        }

    # --- registration -----------------------------------------------------------------------------

    def _begin(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        try:
            return self._reserve(control, session, args)
        except ScifError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            call = control.call
            assert call is not None
            if not session.ep.windows.settle(
                signed(args[0]), args[1], lambda _: self._settled(control, session, args, call)
            ):
                raise
        return None

    def _settled(self, control: Control, session: Session, args: list[int], call: Call) -> None:
        """What lingered in the range is gone, or is mapped by the peer still."""
        if control.call is not call:  # a signal, or the end of the process
            return
        try:
            call.done(self._reserve(control, session, args))
        except OSError as e:
            call.fail(e)

    def _reserve(self, control: Control, session: Session, args: list[int]) -> Reply:
        offset, length, prot, flags, nbytes = args
        windows = session.ep.windows
        window = windows.reserve(signed(offset), length, prot, bool(flags))
        try:
            run = self.node.pages.allocate(control.pid, nbytes) if nbytes else None
        except BaseException:
            windows.abandon(window)
            raise
        self._tickets[window.id] = Ticket(windows, window, run, control.pid, session.sid)
        return Reply([window.id, run or 0], [self.node.memory_fd])

    def _ticket(self, control: Control, session: Session, key: int) -> Ticket:
        """Take the ticket; it is of no use to anybody else. Raises ScifError EINVAL."""
        ticket = self._tickets.get(key)
        if ticket is None or (ticket.pid, ticket.sid) != (control.pid, session.sid):
            raise ScifError(errno.EINVAL, "no such registration")
        return self._tickets.pop(key)

    def _commit(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        ticket = self._ticket(control, session, args[0])
        windows, window = ticket.windows, ticket.window
        held: list[Segment] = []
        try:
            segments = list(_SEG.iter_unpack(data[: len(data) & -16]))
            if sum(n for _, n in segments) != window.length:
                raise ScifError(errno.EINVAL, "wrong number of pages")
            held = self.node.pages.hold(control.pid, segments)
            # Once the peer may know of it, it runs to its end whatever becomes of the caller.
            call = control.call
            assert call is not None
            windows.announce(window, held, lambda error: self._announced(windows, window, held, call, error))
        except BaseException:
            self._undo(windows, window, held)
            raise
        return None

    def _announced(
        self, windows: Windows, window: Window, held: list[Segment], call: Call, error: ScifError | None
    ) -> None:
        if error is not None:
            self._undo(windows, window, held)
            call.fail(error)
        else:
            call.done(Reply((window.offset & (1 << 64) - 1,)))

    def _undo(self, windows: Windows, window: Window, held: list[Segment]) -> None:
        """The registration failed."""
        if window.id in self.node.windows.own:  # else it was destroyed already, pages and all
            windows.abandon(window)
            self.node.pages.release(held)

    def forget(self, sid: int) -> None:
        """The endpoint is released: its unfinished registrations are over."""
        for ticket in [t for t in self._tickets.values() if t.sid == sid]:
            del self._tickets[ticket.window.id]
            ticket.windows.abandon(ticket.window)

    def _abort(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        ticket = self._ticket(control, session, args[0])
        ticket.windows.abandon(ticket.window)
        if ticket.run is not None and not args[1]:  # else part of it is already in use
            self.node.pages.drop(ticket.pid, ticket.run)
        return Reply()

    def _unregister(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        call = control.call
        assert call is not None
        session.ep.windows.unregister(signed(args[0]), args[1], call.end)
        return None

    def drop(self, control: Control, data: bytes) -> Reply:
        """Pages that the process no longer maps."""
        for o in range(0, len(data) & -16, 16):
            self.node.pages.drop(control.pid, _SEG.unpack_from(data, o)[0])
        return Reply()

    # --- lists and mappings -----------------------------------------------------------------------

    def _windows(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        ep = session.ep
        ep.check_connected()
        path = ep.path
        assert path is not None
        assert ep.qp is not None
        gen = int(ep.qp.control.gen)
        own = [w for w in ep.windows.own if w.alive]
        remote = [w for w in ep.windows.remote if w.alive]
        out = bytearray()
        for w in own:
            out += _pack(w, w.segments)
        fd = self.node.memory_fd
        for w in remote:
            places = [path.window_place(addr, n) for addr, n in w.segments]
            fd = places[0][0]
            out += _pack(w, [(off, n) for (_, off), (_, n) in zip(places, w.segments, strict=True)])
        return Reply([gen, len(own), len(remote)], [self.node.memory_fd, fd], bytes(out))

    def _mmap(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        offset, length = signed(args[0]), args[1]
        path = session.ep.path
        segments = session.ep.windows.map(offset, length, args[2])
        assert path is not None
        places = [path.window_place(addr, n) for addr, n in segments]
        body = b"".join(_SEG.pack(off, n) for (_, off), (_, n) in zip(places, segments, strict=True))
        return Reply([len(segments)], [places[0][0]], body)

    def _munmap(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        session.ep.windows.unmap(signed(args[0]), args[1])
        return Reply()

    # --- copies and fences ------------------------------------------------------------------------

    def _copy(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        loff, roff, length, flags, _ = args
        self.node.rma.copy(session.ep, signed(loff), signed(roff), length, flags)
        return Reply()

    async def _mark(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        return Reply([await self.node.fences.mark(session.ep)])

    async def _wait(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        await self.node.fences.wait(session.ep, args[0])
        return Reply()

    async def _signal(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        loff, lval, roff, rval, flags = args
        await self.node.fences.signal(session.ep, signed(loff), lval, signed(roff), rval, flags)
        return Reply()


def _pack(window: Window, segments: Iterable[Segment]) -> bytes:
    body = b"".join(_SEG.pack(*s) for s in segments)
    return _WIN.pack(window.id, window.offset, window.length, window.prot, len(body) // _SEG.size) + body
