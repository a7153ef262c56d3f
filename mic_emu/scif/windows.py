"""Windows of an endpoint: registration, announcement to the peer, mappings, release (SCIF 2.10-2.12).

The owner announces a window by writing its list of pages into a record in the peer's memory
(ALLOC_REQ, ALLOC_GNT, REGISTER, REGISTER_ACK). Either side's change raises a generation number in
the control page of its program, which then asks for the lists again; pages are freed only after
every copy that began under the old lists has ended.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.clock import settle
from mic_emu.memory import PAGE
from mic_emu.scif import records
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import END, PROT_READ, PROT_WRITE, Segment, Space, Window, check_pages

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

DRAIN_S = 3.0
DRAIN_STEP_S = 0.0002


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
        """The windows of the endpoint that ``msg`` names. Raises ScifError EINVAL."""
        ep = self.node.endpoints.get(ep_id)
        if ep is None or ep.peer[0] != msg.src[0] or ep.windows.released:
            raise ScifError(errno.EINVAL, "no such endpoint")
        return ep.windows

    def _on_register(self, msg: Msg, link: object) -> None:
        path = self.node.path(msg.src[0])
        try:
            windows = self.of(msg.p0, msg)
            windows.add_remote(msg.p1, msg.p2, self.node.records.take(msg.p1, windows))
        except (OSError, KeyError, IndexError):
            self.node.records.drop(msg.p1)
            if path is not None:
                path.send(msg.answer(Op.REGISTER_NACK))
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
        self.node.spawn(windows.drop_remote(msg), "drop a peer's window")

    def _on_munmap(self, msg: Msg, link: object) -> None:
        windows = self.own.get(msg.p0)
        if windows is None or windows.ep.peer[0] != msg.src[0]:
            raise ScifError(errno.EINVAL, "no such window")
        windows.last_unmap(msg.p0)

    def node_lost(self, node_id: int) -> None:
        """Whatever a lost node had mapped or exposed is over."""
        self.node.records.drop_node(node_id)
        for table in (self.own, self.remote):
            for windows in {id(w): w for w in table.values()}.values():
                if windows.ep.peer[0] == node_id:
                    windows.forget_peer()


class Windows:
    """Both lists of one endpoint."""

    def __init__(self, ep: Endpoint) -> None:
        self.ep = ep
        self.node = ep.node
        self.own: Space[Window] = Space()
        self.remote: Space[Window] = Space()
        self.released = False  # the endpoint is being released: nothing new
        self._lock = asyncio.Lock()  # raise, wait for the old copies, free: one after the other

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

    def abandon(self, window: Window) -> None:
        """The registration failed, or the window is destroyed."""
        self.own.remove(window)
        self.table.own.pop(window.id, None)

    async def announce(self, window: Window, segments: list[Segment]) -> None:
        """Tell the peer; when this returns, it can use the window (SCIF-84)."""
        ep, path = self.ep, self.ep.path
        ep.check_connected()
        assert path is not None
        window.segments = segments
        request = self.node.new_id()
        src, dst = (self.node.id, ep.port), ep.peer
        grant = await self.node.questions.ask(
            ep, Msg(Op.ALLOC_REQ, src, dst, ep.remote_id, len(segments), request), request
        )
        if grant.op != Op.ALLOC_GNT:
            raise ScifError(errno.ENOMEM, "the peer has no room for its record")
        record = records.pack(window, path)
        try:
            path.peer_view(grant.p1, len(record)).write(0, record)
        except IndexError:
            raise ScifError(errno.ENOMEM, "the peer's record is outside its memory") from None
        window.peer_id = grant.p0
        answer = await self.node.questions.ask(
            ep, Msg(Op.REGISTER, src, dst, ep.remote_id, grant.p0, window.id), window.id
        )
        if answer.op != Op.REGISTER_ACK:
            raise ScifError(errno.ENOMEM, "the peer refused the window")
        window.alive = True
        self._raise_gen()
        if self.released:  # it came too late: the peer must let go of it again
            await self._quietly(window)
            raise ScifError(errno.ENOTCONN, "closed meanwhile")

    def add_remote(self, record: int, owner_id: int, data: bytes) -> None:
        """The peer announced a window in ``record``. Raises ScifError, IndexError."""
        offset, length, prot, segments = records.unpack(data, self.ep.path)
        window = Window(record, offset, length, prot, segments, owner_id, alive=True)
        self.remote.add(window)
        self.table.remote[record] = self
        self._raise_gen()

    # --- unregistration ---------------------------------------------------------------------------

    async def unregister(self, offset: int, length: int) -> None:
        """Remove the windows that make up [offset, offset + length) (SCIF 2.11)."""
        check_pages(offset, length)
        self.ep.check_connected()
        windows = self.own.cover(offset, length, usable=False)
        if windows[0].offset != offset:
            raise ScifError(errno.EINVAL, "begins inside a window")
        if windows[-1].end != offset + length:
            raise ScifError(errno.ENXIO, "ends inside a window")
        for window in windows:
            await self._withdraw(window)

    async def _withdraw(self, window: Window) -> None:
        """Begin or join the withdrawal; it runs to its end whatever becomes of the caller."""
        if window.withdrawal is None and window.alive:
            window.withdrawal = self.node.spawn(self._run_withdrawal(window), "withdraw a window")
        if window.withdrawal is not None:
            await asyncio.shield(window.withdrawal)

    async def _run_withdrawal(self, window: Window) -> None:
        """UNREGISTER; with the peer's ACK its pages are free, with its NACK it lingers."""
        window.alive = False
        self._raise_gen()
        ep = self.ep
        msg = Msg(Op.UNREGISTER, (self.node.id, ep.port), ep.peer, window.peer_id, window.id)
        try:
            answer = await self.node.questions.ask(ep, msg, window.id, patient=True)
        except ScifError:
            if self.own_known(window):
                await self._destroy(window)
            raise
        if answer.op == Op.UNREGISTER_NACK:
            window.lingering = True
        else:
            await self._destroy(window)

    def own_known(self, window: Window) -> bool:
        """Is the window still in our list?"""
        return window.id in self.table.own

    async def _destroy(self, window: Window) -> None:
        await self._drained()
        self.abandon(window)
        self.node.pages.release(window.segments)

    def last_unmap(self, window_id: int) -> None:
        """MUNMAP: the peer's last mapping of a lingering window is gone."""
        for window in self.own:
            if window.id == window_id and window.lingering:
                self.abandon(window)
                self.node.pages.release(window.segments)

    async def drop_remote(self, msg: Msg) -> None:
        """UNREGISTER from the peer: no new use; answer when the copies in progress have ended."""
        window = next((w for w in self.remote if w.id == msg.p0), None)
        op = Op.UNREGISTER_ACK
        if window is not None:
            window.alive = False
            self._raise_gen()
            await self._drained()
            if window.mapped_pages:
                window.lingering = True
                op = Op.UNREGISTER_NACK
            else:
                self._forget_remote(window)
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
        if window.lingering and not window.mapped_pages:
            self._forget_remote(window)
            ep = self.ep
            if ep.path is not None and self.node.path(ep.peer[0]) is ep.path:
                ep.path.send(Msg(Op.MUNMAP, (self.node.id, ep.port), ep.peer, window.peer_id))

    # --- end --------------------------------------------------------------------------------------

    async def release(self) -> None:
        """The endpoint is being released: own windows go, mappings of its programs are gone (SCIF 2.8)."""
        self.released = True
        for window in self.remote:
            self._unmapped(window, window.mapped_pages)
        await asyncio.gather(*(self._quietly(w) for w in self.own))
        for window in self.remote:
            self._forget_remote(window)
        self.node.records.drop_of(self)

    async def _quietly(self, window: Window) -> None:
        try:
            await self._withdraw(window)
        except ScifError:
            pass  # the peer is gone; the window is destroyed all the same

    def forget_peer(self) -> None:
        """The peer's node is lost: nothing of it is mapped by living programs any more."""
        for window in self.remote:
            self._forget_remote(window)
        for window in self.own:
            if window.lingering:
                self.abandon(window)
                self.node.pages.release(window.segments)
        self._raise_gen()

    # --- programs ---------------------------------------------------------------------------------

    def _raise_gen(self) -> None:
        if self.ep.qp is not None:
            lib.mic_scif_raise_gen(self.ep.qp.control)

    async def _drained(self) -> None:
        """Wait until every copy that began before the last raise has ended, at most DRAIN_S.

        A copy takes microseconds to milliseconds; there is no event for its end, so look again soon.
        """
        async with self._lock:
            qp = self.ep.qp
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            limit = self.node.clock.alarm(self.node.clock.api(DRAIN_S), lambda: settle(done))
            while qp is not None and qp is self.ep.qp and lib.mic_scif_busy(qp.control) and not done.done():
                await asyncio.sleep(DRAIN_STEP_S)
            limit.cancel()
