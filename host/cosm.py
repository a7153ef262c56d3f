"""COSM, host side: the state machine of one card and its connection (COSM 2 to 5).

Policy (reset after a shutdown, boot after a restart) is not here: see policy.py. Every transition
goes through ``_move``, which logs it and wakes whoever waits for the state.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from mic_emu import layout as L
from mic_emu.clock import Clock
from mic_emu.cosm.states import Event, State, Status, step
from mic_emu.errors import MicemuError, StateError
from mic_emu.log import Log
from mic_emu.scif.errors import ScifError

C = L.CONSTANTS
POLLIN, POLLERR, POLLHUP = 1, 8, 0x10
HEARTBEAT_TIMEOUT = 40.0  # 30 s interval + 10 s slack (COSM 5.1)
READY_POLLS = 45
CONNECTED_STATES = (State.BOOTING, State.ONLINE)
SILENT = (Event.CONNECTED, Event.STATUS)  # they wake nobody when the state stays as it is (T8, T14)


@dataclass(frozen=True)
class BootRequest:
    """What the administrator's strings said when ``boot`` was written."""

    bootmode: str
    firmware: str
    ramdisk: str
    cmdline: str


class HardwareOps(Protocol):
    """What the state machine needs of the card (COSM 1.3). Never called twice at a time."""

    async def reset(self) -> None:
        """Trigger a reset; the pause after it included."""

    def ready(self) -> bool:
        """May an OS image be downloaded?"""

    async def start(self, request: BootRequest) -> None:
        """Prepare and start boot. Undoes itself and raises MicemuError on failure."""

    async def stop(self) -> None:
        """Tear down what start made, before the reset."""


class Connection(Protocol):
    """The SCIF endpoint, as far as it is used here."""

    async def send(self, data: bytes) -> int: ...
    async def poll(self, events: int, timeout_s: float | None = None) -> int: ...
    def recv_nowait(self, length: int) -> bytes: ...
    async def close(self) -> None: ...


