"""Copies that DMA channels make between windows, and what waits for them (SCIF 2.13, 2.15).

A program hands over what it does not want to wait for; everything else it copies itself. All copies of
an endpoint use one channel, chosen in turn at the first one (SCIF 2.13), so they end in their order and
one number says how many have ended: that is what marks are.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.clock import settle
from mic_emu.dma import INTERRUPT
from mic_emu.scif.engine import STUCK_S, Lane, RmaEngine, Work
from mic_emu.scif.errors import ScifError
from mic_emu.scif.ras import PROT_READ, PROT_WRITE, Segment, Window

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

ALIGN = 64
LINE = 64
MASK: int = lib.MIC_SCIF_COPY_MASK
WRITE: int = lib.MIC_SCIF_COPY_WRITE
ORDERED: int = lib.MIC_SCIF_COPY_ORDERED
MAX_WORKS = 64  # of one endpoint at a time; the program copies the next one itself
MAX_BYTES = 1 << 30
MAX_PIECES = 256
MAX_WAITERS = 1024  # of one endpoint, signals behind one copy likewise: a peer can ask for both
FENCE_S = 30.0  # an own mark (SCIF 2.15)


class Copies:
    """What channels do for one endpoint, in the order in which it was handed over."""

    def __init__(self, ep: Endpoint) -> None:
        self.ep = ep
        self.lane: Lane | None = None
        self.issued = self.done = 0
        self.failed = 0  # the first that did not complete, 0: none
        self._code = 0
        self._works: deque[Work] = deque()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def last(self) -> Work | None:
        """The youngest one that is not over."""
        return self._works[-1] if self._works else None

    def has_room(self, nbytes: int) -> bool:
        """May another one be queued?"""
        queued = sum(w.nbytes for w in self._works)
        return not self._works or (len(self._works) < MAX_WORKS and queued + nbytes <= MAX_BYTES)

    def add(self, work: Work) -> None:
        """``work`` was handed to the channel."""
        self.issued += 1
        work.seq = self.issued
        self._works.append(work)
        self._publish()

    def over(self, work: Work, code: int) -> None:
        """``work``, the oldest, has ended."""
        self._works.remove(work)
        self.done = work.seq
        if code and not self.failed:
            self.failed, self._code = work.seq, code
        self._publish()
        for target, waiter in self._waiters:
            if target <= self.done:
                settle(waiter)

    def _publish(self) -> None:
        if self.ep.qp is not None:
            lib.mic_scif_ctl_copies(
                self.ep.qp.control, self.issued & MASK, self.done & MASK, bool(self.failed)
            )

    def mark(self) -> int:
        """A mark for everything that was handed over so far; positive."""
        return (self.issued & MASK) + 1

    def _target(self, mark: int) -> int:
        """The copy that ``mark`` stands for. One that was never given counts as complete."""
        behind = (self.issued - (mark - 1)) & MASK
        return self.issued - behind if behind <= MASK >> 1 and behind <= self.issued else 0

    async def wait(self, mark: int) -> None:
        """Until everything before ``mark`` has ended.

        Raises ScifError ETIMEDOUT (not within 30 s, or a channel failed), ECONNRESET (the link went).
        """
        target = self._target(mark)
        if len(self._waiters) >= MAX_WAITERS:
            raise ScifError(errno.ENOMEM, "enough waits for marks")
        if self.done < target:
            clock = self.ep.node.clock
            entry = (target, asyncio.get_running_loop().create_future())
            self._waiters.append(entry)
            limit = clock.alarm(clock.api(FENCE_S), lambda: settle(entry[1]))
            try:
                await entry[1]
            finally:
                limit.cancel()
                self._waiters.remove(entry)
        if self.failed and target >= self.failed:
            code = self._code if self.ep.is_connected else errno.ECONNRESET
            raise ScifError(code, "a copy before the mark did not complete")
        if self.done < target:
            raise ScifError(errno.ETIMEDOUT, "the copies before the mark take too long")


class Rma:
    """A node's engines by peer, and what programs ask of them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.engines: dict[int, RmaEngine] = {}  # none for a peer: programs copy themselves

    def _lane(self, ep: Endpoint) -> tuple[RmaEngine, Lane]:
        copies, engine = ep.copies, self.engines.get(ep.peer[0])
        if engine is None or engine.closed or copies.failed:
            raise ScifError(errno.EOPNOTSUPP, "no DMA channel for this endpoint")
        lane = copies.lane
        if lane is None or ((lane.dead or lane.channel.halted) and copies.last is None):
            lane = copies.lane = engine.pick()
        if lane is None or lane.dead:
            raise ScifError(errno.EOPNOTSUPP, "no DMA channel works")
        return engine, lane

    def copy(self, ep: Endpoint, loff: int, roff: int, length: int, flags: int) -> None:
        """Start a copy between our window at ``loff`` and the peer's at ``roff``.

        All three are multiples of 64. Raises ScifError ECONNRESET, ENOTCONN, ENODEV, EINVAL, ENXIO, EPERM,
        EOPNOTSUPP (no channel reaches that peer), EAGAIN and ENOMEM (not now).
        """
        ep.check_connected()
        if length <= 0 or (loff | roff | length) % ALIGN or loff < 0 or roff < 0:
            raise ScifError(errno.EINVAL, "not multiples of 64")
        engine, lane = self._lane(ep)
        write = bool(flags & WRITE)
        own = ep.windows.own.cover(loff, length, PROT_READ if write else PROT_WRITE)
        remote = ep.windows.remote.cover(roff, length, PROT_WRITE if write else PROT_READ)
        if not ep.copies.has_room(length):
            raise ScifError(errno.EAGAIN, "enough copies are waiting")
        work = Work(ep.copies, [*own, *remote], length)
        try:
            ours = [(engine.map_own(work, s), s[1]) for s in _places(own, loff, length)]
            pieces = list(_pair(ours, list(_places(remote, roff, length)), write))
            if flags & ORDERED:
                _split_last_line(pieces)
            if len(pieces) > MAX_PIECES:
                raise ScifError(errno.ENOMEM, "too many pieces")
        except OSError:
            work.let_go(engine.memory.unmap)
            raise
        work.then.append(lambda good: self.node.traffic.copied(ep.peer[0], length, write) if good else None)
        engine.submit(lane, work, lambda ch: ch.prep_memcpy_sg(pieces, INTERRUPT))

    def idle(self, windows: Sequence[Window], then: Callable[[], None]) -> None:
        """Call ``then`` when no DMA channel works on these windows: now, or when it ends, at most after 3 s."""
        busy = [w for w in windows if w.users]
        if not busy:
            then()
            return
        waiting = True

        def over() -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                limit.cancel()
                then()

        limit = self.node.clock.alarm(self.node.clock.api(STUCK_S), over)
        for window in busy:
            window.when_idle(lambda: None if any(w.users for w in busy) else over())

    def signal(self, ep: Endpoint, own: bool, offset: int, value: int) -> None:
        """Write 64 bits into our or the peer's window once everything before is complete (SCIF 2.15).

        Raises ScifError ENXIO (not inside one window), EPERM, EIO (a copy before failed: never).
        """
        windows = (ep.windows.own if own else ep.windows.remote).cover(offset, 8, PROT_WRITE)
        if len(windows) != 1:
            raise ScifError(errno.ENXIO, "crosses a window")
        if ep.copies.failed:
            raise ScifError(errno.EIO, "a copy before the signal failed")
        last = ep.copies.last
        if last is None:
            self._store(ep, own, windows[0], offset, value)
        elif len(last.then) >= MAX_WAITERS:
            raise ScifError(errno.ENOMEM, "enough signals wait")
        elif offset % 8 or not self._queue_signal(ep, own, windows[0], offset, value):
            window = windows[0]
            window.users += 1  # it stays until the value is written

            def write(good: bool) -> None:
                try:
                    if good and not ep.copies.failed:
                        self._store(ep, own, window, offset, value)
                except ScifError as e:  # the caller has its answer; whoever waits for the value is lost, too
                    self.node.log.debug("node %d: a signal was not written: %s", self.node.id, e)
                finally:
                    window.user_gone()

            last.then.append(write)

    def _queue_signal(self, ep: Endpoint, own: bool, window: Window, offset: int, value: int) -> bool:
        """Let the channel write the value, as the hardware does; False when it cannot."""
        try:
            engine, lane = self._lane(ep)
            if not ep.copies.has_room(0):
                return False
            work = Work(ep.copies, [window], 0)
            place, length = next(window.places(offset, 8))
            addr = engine.map_own(work, (place, length)) if own else place
            engine.submit(lane, work, lambda ch: ch.prep_imm_data(addr, value, INTERRUPT))
        except OSError:
            return False
        return True

    def _store(self, ep: Endpoint, own: bool, window: Window, offset: int, value: int) -> None:
        data = value.to_bytes(8, "little")
        if not own and (ep.path is None or self.node.path(ep.peer[0]) is not ep.path):
            return  # the peer's memory is gone
        for place, n in window.places(offset, 8):
            fd, at = (self.node.memory_fd, place) if own else ep.path.window_place(place, n)  # type: ignore[union-attr]
            rc = lib.mic_shm_write_at(fd, at, data[:n], n)
            if rc < 0:  # the node of this window was lost, and we have not heard of it
                raise ScifError(-rc, "the window is gone")
            data = data[n:]


