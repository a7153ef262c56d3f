"""The one clock: every emulated delay and limit asks it.

The specification gives real times (a 30 s heartbeat, a 1 s pause after a reset). A profile scales
them; a test turns the hands itself with ``ManualClock``. Two factors, because they are there for
different reasons:

* ``delay``: pauses that only pace the real hardware (the wait after a reset). Short in ``fast``.
* ``limit``: how long to wait before something counts as failed (heartbeats and the watchdog, the
  hand-shake limits). Shorter in ``fast``, but never so short that a busy machine looks broken.

Within a factor all ratios of the specification hold (30 s heartbeat : 40 s watchdog).
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from mic_emu.timing import PROFILES, Profile

T = TypeVar("T")


async def wait_for(awaitable: Awaitable[T], limit_s: float | None) -> T:
    """``asyncio.wait_for`` that loses no cancellation; ``limit_s`` is real seconds. Raises asyncio.TimeoutError.

    That of Python 3.10 and 3.11 goes on as if nothing had been said when it is cancelled in the moment in which its work
    ends, and whoever cancelled the task waits for its end for ever. Here the caller is cancelled and the result is lost.
    """
    if limit_s is None:
        return await awaitable
    work = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({work}, timeout=max(limit_s, 0.0))
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            if work.cancelled():
                raise asyncio.TimeoutError
        return work.result()
    except asyncio.CancelledError:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # nobody is left to hear of it
        raise


def settle(future: asyncio.Future[None]) -> None:
    """Complete ``future`` unless it is already done."""
    if not future.done():
        future.set_result(None)


class Alarm(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


class Clock:
    """Real time, scaled. All arguments are the specification's seconds.

    ``program`` scales the limits that programs see through an API (SCIF connect); only tests change it.
    """

    def __init__(self, profile: Profile | str = "fast", *, program: float = 1.0) -> None:
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.program = program

    def api(self, seconds: float) -> float:
        """Seconds of a limit that the specification promises to programs: the same in every profile."""
        return seconds * self.program

    def alarm(self, real_seconds: float, fn: Callable[[], None]) -> Alarm:
        """Call ``fn`` in the running loop after seconds that are already scaled."""
        return asyncio.get_running_loop().call_later(real_seconds, fn)

    def delay(self, seconds: float) -> float:
        """Seconds a pacing pause really takes."""
        return seconds * self.profile.delay

    def limit(self, seconds: float) -> float:
        """Seconds until a wait really counts as failed."""
        return seconds * self.profile.limit

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    async def pause(self, seconds: float) -> None:
        """Wait out a pacing delay."""
        await asyncio.sleep(self.delay(seconds))

    async def within(self, awaitable: Awaitable[T], seconds: float, what: str) -> T:
        """Await with the scaled limit; TimeoutError says what was awaited and for how long."""
        try:
            return await wait_for(awaitable, self.limit(seconds))
        except asyncio.TimeoutError:
            raise TimeoutError(f"{what}: nothing within {self.limit(seconds):g} s") from None


class _Cancel:
    def __init__(self, future: asyncio.Future[None]) -> None:
        self._future = future

    def cancel(self) -> None:
        self._future.cancel()


class ManualClock(Clock):
    """A clock that stands still until a test turns it (``advance``)."""

    def __init__(self) -> None:
        super().__init__(PROFILES["x100"])
        self._now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._seq = 0

    def monotonic(self) -> float:
        return self._now

    def _sleeper(self, seconds: float) -> asyncio.Future[None]:
        fut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seq += 1
        heapq.heappush(self._sleepers, (self._now + seconds, self._seq, fut))
        return fut

    async def pause(self, seconds: float) -> None:
        await self._sleeper(self.delay(seconds))

    async def within(self, awaitable: Awaitable[T], seconds: float, what: str) -> T:
        task = asyncio.ensure_future(awaitable)
        alarm = self._sleeper(self.limit(seconds))
        try:
            both: set[asyncio.Future[Any]] = {task, alarm}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise TimeoutError(f"{what}: nothing within {self.limit(seconds):g} s")
        finally:
            alarm.cancel()
            if not task.done():
                task.cancel()

    def alarm(self, real_seconds: float, fn: Callable[[], None]) -> Alarm:
        sleeper = self._sleeper(real_seconds)
        sleeper.add_done_callback(lambda f: None if f.cancelled() else fn())
        return _Cancel(sleeper)

    async def advance(self, seconds: float) -> None:
        """Turn the hands and let everything that is due run."""
        end = self._now + seconds
        for _ in range(20):  # what has just begun may be about to sleep
            await asyncio.sleep(0)
        while self._sleepers and self._sleepers[0][0] <= end:
            self._now, _, fut = heapq.heappop(self._sleepers)
            if not fut.done():
                fut.set_result(None)
            for _ in range(20):
                await asyncio.sleep(0)
        self._now = end
        for _ in range(20):
            await asyncio.sleep(0)