class CosmDevice:
    """State, strings and connection of one card.

    ``on_state`` is called after every change of the state, ``on_change`` also when the shutdown status alone
    changes or a connection comes (COSM-56). ``changes`` counts the former: a waiter that remembers the count it
    has seen cannot miss the last one (COSM-57).
    """

    def __init__(self, index: int, ops: HardwareOps, clock: Clock, log: Log) -> None:
        self.index = index
        self.ops = ops
        self.clock = clock
        self.log = log
        self.state = State.READY
        self.shutdown_status = Status.NOP
        self.cmdline: str | None = None
        self.firmware: str | None = None
        self.ramdisk: str | None = None
        self.bootmode: str | None = None
        self.log_buf_addr = 0  # card kernel virtual addresses (COSM 9)
        self.log_buf_len = 0
        self.heartbeat_enable = True
        self.changes = 0
        self.heartbeats = 0  # of all boots
        self.heard = 0.0  # when the card last said anything, by the clock; 0: never
        self.on_state: list[Callable[[], None]] = []
        self.on_change: list[Callable[[], None]] = []
        self.on_silence: Callable[[], None] = lambda: None  # the watchdog has given the card up
        self._prev = State.READY
        self._pending = Status.NOP  # received but not yet published
        self._lock = asyncio.Lock()
        self._watchdog = False
        self._ep: Connection | None = None
        self._waiting: Connection | None = None  # accepted while ``_ep`` lives; only the newest is kept
        self._loop_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _spawn(self, coro: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Run something in the background; its failure is logged."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (failure := task.exception()) is not None:
                self.log.error(f"{what} failed: {failure!r}")

        task = asyncio.ensure_future(coro)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    # --- state ------------------------------------------------------------------------------

    def _move(self, event: Event) -> None:
        new = step(self.state, event)
        old, self.state = self.state, new
        if old is not new:
            self.log.info(
                f"{old.word} -> {new.word}", event="state", old=old.word, state=new.word, cause=event.value
            )
        if old is not new or event not in SILENT:
            self.changes += 1
            self._notify(self.on_state)
        self._notify(self.on_change)

    def _publish(self, status: Status, notify: bool = True) -> None:
        if status is not self.shutdown_status:
            self.shutdown_status = status
            self.log.info(f"shutdown status {status.word}", event="shutdown_status", status=status.word)
            if notify:
                self._notify(self.on_change)

    def _notify(self, callbacks: list[Callable[[], None]]) -> None:
        for callback in list(callbacks):
            callback()

    @property
    def connected(self) -> bool:
        """Has the card's COSM client a connection?"""
        return self._ep is not None

    @property
    def watchdog(self) -> bool:
        """Is the heartbeat watchdog armed?"""
        return self._watchdog

    # --- requests (COSM 2.3) ------------------------------------------------------------------

    async def boot(self) -> None:
        """T1 to T6. Raises StateError (EINVAL) or what the start operation raises; state then as before."""
        async with self._lock:
            if self.bootmode is None:
                raise StateError("bootmode is not set: write linux to it first", errno.EINVAL)
            if self.state is State.READY and not self.ops.ready():
                await self._hardware_reset()
            if self.state is not State.READY:
                fix = (
                    "reset it first" if self.state is not State.ONLINE else "shut it down, or reset it, first"
                )
                raise StateError(f"boot is not allowed in state {self.state.word}: {fix}", errno.EINVAL)
            request = BootRequest(self.bootmode, self.firmware or "", self.ramdisk or "", self.cmdline or "")
            try:
                await self.ops.start(request)
            except (MicemuError, OSError) as e:
                self.log.warning(f"boot failed: {e}")
                raise
            self._move(Event.BOOT if self.bootmode == "linux" else Event.BOOT_BARE)

    @property
    def resetting(self) -> bool:
        """Is a reset requested or running?"""
        return self.state is State.RESETTING

    async def reset(self) -> None:
        """T18 to T20: returns once the state is resetting, the work runs in the background (COSM-37).

        Waits for a boot in progress only. Raises StateError EINVAL in ``ready``.
        """
        if self.resetting:
            return
        async with self._lock:
            if self.resetting:
                return
            previous = self.state
            self._move(Event.RESET)
            self._prev = previous
            self._spawn(self.stop(force=False), "the reset")

    async def shutdown(self) -> None:
        """T10 to T13: ask the card to power off. Raises StateError EINVAL, ENOTCONN, ScifError, TimeoutError."""
        async with self._lock:
            if self.state is not State.ONLINE:
                raise StateError(f"shutdown is not allowed in state {self.state.word}", errno.EINVAL)
            if self._ep is None:
                raise StateError("the card's COSM client is not connected", errno.ENOTCONN)
            await self._send(self._ep, id=C["COSM_MSG_SHUTDOWN"])
            self._watchdog = False
            if self.state is State.ONLINE:  # the card may have gone down by itself while we sent
                self._move(Event.SHUTDOWN)

    async def _send(self, ep: Connection, **fields: int) -> None:
        """A message; a card that leaves its ring full must not hold the lock for ever."""
        what = "room for a message to the card's COSM client"
        await self.clock.within(ep.send(L.COSM_MSG.pack(**fields)), HEARTBEAT_TIMEOUT, what)

    async def stop(self, force: bool) -> None:
        """Reset work, forced reset, suspend, removal (COSM 4.1)."""
        async with self._lock:
            if self.state is State.READY and not force:
                return
            old = self._prev if self.state is State.RESETTING else self.state
            tear_down = old not in (State.READY, State.RESET_FAILED)
            if self.state is not State.RESETTING:
                self._move(Event.STOP)
                self._prev = old
            self._watchdog = False
            if tear_down:
                try:
                    await self.ops.stop()
                except Exception as e:  # whatever it is, the card must not stay in resetting for ever
                    self.log.error(f"while stopping the card: {e!r}")
            await self._drop_connection()
            await self._hardware_reset()

    async def suspend(self) -> None:
        """T23, T24: never refused, nothing in ready, resetting and reset_failed."""
        if self.state in (State.BOOTING, State.ONLINE, State.SHUTTING_DOWN):
            await self.stop(force=False)

    async def _hardware_reset(self) -> None:
        """COSM 4.2. Status nop comes before ready: who waits for ready must not read the old status
        (COSM 2.4 c)."""
        ready = await self._became_ready()
        self._pending = Status.NOP
        self._publish(Status.NOP)
        self._move(Event.FIRMWARE_READY if ready else Event.FIRMWARE_SILENT)

    async def _became_ready(self) -> bool:
        try:
            await self.ops.reset()
            for poll in range(READY_POLLS):
                if self.ops.ready():
                    return True
                if poll < READY_POLLS - 1:
                    await self.clock.pause(1.0)
        except (MicemuError, OSError) as e:
            self.log.error(f"the reset failed: {e}")
        return False

    async def _drop_connection(self) -> None:
        """Late messages of the old connection are lost with it (COSM 2.4 a)."""
        task, self._loop_task = self._loop_task, None
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for ep in (self._ep, self._waiting):
            if ep:
                self._close(ep)
        self._ep = self._waiting = None

    def _close(self, ep: Connection) -> None:
        """In the background: the peer's acknowledgement may take the node time-out."""
        self._spawn(ep.close(), "closing a COSM connection")

    # --- connection (COSM 5.3) ----------------------------------------------------------------

    async def adopt(self, ep: Connection) -> None:
        """T7 to T9: a connection from this card was accepted.

        While an earlier one lives, the newest waits for its end: a program on the card cannot take the
        kernel's place.
        """
        async with self._lock:
            if self.state not in CONNECTED_STATES:
                self.log.warning("COSM connection refused", state=self.state.word)
                self._close(ep)
            elif self._ep is not None:
                overtaken, self._waiting = self._waiting, ep
                if overtaken:
                    self._close(overtaken)
            else:
                await self._take(ep)

    async def _take(self, ep: Connection) -> None:
        now = time.time_ns()
        sync = {"value": now // 1_000_000_000, "nsec": now % 1_000_000_000}
        try:
            await self._send(ep, id=C["COSM_MSG_SYNC_TIME"], **sync)
        except (ScifError, TimeoutError) as e:
            self.log.warning(f"COSM connection lost at once: {e}")
            self._close(ep)
            return
        self._ep = ep
        self._watchdog = self.heartbeat_enable
        self._move(Event.CONNECTED)
        self._loop_task = self._spawn(self._message_loop(ep), "the COSM message loop")

    def set_heartbeat(self, enable: bool) -> None:
        """The administrator's switch; acts at once while online (COSM-51)."""
        self.heartbeat_enable = enable
        if self.state is State.ONLINE:
            self._watchdog = enable

    async def _message_loop(self, ep: Connection) -> None:
        data = b""
        unknown: set[int] = set()
        while True:
            revents = await ep.poll(POLLIN, self.clock.limit(HEARTBEAT_TIMEOUT))
            if not revents:
                self._silence()
                continue
            try:
                data += ep.recv_nowait(4096)
            except ScifError:
                revents = POLLHUP
            while len(data) >= L.COSM_MSG.size:
                message, data = data[: L.COSM_MSG.size], data[L.COSM_MSG.size :]
                self._message(L.COSM_MSG.unpack(message), unknown)
            # What the card sent before it closed is honoured: the end counts when nothing is left.
            if revents & (POLLHUP | POLLERR) and not revents & POLLIN:
                self._hang_up(ep)
                return
            await asyncio.sleep(0)  # a card that never stops sending must not stop us

    def _message(self, msg: dict[str, int], unknown: set[int]) -> None:
        self.heard = self.clock.monotonic()
        if msg["id"] == C["COSM_MSG_HEARTBEAT"]:
            self.heartbeats += 1
            return
        if msg["id"] != C["COSM_MSG_SHUTDOWN_STATUS"]:
            if len(unknown) < 16 and msg["id"] not in unknown:
                unknown.add(msg["id"])
                self.log.warning("unknown COSM message", id=msg["id"])
        elif 1 <= msg["value"] <= 4:
            self._watchdog = False
            self._pending = Status(msg["value"])
            if self.state in (State.ONLINE, State.SHUTTING_DOWN):
                self._move(Event.STATUS)
        elif -1 not in unknown:
            unknown.add(-1)
            self.log.warning("shutdown status out of range", value=msg["value"])

    def _silence(self) -> None:
        """T16: nothing heard for the whole window."""
        if self._watchdog and self.state is State.ONLINE:
            self._crashed("no heartbeat")
            self.on_silence()

    def _crashed(self, why: str) -> None:
        self.log.error(f"the card has crashed: {why}", event="crash", why=why)
        self._watchdog = False
        self._pending = Status.CRASHED
        self._publish(Status.CRASHED, notify=False)  # both are visible together (COSM-50)
        self._move(Event.HEARTBEAT_LOST)

    def _hang_up(self, ep: Connection) -> None:
        """T17: publish the remembered status; the state does not change."""
        if self._pending is not Status.NOP:
            self._publish(self._pending)
        self._ep = None
        self._watchdog = False
        self._close(ep)
        waiting, self._waiting = self._waiting, None
        if waiting:
            self._spawn(self.adopt(waiting), "the next COSM connection")

    def os_died(self, why: str) -> None:
        """The board saw its OS process end without an orderly shutdown: a crash that the watchdog
        would find later (design.md section 5)."""
        if self.state is State.ONLINE and self.heartbeat_enable:
            self._crashed(why)
        elif self.state is State.SHUTTING_DOWN and self._pending is Status.NOP:
            self.log.error(f"the card died while it was shutting down: {why}", event="crash", why=why)
            self._pending = Status.CRASHED
            self._publish(Status.CRASHED)
