"""Windows of an endpoint: registration, announcement to the peer, mappings, release (SCIF 2.10-2.12).

The owner announces a window by writing its list of pages into a record in the peer's memory
(ALLOC_REQ, ALLOC_GNT, REGISTER, REGISTER_ACK). Either side's change raises a generation number in
the control page of its program, which then asks for the lists again; pages are freed only after
every copy that began under the old lists has ended.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.clock import settle
from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import END, PROT_READ, PROT_WRITE, Segment, Space, Window, check_pages

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

RECORD = struct.Struct("<8Q")  # magic, offset, length, prot, segments, 3 reserved
SEGMENT = struct.Struct("<2Q")
RECORD_MAGIC = 0x5C1F57494E444F57
MAX_SEGMENTS = 1 << 16
DRAIN_S = 3.0
DRAIN_STEP_S = 0.0002


class WindowTable:
    """Node-wide: windows by id, so that messages find them even after their endpoint is gone."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.own: dict[int, Windows] = {}  # by window id
        self.remote: dict[int, Windows] = {}
        self.records: dict[int, tuple[int, Windows, int]] = {}  # offset in our memory, owner, bytes
        self.waiting: dict[int, asyncio.Future[Msg]] = {}  # answers by request or window id
        on = node.add_handler
        on(Op.ALLOC_REQ, self._on_alloc)
        on(Op.ALLOC_GNT, self._on_grant)
        on(Op.ALLOC_REJ, lambda msg, link: self.answer(msg.p2, msg))
        on(Op.FREE_VIRT, lambda msg, link: self._drop_record(msg.p1))
        on(Op.REGISTER, self._on_register)
        on(Op.REGISTER_ACK, lambda msg, link: self.answer(msg.p2, msg))
        on(Op.REGISTER_NACK, lambda msg, link: self.answer(msg.p2, msg))
        on(Op.UNREGISTER, self._on_unregister)
        on(Op.UNREGISTER_ACK, lambda msg, link: self.answer(msg.p1, msg))
        on(Op.UNREGISTER_NACK, lambda msg, link: self.answer(msg.p1, msg))
        on(Op.MUNMAP, self._on_munmap)

    def answer(self, key: int, msg: Msg) -> None:
        """An answer came; nothing when nobody waits for it."""
        waiter = self.waiting.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_result(msg)

    async def ask(self, ep: Endpoint, msg: Msg, key: int, *, patient: bool = False) -> Msg:
        """Send and wait for the answer. Raises ScifError ENODEV (node lost), ENOTCONN (disconnected).

        ``patient``: go on waiting when the peer's endpoint closes, its node answers all the same.
        """
        if ep.path is None:
            raise ScifError(errno.ENOTCONN, "not connected")
        self.waiting[key] = asyncio.get_running_loop().create_future()
        unwatch = ep.watch(lambda: self._give_up(ep, key, patient))
        try:
            self._give_up(ep, key, patient)
            ep.path.send(msg)
            return await self.waiting[key]
        finally:
            unwatch()
            del self.waiting[key]

    def _give_up(self, ep: Endpoint, key: int, patient: bool) -> None:
        waiter = self.waiting[key]
        if waiter.done():
            return
        if self.node.path(ep.peer[0]) is not ep.path:
            waiter.set_exception(ScifError(errno.ENODEV, "the peer's node is gone"))
        elif not ep.windows.connected and not patient:
            waiter.set_exception(ScifError(errno.ENOTCONN, "the peer has closed"))

    def _windows(self, ep_id: int, msg: Msg) -> Windows:
        ep = self.node.endpoints.get(ep_id)
        if ep is None or ep.peer[0] != msg.src[0] or ep.windows.released:
            raise ScifError(errno.EINVAL, "no such endpoint")
        return ep.windows

    def _on_alloc(self, msg: Msg, link: object) -> None:
        path = self.node.path(msg.src[0])
        try:
            windows = self._windows(msg.p0, msg)
            nbytes = RECORD.size + msg.p1 * SEGMENT.size
            if not 0 < msg.p1 <= MAX_SEGMENTS or path is None:
                raise ScifError(errno.EINVAL, "bad record size")
            offset = self.node.allocator.alloc(nbytes)
        except OSError:
            if path is not None:
                path.send(msg.answer(Op.ALLOC_REJ, p2=msg.p2))
            return
        record = self.node.new_id()
        self.records[record] = (offset, windows, nbytes)
        path.send(msg.answer(Op.ALLOC_GNT, p0=record, p1=path.own_addr(offset), p2=msg.p2))

    def _on_grant(self, msg: Msg, link: object) -> None:
        if msg.p2 in self.waiting:
            self.answer(msg.p2, msg)
            return
        path = self.node.path(msg.src[0])
        if path is not None:  # who asked has gone meanwhile
            path.send(msg.answer(Op.FREE_VIRT, p0=0, p1=msg.p0))

    def _drop_record(self, record: int) -> None:
        known = self.records.pop(record, None)
        if known is not None:
            self.node.allocator.free(known[0])

    def drop_records(self, windows: Windows) -> None:
        """The endpoint is released: nobody will fill in its records."""
        for record in [r for r, (_, owner, _) in self.records.items() if owner is windows]:
            self._drop_record(record)

    def _on_register(self, msg: Msg, link: object) -> None:
        path = self.node.path(msg.src[0])
        try:
            windows = self._windows(msg.p0, msg)
            offset, owner, nbytes = self.records[msg.p1]
            data = self.node.memory.read(offset, nbytes)
            self._drop_record(msg.p1)
            if owner is not windows:
                raise ScifError(errno.EINVAL, "somebody else's record")
            windows.add_remote(msg.p1, msg.p2, data)
        except (OSError, KeyError, IndexError):
            self._drop_record(msg.p1)
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
        for record in [r for r, (_, w, _) in self.records.items() if w.ep.peer[0] == node_id]:
            self._drop_record(record)
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
        grant = await self.table.ask(
            ep, Msg(Op.ALLOC_REQ, src, dst, ep.remote_id, len(segments), request), request
        )
        if grant.op != Op.ALLOC_GNT:
            raise ScifError(errno.ENOMEM, "the peer has no room for its record")
        record = RECORD.pack(RECORD_MAGIC, window.offset, window.length, window.prot, len(segments), 0, 0, 0)
        record += b"".join(SEGMENT.pack(path.own_addr(off), n) for off, n in segments)
        try:
            path.peer_view(grant.p1, len(record)).write(0, record)
        except IndexError:
            raise ScifError(errno.ENOMEM, "the peer's record is outside its memory") from None
        window.peer_id = grant.p0
        answer = await self.table.ask(
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
        """The peer announced a window; every field is checked against its memory."""
        magic, offset, length, prot, count, *_ = RECORD.unpack_from(data)
        path = self.ep.path
        if magic != RECORD_MAGIC or path is None or RECORD.size + count * SEGMENT.size > len(data):
            raise ScifError(errno.EINVAL, "bad window record")
        check_pages(offset, length)
        segments = [SEGMENT.unpack_from(data, RECORD.size + i * SEGMENT.size) for i in range(count)]
        if sum(n for _, n in segments) != length or any(n <= 0 or a % PAGE or n % PAGE for a, n in segments):
            raise ScifError(errno.EINVAL, "bad window record")
        for addr, n in segments:
            path.peer_view(addr, n)
        window = Window(record, offset, length, prot & 3, [(a, n) for a, n in segments], owner_id, alive=True)
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
            answer = await self.table.ask(ep, msg, window.id, patient=True)
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
        self.table.drop_records(self)

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