def _places(windows: Sequence[Window], offset: int, length: int) -> Iterator[Segment]:
    """Where the bytes of a range lie that ``windows`` cover in order."""
    for window in windows:
        n = min(window.end - offset, length)
        yield from window.places(offset, n)
        offset += n
        length -= n


def _pair(own: list[Segment], remote: list[Segment], write: bool) -> Iterator[tuple[int, int, int]]:
    """(dst, src, length) of the pieces between two lists of the same total length."""
    i = j = 0
    skip_own = skip_remote = 0
    while i < len(own) and j < len(remote):
        a, b = own[i][0] + skip_own, remote[j][0] + skip_remote
        n = min(own[i][1] - skip_own, remote[j][1] - skip_remote)
        yield (b, a, n) if write else (a, b, n)
        skip_own += n
        skip_remote += n
        if skip_own == own[i][1]:
            i, skip_own = i + 1, 0
        if skip_remote == remote[j][1]:
            j, skip_remote = j + 1, 0


def _split_last_line(pieces: list[tuple[int, int, int]]) -> None:
    """The last cache line becomes a piece of its own: a channel carries them out in order (SCIF-112)."""
    dst, src, n = pieces[-1]
    if n > LINE:
        pieces[-1:] = [(dst, src, n - LINE), (dst + n - LINE, src + n - LINE, LINE)]
