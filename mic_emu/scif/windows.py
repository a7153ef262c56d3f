"""Windows of an endpoint: registration, announcement to the peer, mappings, release (SCIF 2.10-2.12).

The owner announces a window by writing its list of pages into a record in the peer's memory
(ALLOC_REQ, ALLOC_GNT, REGISTER, REGISTER_ACK). Either side's change raises a generation number in
the control page of its program, which then asks for the lists again; pages are freed only after
every copy that began under the old lists has ended.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu.memory import PAGE
from mic_emu.scif import records
from mic_emu.scif.announce import Announcement
from mic_emu.scif.connector import Done
from mic_emu.scif.errors import Late, ScifError
from mic_emu.scif.link import Link
from mic_emu.scif.lists import Grace, Lists
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import END, PROT_READ, PROT_WRITE, Segment, Space, Window, check_pages

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node


class WindowTable:
    """Node-wide: windows by id, so that messages find them even after their endpoint is gone."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.own: dict[int, Windows] = {}  # by window id
        self.remote: dict[int, Windows] = {}
        on, answer = node.add_handler, node.questions.answer
        on(Op.REGISTER, self._on_register)
        on(Op.REGISTER_ACK, lambda msg, link: answer(msg.p2, msg))
        on(Op.REGISTER_NACK, lambda msg, link: answer(msg.p2, msg))
        on(Op.UNREGISTER, self._on_unregister)
        on(Op.UNREGISTER_ACK, lambda msg, link: answer(msg.p1, msg))
        on(Op.UNREGISTER_NACK, lambda msg, link: answer(msg.p1, msg))
        on(Op.MUNMAP, self._on_munmap)

    def of(self, ep_id: int, msg: Msg) -> Windows:
        """The windows of the endpoint that ``msg`` names. Raises ScifError ENOTCONN."""
        ep = self.node.endpoints.get(ep_id)
        if ep is None or ep.peer[0] != msg.src[0] or ep.released:
            raise Late(errno.ENOTCONN, "no such endpoint")
        return ep.windows

    def _on_register(self, msg: Msg, link: object) -> None:
        path = self.node.path(msg.src[0])
        try:
            windows = self.of(msg.p0, msg)
            windows.add_remote(msg.p1, msg.p2, self.node.records.take(msg.p1, windows))
        except (OSError, KeyError, IndexError) as e:
            self.node.records.drop(msg.p1, msg.src[0])
            if path is not None:
                path.send(msg.refuse(Op.REGISTER_NACK, e))
            raise
        if path is not None:
            path.send(msg.answer(Op.REGISTER_ACK))

    def _on_unregister(self, msg: Msg, link: object) -> None:
        windows = self.remote.get(msg.p0)
        if windows is None or windows.ep.peer[0] != msg.src[0]:
            path = self.node.path(msg.src[0])
            if path is not None:  # nobody knows it (any more): it is certainly not in use
                path.send(msg.answer(Op.UNREGISTER_ACK))
            return
        windows.drop_remote(msg)

    def _on_munmap(self, msg: Msg, link: object) -> None:
        windows = self.own.get(msg.p0)
        if windows is None or windows.ep.peer[0] != msg.src[0]:
            raise ScifError(errno.EINVAL, "no such window")
        windows.last_unmap(msg.p0)

    def node_lost(self, node_id: int) -> list[Grace]:
        """Whatever a lost node had mapped or exposed is over; returns the ends of copies in progress."""
        copies: list[Grace] = []
        self.node.records.drop_node(node_id)
        for table in (self.own, self.remote):
            for windows in {id(w): w for w in table.values()}.values():
                if windows.ep.peer[0] == node_id:
                    copies.append(windows.forget_peer())
        return copies


