"""A card without a card: what the state machine needs, under a test's control.

``FakeOps`` are the hardware operations, ``FakeConnection`` is the host's end of the COSM connection,
whose other end the test plays.
"""

from __future__ import annotations

import asyncio
import errno
import os

from mic_emu import layout as L
from mic_emu.clock import Clock
from mic_emu.host.cosm import POLLHUP, POLLIN, BootRequest
from mic_emu.log import Log
from mic_emu.scif.errors import ScifError

C = L.CONSTANTS


def message(kind: str, value: int = 0, nsec: int = 0) -> bytes:
    """24 bytes: ``kind`` is SHUTDOWN, SYNC_TIME, HEARTBEAT or SHUTDOWN_STATUS."""
    return L.COSM_MSG.pack(id=C[f"COSM_MSG_{kind}"], value=value, nsec=nsec)


class FakeOps:
    """Records every call. ``fail_start`` is raised by start; ``polls`` looks fail before ready again."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.requests: list[BootRequest] = []
        self.fail_start: Exception | None = None
        self.fail_stop: Exception | None = None
        self.is_ready = True
        self.polls = 0  # looks after a reset that find the firmware busy; -1: for ever
        self.gate: asyncio.Event | None = None  # start and stop wait for it
        self.in_call = 0
        self._left = 0

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        self.in_call += 1
        assert self.in_call == 1, "hardware operations overlap (COSM 1.3)"
        if self.gate:
            await self.gate.wait()
        self.in_call -= 1

    async def reset(self) -> None:
        await self._call("reset")
        self._left = self.polls

    def ready(self) -> bool:
        if "reset" not in self.calls:
            return self.is_ready
        if self._left == 0:
            return True
        self._left -= 1
        return False

    async def start(self, request: BootRequest) -> None:
        await self._call("start")
        self.requests.append(request)
        if self.fail_start:
            raise self.fail_start

    async def stop(self) -> None:
        await self._call("stop")
        if self.fail_stop:
            raise self.fail_stop


class FakeConnection:
    """The host's endpoint. ``sent`` collects messages to the card; ``say`` and ``hang_up`` play the card."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.sent: list[dict[str, int]] = []
        self.closed = False
        self.send_error: ScifError | None = None
        self.blocked = False
        self._in = b""
        self._hup = False
        self._wake = asyncio.Event()

    def say(self, data: bytes) -> None:
        """The card sends bytes."""
        self._in += data
        self._wake.set()

    def hang_up(self) -> None:
        """The card closes, or its node is lost."""
        self._hup = True
        self._wake.set()

    async def send(self, data: bytes) -> int:
        if self.send_error:
            raise self.send_error
        if self.blocked:
            await asyncio.get_running_loop().create_future()
        self.sent.append(L.COSM_MSG.unpack(data))
        return len(data)

    async def poll(self, events: int, timeout_s: float | None = None) -> int:
        expired = asyncio.Event()

        def expire() -> None:
            expired.set()
            self._wake.set()

        alarm = self.clock.alarm(timeout_s, expire) if timeout_s else None
        try:
            while (
                not (bits := (POLLIN if self._in else 0) | (POLLHUP if self._hup else 0))
                and not expired.is_set()
            ):
                self._wake.clear()
                await self._wake.wait()
            return bits
        finally:
            if alarm:
                alarm.cancel()

    def recv_nowait(self, length: int) -> bytes:
        data, self._in = self._in[:length], self._in[length:]
        if not data and self._hup:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        return data

    async def close(self) -> None:
        self.closed = True


class Records:
    """A log whose records a test can look at."""

    def __init__(self) -> None:
        self.records: list[dict[str, object]] = []
        self.log = Log(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self.records.append)

    def texts(self, level: str) -> list[str]:
        return [str(r["message"]) for r in self.records if r["level"] == level]

    def close(self) -> None:
        os.close(self.log.fd)


async def settle(turns: int = 30) -> None:
    """Let everything that is ready run."""
    for _ in range(turns):
        await asyncio.sleep(0)
