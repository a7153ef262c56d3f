"""COSM, host side: the state machine of one card and its SCIF server (COSM 2 to 5).

Policy (reset after a shutdown, boot after a restart) is not here: see policy.py. Every transition
goes through ``_move``, which logs it and wakes whoever waits for the state.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from typing import Protocol

from mic_emu import layout as L
from mic_emu.clock import Clock
from mic_emu.cosm.states import Event, State, Status, step
from mic_emu.errors import StateError
from mic_emu.log import Log
from mic_emu.scif.endpoint import Endpoint
from mic_emu.scif.errors import ScifError

C = L.CONSTANTS
POLLIN, POLLHUP = 1, 0x10
HEARTBEAT_TIMEOUT = 40.0  # 30 s interval + 10 s slack (COSM 5.1)
READY_POLLS = 45


class HardwareOps(Protocol):
    """What the state machine needs of the card (COSM 1.3)."""

    async def reset(self) -> None:
        """Trigger a reset; the pause after it included."""

    def ready(self) -> bool:
        """May an OS image be downloaded?"""

    async def start(self) -> None:
        """Prepare and start boot. Undoes itself and raises MicemuError on failure."""

    async def stop(self) -> None:
        """Tear down what start made, before the reset."""


class CosmDevice:
    """State, strings and connection of one card."""

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
        self.heartbeat_enable = True
        self.on_change: list[Callable[[], None]] = []
        self._prev = State.READY
        self._pending = Status.NOP  # received but not yet published
        self._lock = asyncio.Lock()
        self._watchdog = False
        self._ep: Endpoint | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._reset_task: asyncio.Task[None] | None = None

    # --- state ------------------------------------------------------------------------------

    def _move(self, event: Event) -> None:
        new = step(self.state, event)
        old, self.state = self.state, new
        if old is not new:
            self.log.info(f"{old.word} -> {new.word}", event="state", old=old.word, state=new.word, cause=event.value)
        self._notify()

    def _publish(self, status: Status) -> None:
        if status is not self.shutdown_status:
            self.shutdown_status = status
            self.log.info(f"shutdown status {status.word}", event="shutdown_status", status=status.word)
            self._notify()

    def _notify(self) -> None:
        for callback in list(self.on_change):
            callback()

    @property
    def connected(self) -> bool:
        """Has the card's COSM client a connection?"""
        return self._ep is not None

    # --- requests (COSM 2.3) ------------------------------------------------------------------

    async def boot(self) -> None:
        """T1 to T6. Raises StateError (EINVAL) or what the start operation raises; state then as before."""
        async with self._lock:
            if self.bootmode is None:
                raise StateError("bootmode is not set", errno.EINVAL)
            if self.state is State.READY and not self.ops.ready():
                await self._hardware_reset(Event.FIRMWARE_SILENT)
            if self.state is not State.READY:
                raise StateError(f"boot is not allowed in state {self.state.word}", errno.EINVAL)
            await self.ops.start()
            self._move(Event.BOOT)

    def reset(self) -> None:
        """T18 to T20: returns at once, the work runs in the background (COSM-37)."""
        if self.state is State.RESETTING:
            return
        previous = self.state
        self._move(Event.RESET)
        self._prev = previous
        self._reset_task = asyncio.ensure_future(self.stop(force=False))

    async def shutdown(self) -> None:
        """T10 to T13: ask the card to power off. Raises StateError EINVAL, ENOTCONN."""
        async with self._lock:
            if self.state is not State.ONLINE:
                raise StateError(f"shutdown is not allowed in state {self.state.word}", errno.EINVAL)
            if self._ep is None:
                raise StateError("the card's COSM client is not connected", errno.ENOTCONN)
            await self._ep.send(L.COSM_MSG.pack(id=C["COSM_MSG_SHUTDOWN"]))
            self._watchdog = False
            self._move(Event.SHUTDOWN)

    async def stop(self, force: bool) -> None:
        """Reset work, forced reset, suspend, removal (COSM 4.1)."""
        async with self._lock:
            if self.state is State.READY and not force:
                return
            old = self._prev if self.state is State.RESETTING else self.state
            tear_down = old not in (State.READY, State.RESET_FAILED)
            if self.state is not State.RESETTING:
                self._move(Event.STOP)
            self._watchdog = False
            if tear_down:
                await self.ops.stop()
            await self._drop_connection()
            await self._hardware_reset(Event.FIRMWARE_SILENT)

    async def _hardware_reset(self, silent: Event) -> None:
        await self.ops.reset()
        for poll in range(READY_POLLS):
            if self.ops.ready():
                # nop before ready: who waits for ready must not read the old status (COSM 2.4 c).
                self._pending = Status.NOP
                self._publish(Status.NOP)
                if self.state is State.RESETTING:
                    self._move(Event.FIRMWARE_READY)
                return
            if poll < READY_POLLS - 1:
                await self.clock.pause(1.0)
        self._pending = Status.NOP
        self._publish(Status.NOP)
        self._move(silent)

    async def _drop_connection(self) -> None:
        """Late messages of the old connection are lost with it (COSM 2.4 a)."""
        task, self._loop_task = self._loop_task, None
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        ep, self._ep = self._ep, None
        if ep:
            await ep.close()

    # --- connection (COSM 5.3) ----------------------------------------------------------------

    async def adopt(self, ep: Endpoint) -> None:
        """T7 to T9: a connection from this card was accepted."""
        async with self._lock:
            if self.state not in (State.BOOTING, State.ONLINE):
                self.log.warning("COSM connection refused", state=self.state.word)
                await ep.close()
                return
            await self._drop_connection()
            now = time.time_ns()
            await ep.send(
                L.COSM_MSG.pack(id=C["COSM_MSG_SYNC_TIME"], value=now // 1_000_000_000, nsec=now % 1_000_000_000)
            )
            self._ep = ep
            self._watchdog = self.heartbeat_enable
            self._loop_task = asyncio.ensure_future(self._message_loop(ep))
            self._move(Event.CONNECTED)

    def set_heartbeat(self, enable: bool) -> None:
        """The administrator's switch; acts at once while online (COSM-51)."""
        self.heartbeat_enable = enable
        if self.state is State.ONLINE:
            self._watchdog = enable

    async def _message_loop(self, ep: Endpoint) -> None:
        data = b""
        while True:
            revents = await ep.poll(POLLIN, self.clock.limit(HEARTBEAT_TIMEOUT))
            if not revents:
                self._silence()
                continue
            try:
                while chunk := ep.recv_nowait(4096):
                    data += chunk
            except ScifError:
                revents |= POLLHUP
            while len(data) >= L.COSM_MSG.size:
                message, data = data[: L.COSM_MSG.size], data[L.COSM_MSG.size :]
                self._message(L.COSM_MSG.unpack(message))
            if revents & POLLHUP:
                await self._hang_up(ep)
                return

    def _message(self, msg: dict[str, int]) -> None:
        if msg["id"] == C["COSM_MSG_HEARTBEAT"]:
            return
        if msg["id"] != C["COSM_MSG_SHUTDOWN_STATUS"]:
            self.log.warning("unknown COSM message", id=msg["id"])
        elif 1 <= msg["value"] <= 4:
            self._watchdog = False
            self._pending = Status(msg["value"])
            if self.state in (State.BOOTING, State.ONLINE, State.SHUTTING_DOWN):
                self._move(Event.STATUS)
        else:
            self.log.warning("shutdown status out of range", value=msg["value"])

    def _silence(self) -> None:
        """T16: nothing heard for the whole window."""
        if self._watchdog and self.state is State.ONLINE:
            self._crashed("no heartbeat")

    def _crashed(self, why: str) -> None:
        self.log.error(f"the card has crashed: {why}", event="crash")
        self._watchdog = False
        self._pending = Status.CRASHED
        self.shutdown_status = Status.CRASHED  # published together with the state (COSM-50)
        self._move(Event.HEARTBEAT_LOST)

    async def _hang_up(self, ep: Endpoint) -> None:
        """T17: publish the remembered status; the state does not change."""
        if self._pending is not Status.NOP:
            self._publish(self._pending)
        if self._ep is ep:
            self._ep = None
        await ep.close()

    def os_died(self, why: str) -> None:
        """The board saw its OS process end without an orderly shutdown: a crash that the watchdog
        would find later (design.md section 5)."""
        if self.state is State.ONLINE and self.heartbeat_enable:
            self._crashed(why)
        elif self.state is State.SHUTTING_DOWN and self._pending is Status.NOP:
            self.log.error(f"the card died while it was shutting down: {why}", event="crash")
            self._pending = Status.CRASHED
            self._publish(Status.CRASHED)


class CosmServer:
    """Listens on node 0 port 201 and hands connections to the cards (COSM-41)."""

    def __init__(self, listener: Endpoint, find: Callable[[int], CosmDevice | None], log: Log) -> None:
        self._listener = listener
        self._find = find
        self._log = log

    @classmethod
    def open(cls, endpoint: Endpoint, find: Callable[[int], CosmDevice | None], log: Log) -> CosmServer:
        """Bind and listen. Raises ScifError."""
        endpoint.bind(C["SCIF_COSM_PORT"])
        endpoint.listen(C["COSM_BACKLOG"])
        return cls(endpoint, find, log)

    async def serve(self) -> None:
        """Accept until cancelled."""
        while True:
            try:
                ep = await self._listener.accept()
            except ScifError as e:
                self._log.warning(f"COSM accept: {e}")  # a card that went away in the middle of it
                continue
            node = ep.peer[0] if ep.peer else 0
            device = self._find(node - 1)
            if device is None:
                self._log.warning("COSM connection from a node without a card", node=node)
                await ep.close()
            else:
                asyncio.ensure_future(self._adopt(device, ep))

    async def _adopt(self, device: CosmDevice, ep: Endpoint) -> None:
        try:
            await device.adopt(ep)
        except ScifError as e:
            self._log.warning(f"COSM connection lost at once: {e}", card=device.index)
