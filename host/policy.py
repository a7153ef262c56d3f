"""What the real stack's daemon decides, per card: reset after a shutdown or crash, boot after a restart.

Never inside the state machine (design.md section 5). A card that crashes again and again right
after its boot is booted again with a growing pause, and at last left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mic_emu.clock import Clock
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError
from mic_emu.host.cosm import CosmDevice
from mic_emu.log import Log

STATUS_LIMIT = 60.0  # seconds without a shutdown status until the card is reset anyway (COSM-33)
OS_END_LIMIT = 20.0
MAX_REBOOTS = 5
STABLE_AFTER = 60.0  # seconds online after which earlier crashes are forgiven


class Policy:
    """Follows one card."""

    def __init__(
        self, cosm: CosmDevice, on_crash: str, clock: Clock, log: Log, boot: Callable[[], Awaitable[None]],
        os_runs: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.cosm = cosm
        self.on_crash = on_crash
        self.clock = clock
        self.log = log
        self._boot = boot
        self._os_runs = os_runs
        self._wake = asyncio.Event()
        self._reboot = False
        self._crashes = 0
        self._online_since = 0.0
        cosm.on_change.append(self.wake)

    def wake(self) -> None:
        """Something changed: the state machine, or the card OS ended."""
        self._wake.set()

    async def run(self) -> None:
        """Act on state changes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            state = self.cosm.state
            if state is State.SHUTTING_DOWN:
                await self._shutting_down()
            elif state is State.READY and self._reboot:
                await self._boot_again()
            elif state is State.ONLINE:
                self._online_since = self.clock.monotonic()

    async def _shutting_down(self) -> None:
        try:
            await self.clock.within(self._until(self._status_known), STATUS_LIMIT, "the card's shutdown status")
        except TimeoutError:
            self.log.warning("no shutdown status: resetting the card")
        status = self.cosm.shutdown_status
        if self.cosm.state is not State.SHUTTING_DOWN:
            return
        if status is Status.CRASHED:
            if self.on_crash == "keep":
                return
            self._reboot = self.on_crash == "reboot"
        else:
            self._reboot = status is Status.RESTART
            await self._os_ended()
        if self.cosm.state is State.SHUTTING_DOWN:
            self.cosm.reset()

    async def _os_ended(self) -> None:
        """The status comes before the card has taken its devices down: let it finish (VOP-18)."""
        try:
            await self.clock.within(self._until(lambda: not self._os_runs()), OS_END_LIMIT, "the end of the card OS")
        except TimeoutError:
            self.log.warning("the card OS does not end: resetting the card")

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self._wake.wait()
            self._wake.clear()

    def _status_known(self) -> bool:
        return self.cosm.state is not State.SHUTTING_DOWN or self.cosm.shutdown_status is not Status.NOP

    async def _boot_again(self) -> None:
        self._reboot = False
        if self.on_crash == "reboot":
            stable = self.clock.monotonic() - self._online_since > self.clock.limit(STABLE_AFTER)
            self._crashes = 1 if stable else self._crashes + 1
            if self._crashes > MAX_REBOOTS:
                self.log.error(f"crashed {MAX_REBOOTS} times in a row: left in ready, boot it by hand")
                return
            await self.clock.pause(2.0**self._crashes)
        try:
            await self._boot()
        except MicemuError as e:
            self.log.error(f"boot after restart failed: {e}")
