"""Limits of one length: many begin, hardly any is reached. One alarm serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mic_emu.clock import Alarm, Clock


class Deadline:
    """One of them, until it is reached or cancelled."""

    __slots__ = ("_queue", "at", "call")

    def __init__(self, queue: dict[int, Deadline], at: float, call: Callable[[], None]) -> None:
        self._queue = queue
        self.at = at
        self.call = call

    def cancel(self) -> None:
        """It is no longer of interest; nothing when it is over."""
        self._queue.pop(id(self), None)


class Deadlines:
    """``seconds`` (already scaled) from each ``start``, in the loop that runs then."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._queue: dict[int, Deadline] = {}  # the oldest first
        self._alarm: Alarm | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, call: Callable[[], None]) -> Deadline:
        """``call`` when the time is over, unless the result is cancelled before."""
        deadline = Deadline(self._queue, self._clock.monotonic() + self._seconds, call)
        self._queue[id(deadline)] = deadline
        if self._alarm is None:
            self._alarm = self._clock.alarm(self._seconds, self._tick)
        return deadline

    def _tick(self) -> None:
        self._alarm = None
        try:
            while (first := next(iter(self._queue.values()), None)) and first.at <= self._clock.monotonic():
                first.cancel()
                first.call()
        finally:
            if first is not None and self._alarm is None:
                self._alarm = self._clock.alarm(first.at - self._clock.monotonic(), self._tick)

    def close(self) -> None:
        """Nothing is reached any more."""
        self._queue.clear()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