class Windows:
    """Both lists of one endpoint."""

    def __init__(self, ep: Endpoint) -> None:
        self.ep = ep
        self.node = ep.node
        self.own: Space[Window] = Space()
        self.remote: Space[Window] = Space()
        self.lists = Lists(ep)

    @property
    def connected(self) -> bool:
        return self.ep.is_connected

    @property
    def table(self) -> WindowTable:
        return self.node.windows

    # --- registration -----------------------------------------------------------------------------

    def reserve(self, offset: int, length: int, prot: int, fixed: bool) -> Window:
        """Take the place of a new window. Raises ScifError as SCIF 2.10, rows 3-8."""
        if fixed:
            check_pages(offset, length)
        self.ep.check_connected()
        at = offset if fixed else self.own.free_offset(length)
        window = Window(self.node.new_id(), at, length, prot & (PROT_READ | PROT_WRITE))
        self.own.add(window)
        self.table.own[window.id] = self
        return window

    def settle(self, offset: int, length: int, done: Done) -> bool:
        """A fixed range is taken: by windows that are going? Then ask the peer, again for one that lingers: the
        message about its last mapping may be under way (SCIF-98). False: none is, ``done`` is not called."""
        inside = [w for w in self.own if w.offset < offset + length and offset < w.end]
        going = [w for w in inside if w.lingering or w.leaving is not None]
        if going:
            self._withdraw_all(going, done)
        return bool(going)

    def abandon(self, window: Window) -> None:
        """The registration failed, or the window is destroyed."""
        self.own.remove(window)
        self.table.own.pop(window.id, None)

    def announce(self, window: Window, segments: list[Segment], done: Done) -> None:
        """Tell the peer; after ``done`` it can use the window (SCIF-84)."""
        self.ep.check_connected()
        window.segments = segments
        Announcement(self, window, done).start()

    def announced(self, window: Window, done: Done) -> None:
        """The peer knows the window."""
        window.alive = True
        self.lists.changed()
        if self.ep.released:  # it came too late: the peer must let go of it again
            self._withdraw(window, lambda _: done(ScifError(errno.ENOTCONN, "closed meanwhile")))
        else:
            done(None)

    def add_remote(self, record: int, owner_id: int, data: bytes) -> None:
        """The peer announced a window in ``record``. Raises ScifError, IndexError."""
        offset, length, prot, segments = records.unpack(data, self.ep.path)
        window = Window(record, offset, length, prot, segments, owner_id, alive=True)
        self.remote.add(window)
        self.table.remote[record] = self
        self.lists.changed()

    # --- unregistration ---------------------------------------------------------------------------

    def unregister(self, offset: int, length: int, done: Done) -> None:
        """Remove the windows that make up [offset, offset + length) (SCIF 2.11). Raises ScifError."""
        check_pages(offset, length)
        self.ep.check_connected()
        windows = self.own.cover(offset, length, usable=False)
        if windows[0].offset != offset:
            raise ScifError(errno.EINVAL, "begins inside a window")
        if windows[-1].end != offset + length:
            raise ScifError(errno.ENXIO, "ends inside a window")
        self._withdraw_all([w for w in windows if w.alive or w.leaving is not None], done)

    def _withdraw_all(self, windows: list[Window], done: Done) -> None:
        """Withdraw them side by side; ``done`` gets the first error."""
        count, first = len(windows), None

        def one(error: ScifError | None) -> None:
            nonlocal count, first
            count -= 1
            first = first or error
            if not count:
                done(first)

        if not windows:
            done(None)
        for window in windows:
            self._withdraw(window, one)

    def _withdraw(self, window: Window, done: Done) -> None:
        """Begin or join the withdrawal: UNREGISTER; with the peer's ACK its pages are free, with its NACK
        it lingers. It runs to its end whatever becomes of the caller."""
        if window.leaving is not None:
            window.leaving.append(done)
            return
        window.leaving = [done]
        window.alive = False
        grace = self.lists.changed()
        ep = self.ep
        msg = Msg(Op.UNREGISTER, (self.node.id, ep.port), ep.peer, window.peer_id, window.id)

        def answered(answer: Msg | None, error: ScifError | None) -> None:
            if answer is not None and answer.op == Op.UNREGISTER_NACK:
                window.lingering = True
                self._withdrawn(window, error)
            else:
                grace.then(lambda: self._destroy(window, error))

        self.node.questions.put(ep, msg, window.id, answered, patient=True)

    def _withdrawn(self, window: Window, error: ScifError | None) -> None:
        waiting, window.leaving = window.leaving or [], None
        for done in waiting:
            done(error)

    def _destroy(self, window: Window, error: ScifError | None = None) -> None:
        self.node.rma.idle([window], lambda: self._destroyed(window, error))

    def _destroyed(self, window: Window, error: ScifError | None) -> None:
        """The place is free, the pages when no DMA channel touches them any more: neither ours nor those of
        a card that was lost and could not be stopped."""
        path = self.ep.path

        def release() -> None:
            self.node.pages.release(window.segments)

        if window.id in self.table.own:
            self.abandon(window)
            window.when_idle(lambda: path.ports.keep(release) if isinstance(path, Link) else release())
        self._withdrawn(window, error)

    def last_unmap(self, window_id: int) -> None:
        """MUNMAP: the peer's last mapping of a lingering window is gone."""
        for window in self.own:
            if window.id == window_id and window.lingering:
                self._end_lingering(window)

    def _end_lingering(self, window: Window) -> None:
        """Nobody maps it any more: it goes when the copies in progress have ended."""
        window.lingering = False
        self.lists.changed().then(lambda: self._destroy(window))

    def drop_remote(self, msg: Msg) -> None:
        """UNREGISTER from the peer: no new use; answer when the copies in progress have ended."""
        window = next((w for w in self.remote if w.id == msg.p0), None)
        if window is None:
            self._answer_unregister(msg, Op.UNREGISTER_ACK)
            return
        window.alive = False
        self.lists.changed().then(lambda: self.node.rma.idle([window], lambda: self._dropped(window, msg)))

    def _dropped(self, window: Window, msg: Msg) -> None:
        if window.mapped_pages or window.users:
            window.lingering = True
            window.when_idle(lambda: self._unmapped(window, 0))
            self._answer_unregister(msg, Op.UNREGISTER_NACK)
        else:
            self._forget_remote(window)
            self._answer_unregister(msg, Op.UNREGISTER_ACK)

    def _answer_unregister(self, msg: Msg, op: Op) -> None:
        if self.ep.path is not None:
            self.ep.path.send(Msg(op, msg.dst, msg.src, self.ep.remote_id, msg.p1))

    def _forget_remote(self, window: Window) -> None:
        self.remote.remove(window)
        self.table.remote.pop(window.id, None)

    # --- mappings ---------------------------------------------------------------------------------

    def map(self, offset: int, length: int, prot: int) -> list[Segment]:
        """Count a mapping of the peer's windows; returns the bus addresses of its pages (SCIF 2.12)."""
        self.ep.check_connected()
        if offset < 0 or offset + length > END:
            raise ScifError(errno.ENXIO, "outside every window")
        out: list[Segment] = []
        for window in self.remote.cover(offset, length, prot & (PROT_READ | PROT_WRITE)):
            start, end = max(offset, window.offset), min(offset + length, window.end)
            out += window.places(start, end - start)
            window.mapped_pages += (end - start) // PAGE
        return out

    def unmap(self, offset: int, length: int) -> None:
        """Pages were unmapped; the last one of a lingering window tells its owner."""
        for window in self.remote:
            start, end = max(offset, window.offset), min(offset + length, window.end)
            if start < end:
                self._unmapped(window, (end - start) // PAGE)

    def _unmapped(self, window: Window, count: int) -> None:
        window.mapped_pages = max(0, window.mapped_pages - count)
        if window.lingering and not window.mapped_pages and not window.users:
            self._forget_remote(window)
            ep = self.ep
            if ep.path is not None and self.node.path(ep.peer[0]) is ep.path:
                ep.path.send(Msg(Op.MUNMAP, (self.node.id, ep.port), ep.peer, window.peer_id))

    # --- end --------------------------------------------------------------------------------------

    def release(self, done: Callable[[], None]) -> None:
        """The endpoint is being released: own windows go, mappings of its programs are gone (SCIF 2.8)."""
        for window in self.remote:
            self._unmapped(window, window.mapped_pages)
        left = [w for w in self.own if w.alive or w.leaving is not None]
        self._withdraw_all(left, lambda _: self._released(done))

    def _released(self, done: Callable[[], None]) -> None:
        """The peer may be gone; the windows are destroyed all the same."""
        self.node.rma.idle(list(self.remote), lambda: self._idle(done))

    def _idle(self, done: Callable[[], None]) -> None:
        for window in self.remote:
            window.when_idle(lambda w=window: self._forget_remote(w))  # type: ignore[misc]
        done()

    def forget_peer(self) -> Grace:
        """The peer's node is lost: nothing of it is in use once the copies in progress have ended."""
        for window in self.remote:
            self._forget_remote(window)
        for window in self.own:
            if window.lingering:
                self._end_lingering(window)
        return self.lists.changed()
