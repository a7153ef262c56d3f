"""The DMA channels of this side as SCIF endpoints share them: queues, completions, failures (SCIF 2.13).

A channel carries out its work in order. Whatever becomes of an endpoint or a window, pages that a copy
touches stay until the engine has let go of them.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mic_emu.clock import Alarm
from mic_emu.dma import DmaChannel, DmaError, DmaMemory, Status, Transaction
from mic_emu.scif.errors import ScifError
from mic_emu.scif.ras import Segment, Window

if TYPE_CHECKING:
    from mic_emu.scif.node import Node
    from mic_emu.scif.rma import Copies

STUCK_S = 3.0  # the engine makes no progress (SCIF 2.13, row 11)
TICK_S = 0.1  # a channel at work is looked at: halted? stuck? an interrupt lost?
LET_GO_S = 0.05

Prepare = Callable[[DmaChannel], "Transaction | None"]
Keep = Callable[[Callable[[], None]], None]  # takes what frees pages that channels may still touch


def free_now(free: Callable[[], None]) -> None:
    """No channel touches the pages."""
    free()


class Work:
    """One copy or signal on a channel. It is *over* when its result is known, and *lets go* of its
    windows when the engine will not touch them any more; nearly always both at once."""

    def __init__(self, copies: Copies, windows: Sequence[Window], nbytes: int) -> None:
        self.copies = copies
        self.windows = windows
        self.nbytes = nbytes
        self.seq = 0
        self.cookie = 0
        self.prepare: Prepare = lambda ch: None
        self.mapped: list[Segment] = []  # addresses to give back to the channel's side
        self.then: list[Callable[[bool], None]] = []  # called with the result
        for window in windows:
            window.users += 1

    def over(self, code: int) -> None:
        """The result: 0, or the errno for whoever waits."""
        self.copies.over(self, code)
        for call in self.then:
            call(not code)

    def let_go(self, unmap: Callable[[int, int], None]) -> None:
        """The engine touches nothing of it any more."""
        for addr, length in self.mapped:
            unmap(addr, length)
        for window in self.windows:
            window.user_gone()


@dataclass
class Lane:
    """A channel and its queue."""

    channel: DmaChannel
    waiting: deque[Work] = field(default_factory=deque)  # not on the ring yet
    works: deque[Work] = field(default_factory=deque)  # on the ring
    stuck: list[Work] = field(default_factory=list)  # over, but the engine has not let go
    dead: bool = False
    position: int = 0
    since: float = 0.0


class RmaEngine:
    """The DMA channels that reach one peer, as its endpoints share them.

    ``memory`` maps our own pages for the channels. Runs in the node's loop, which also runs the channels'
    interrupt handlers.
    """

    def __init__(self, node: Node, channels: Sequence[DmaChannel], memory: DmaMemory) -> None:
        self.node = node
        self.memory = memory
        self.lanes = [Lane(ch) for ch in channels]
        self._turn = itertools.cycle(self.lanes)
        self._alarm: Alarm | None = None
        self.closed = False

    def pick(self) -> Lane | None:
        """The next channel that works; None: no one does."""
        if self.closed:
            return None
        for lane in itertools.islice(self._turn, len(self.lanes)):
            if not lane.dead and not lane.channel.halted:
                return lane
        return None

    def submit(self, lane: Lane, work: Work, prepare: Prepare) -> None:
        """Take ``work``; the channel gets it after the current callback of the loop.

        The program has its answer by then: its CPU may be the one that the engine's thread wakes up on.
        """
        work.prepare = prepare
        if not lane.waiting:
            asyncio.get_running_loop().call_soon(self._pump, lane)
        lane.waiting.append(work)
        work.copies.add(work)
        if self._alarm is None:
            self._alarm = self.node.clock.alarm(TICK_S, self._tick)

    def _pump(self, lane: Lane) -> None:
        """Put onto the ring what waits; when it is full, the rest follows after the next completion."""
        while lane.waiting:
            work = lane.waiting[0]
            try:
                tx = work.prepare(lane.channel)
            except DmaError as e:  # an address that the hardware cannot encode, a prep that hangs
                self.node.log.error("node %d: a copy cannot be handed over: %s", self.node.id, e)
                lane.waiting.popleft()
                self._fail([work], errno.ETIMEDOUT)
                continue
            if tx is None:
                break
            lane.waiting.popleft()
            if not lane.works:
                lane.position, lane.since = lane.channel.position, self.node.clock.monotonic()
            work.cookie = tx.submit(lambda w=work: self._complete(lane, w))  # type: ignore[misc]
            lane.works.append(work)
        lane.channel.issue_pending()

    def map_own(self, work: Work, segment: Segment) -> int:
        """Card address of a piece of our memory, until ``work`` lets go. Raises ScifError ENOMEM."""
        addr = self.memory.map(*segment)
        if not addr:
            raise ScifError(errno.ENOMEM, "no way to host memory for the DMA channel")
        work.mapped.append((addr, segment[1]))
        return addr

    # --- ends -------------------------------------------------------------------------------------

    def _complete(self, lane: Lane, work: Work) -> None:
        if work not in lane.works:
            return  # given up before; it lets go when the channel has been terminated
        lane.works.remove(work)
        work.over(0)
        work.let_go(self.memory.unmap)
        if lane.waiting:
            self._pump(lane)

    def _fail(self, works: Sequence[Work], code: int) -> None:
        """The engine does not touch these (any more)."""
        for work in works:
            work.over(code)
            work.let_go(self.memory.unmap)

    def _tick(self) -> None:
        """Look at every channel that is at work."""
        self._alarm = None
        for lane in self.lanes:
            self._look(lane)
        if not self.closed and any(lane.works or lane.waiting or lane.stuck for lane in self.lanes):
            self._alarm = self.node.clock.alarm(TICK_S, self._tick)

    def _look(self, lane: Lane) -> None:
        if lane.stuck:
            self._terminate(lane, errno.ETIMEDOUT)
        now, position = self.node.clock.monotonic(), lane.channel.position
        # Also retires what is complete, in case an interrupt was lost.
        while lane.works and lane.channel.tx_status(lane.works[0].cookie) is Status.TERMINATED:
            # Somebody else dropped all that was on this channel.
            self._fail([lane.works.popleft()], errno.ETIMEDOUT)
        if not lane.works:
            self._pump(lane)
            return
        if position != lane.position:
            lane.position, lane.since = position, now
        stuck = now - lane.since >= self.node.clock.api(STUCK_S)
        if stuck or lane.channel.halted:
            self.node.log.error(
                "node %d: DMA channel %d %s (DCHERR %#x): %d copies did not complete", self.node.id,
                lane.channel.index, "is stuck" if stuck else "halted", lane.channel.error,
                len(lane.works) + len(lane.waiting),
            )  # fmt: skip
            self._terminate(lane, errno.ETIMEDOUT)

    def _terminate(self, lane: Lane, code: int) -> None:
        """Stop the channel: what it has fails, and lets go as soon as the engine does."""
        waiting, lane.waiting = list(lane.waiting), deque()
        lane.dead = True  # nothing new meanwhile: what is complete after all is called back
        try:
            lane.channel.terminate_all(LET_GO_S if lane.works else 0)
            lane.dead = lane.channel.halted
            stopped = True
        except DmaError:
            stopped = False
        works, lane.works = list(lane.works), deque()
        lane.stuck += works
        for work in works:
            work.over(code)
        self._fail(waiting, code)
        if stopped:
            self._let_go_stuck(lane, free_now)

    def _let_go_stuck(self, lane: Lane, keep: Keep) -> None:
        stuck, lane.stuck = lane.stuck, []
        for work in stuck:
            keep(lambda w=work: w.let_go(self.memory.unmap))  # type: ignore[misc]

    def close(self, *, running: bool = True, keep: Keep = free_now) -> None:
        """The link ends: drop what is not complete; whoever waits for it gets ECONNRESET.

        ``running``: the engine still works; else nothing moves any more. ``keep`` gets what must not be
        freed before the card's reset, because a channel does not stop.
        """
        self.closed = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        for lane in self.lanes:
            if running and (lane.works or lane.stuck or lane.waiting):
                self._terminate(lane, errno.ECONNRESET)
                self._let_go_stuck(lane, keep)
            else:
                works = [*lane.works, *lane.waiting]
                lane.works, lane.waiting = deque(), deque()
                self._fail(works, errno.ECONNRESET)
                self._let_go_stuck(lane, free_now)
