"""The one clock of a process: every emulated wait asks it (design section 5).

A profile names how fast machine time runs. ``x100`` keeps the times of the real stack; ``fast``
shortens the waits of the machinery (queue pair polling, heartbeats, boot), never the waits that a
program can see through its API (``api``). Tests turn the hands of a ``ManualClock``.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol

PROFILES: dict[str, float] = {"x100": 1.0, "fast": 1 / 30}


def settle(future: asyncio.Future[None]) -> None:
    """Complete ``future`` unless it is already done."""
    if not future.done():
        future.set_result(None)


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


class Clock:
    """Real time. ``machine`` scales waits of the machinery, ``program`` those visible in an API."""

    def __init__(self, profile: str = "x100", *, machine: float | None = None, program: float = 1.0) -> None:
        self.profile = profile
        self.machine = PROFILES[profile] if machine is None else machine
        self.program = program

    def scale(self, seconds: float) -> float:
        """How long a wait of the machinery that takes ``seconds`` on a real card takes here."""
        return seconds * self.machine

    def api(self, seconds: float) -> float:
        """The same for a limit that the specification promises to programs."""
        return seconds * self.program

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        """Call ``fn`` in the running loop after ``seconds`` (already scaled)."""
        return asyncio.get_running_loop().call_later(seconds, fn)

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds`` (already scaled)."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_later(seconds, lambda: settle(done))
        try:
            await done
        finally:
            timer.cancel()


class _Due:
    def __init__(self, at: float, order: int, fn: Callable[[], None]) -> None:
        self.at, self.order, self.fn = at, order, fn
        self.cancelled = False

    def __lt__(self, other: _Due) -> bool:
        return (self.at, self.order) < (other.at, other.order)

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock(Clock):
    """A clock that stands still until ``advance`` turns it."""

    def __init__(self) -> None:
        super().__init__("x100")
        self._now = 0.0
        self._due: list[_Due] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        due = _Due(self._now + seconds, next(self._order), fn)
        heapq.heappush(self._due, due)
        return due

    def advance(self, seconds: float) -> None:
        """Turn the hands: everything due by then is called, in order."""
        end = self._now + seconds
        while self._due and self._due[0].at <= end:
            due = heapq.heappop(self._due)
            self._now = max(self._now, due.at)
            if not due.cancelled:
                due.fn()
        self._now = end
