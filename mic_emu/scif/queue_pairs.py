"""Queue pairs of a node's endpoints, from their making until nobody can write into them any more.

Programs write into the pages of their peers. A program whose peer has closed may still read what came
before, and tells its read index to a page that is of no use to anybody, so that page must stay: until the
peer's last descriptor is closed as well (its node says so with DISCNCT, as for an endpoint that closes
first), or its node is lost.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mic_emu.memory import PAGE, OutOfNodeMemory
from mic_emu.scif import qp as queue

if TYPE_CHECKING:
    from mic_emu.clock import Alarm
    from mic_emu.scif.node import Node
    from mic_emu.scif.paths import Path

RETIRE_S = 0.5
CLEAN = 2  # kept ready while connections come: to wipe or reserve one takes a tenth of a connect's time


class QueuePairs:
    """Makes them, and frees those of closed endpoints in time."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._held: dict[int, tuple[int, queue.QueuePair]] = {}  # by endpoint: the peer's node
        self._retired: deque[tuple[float, queue.QueuePair]] = deque()
        self._clean: list[queue.QueuePair] = []  # all zero, not published
        self._cleaning = self._closed = False
        self._reaper: Alarm | None = None

    def __len__(self) -> int:
        """Those of closed endpoints that are not free yet."""
        return len(self._held) + len(self._retired) + len(self._clean)

    def create(self, path: Path) -> queue.QueuePair:
        """Queue pair, ring and control page of one endpoint, all zero but for their heads.

        One that has waited long enough is used again, wiped. Raises OutOfNodeMemory.
        """
        self.node.notifier.start()
        if not self._cleaning:
            self._cleaning = True
            self.node.events.meanwhile(self._prepare)
        try:
            qp = self._clean.pop() if self._clean else self._reserve()
        except OutOfNodeMemory:
            self.free_retired()
            qp = self._reserve()
        qp.publish(path.own_addr)
        return qp

    def _reserve(self) -> queue.QueuePair:
        node = self.node
        return queue.QueuePair.reserve(node.memory, node.allocator, queue.EP_RING, PAGE)

    def _prepare(self) -> None:
        """For the next connections, while this one waits for its peer."""
        self._cleaning = False
        before = self.node.clock.monotonic() - RETIRE_S
        while len(self._clean) < CLEAN and not self._closed:
            if self._retired and self._retired[0][0] <= before:
                qp = self._retired.popleft()[1]
                qp.wipe()
            else:
                try:
                    qp = self._reserve()
                except OutOfNodeMemory:
                    return
            self._clean.append(qp)
            self._wait()

    def _wait(self) -> None:
        if self._reaper is None:
            self._reaper = self.node.clock.alarm(RETIRE_S, self._tick)

    def hold(self, ep_id: int, qp: queue.QueuePair, peer_node: int) -> None:
        """Endpoint ``ep_id`` is closed, its peer is not."""
        qp.end()
        self._held[ep_id] = (peer_node, qp)

    def peer_closed(self, ep_id: int, peer_node: int) -> bool:
        """The peer of a closed endpoint is closed too; False when nothing of it is left."""
        known = self._held.get(ep_id)
        if known is None or known[0] != peer_node:
            return False
        del self._held[ep_id]
        self.retire(known[1])
        return True

    def node_lost(self, node_id: int) -> None:
        """Nobody is left there."""
        for ep_id in [i for i, (peer_node, _) in self._held.items() if peer_node == node_id]:
            self.peer_closed(ep_id, node_id)

    def retire(self, qp: queue.QueuePair) -> None:
        """Free a queue pair after a while: a thread may be in a call although another closed the descriptor."""
        qp.end()
        self._retired.append((self.node.clock.monotonic(), qp))
        self._wait()

    def free_retired(self) -> None:
        """Free what only waits for time to pass, or for use, now."""
        self._reap(float("inf"))

    def close(self) -> None:
        """The node leaves, and with it its memory."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        for peer_node in {n for n, _ in self._held.values()}:
            self.node_lost(peer_node)
        if self._reaper is not None:
            self._reaper.cancel()
        self.free_retired()

    def _tick(self) -> None:
        self._reaper = None
        self._reap(self.node.clock.monotonic() - RETIRE_S)
        if self._retired or self._clean:
            self._wait()

    def _reap(self, before: float) -> None:
        while self._retired and self._retired[0][0] <= before:
            self._retired.popleft()[1].free()
        if not self._retired:
            while self._clean:
                self._clean.pop().free()
