"""Generations of an endpoint's window lists, and the end of the copies that use an old one.

Programs copy under the lists that they know and count themselves in by generation, in the control
page. A change raises the generation; what it took out of the lists may go when the copies that began
before have ended (``Grace``). Whoever ends a copy that the node waits for tells it through the notify
page; a program that died does not, its connections do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.scif.limits import DRAIN_S

if TYPE_CHECKING:
    from mic_emu.clock import Alarm
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.qp import QueuePair


class Grace:
    """The time until all copies have ended that began before one change of the lists."""

    __slots__ = ("_classes", "_lists", "_qp", "_then", "_timer")

    def __init__(self, lists: Lists, qp: QueuePair | None, classes: int) -> None:
        self._lists = lists
        self._qp = qp
        self._classes = classes  # generations modulo MIC_SCIF_GENS, as bits
        self._then: Callable[[], None] | None = None
        self._timer: Alarm | None = None

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when it is over: now, or when a copy ends, at most after DRAIN_S."""
        if self.is_over():
            callback()
            return
        self._then = callback
        self._lists.add(self)
        clock = self._lists.ep.node.clock
        self._timer = clock.alarm(clock.api(DRAIN_S), self._give_up)

    def is_over(self) -> bool:
        """Look again."""
        ep, qp = self._lists.ep, self._qp
        if not self._classes or qp is None:
            return True
        if qp is not ep.qp or ep.copiers_died:
            self._classes = 0
            return True
        self._classes = self._lists.fresh(qp, lib.mic_scif_busy(qp.control, self._classes))
        return not self._classes

    def end(self) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()
        then, self._then = self._then, None
        if then is not None:
            then()

    def _give_up(self) -> None:
        """Somebody never leaves: nobody else may wait for that."""
        ep, qp = self._lists.ep, self._qp
        if not self.is_over() and qp is not None:
            self._lists.write_off(qp, self._classes)
            ep.node.log.warning("node %d: %r: copies have not ended within %g s", ep.node.id, ep, DRAIN_S)
        self._lists.remove(self)
        self.end()


class Lists:
    """The window lists of ``ep`` as its programs see them: a generation, and changes not yet over."""

    __slots__ = ("_lost", "_open", "ep")

    def __init__(self, ep: Endpoint) -> None:
        self.ep = ep
        self._open: list[Grace] = []
        self._lost: dict[int, int] = {}  # copies that were given up, by class

    def changed(self) -> Grace:
        """Programs must ask again. Returns the time until nobody uses the lists of before."""
        qp = self.ep.qp
        if qp is None:
            return Grace(self, None, 0)
        return Grace(self, qp, self.fresh(qp, lib.mic_scif_raise_gen(qp.control)))

    def fresh(self, qp: QueuePair, classes: int) -> int:
        """``classes`` without those where nothing but given up copies is left."""
        for i in list(self._lost):
            count = self._lost[i] = min(self._lost[i], int(qp.control.busy[i]))
            if count == qp.control.busy[i]:
                classes &= ~(1 << i)
            if not count:
                del self._lost[i]
        return classes

    def write_off(self, qp: QueuePair, classes: int) -> None:
        """The copies in ``classes`` do not end."""
        self._lost.update({i: int(qp.control.busy[i]) for i in range(lib.MIC_SCIF_GENS) if classes >> i & 1})

    def add(self, grace: Grace) -> None:
        """Look at it when something has happened."""
        self._open.append(grace)
        self.ep.node.draining.add(self)

    def remove(self, grace: Grace) -> None:
        """It is over."""
        if grace in self._open:
            self._open.remove(grace)
        if not self._open:
            self.ep.node.draining.discard(self)

    def look(self) -> None:
        """A copy has ended, or a process: is anything over?"""
        for grace in [g for g in self._open if g.is_over()]:
            self.remove(grace)
            grace.end()
