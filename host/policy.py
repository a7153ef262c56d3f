"""What the real stack's daemon decides, per card: reset after a shutdown or crash, boot after a restart.

Never inside the state machine (design.md section 5). A card that crashes again and again right
after its boot, or does not come up at all, is booted again with a growing pause, and at last left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mic_emu.clock import Clock
from mic_emu.config import CardConfig
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError, StateError
from mic_emu.host.cosm import CosmDevice
from mic_emu.log import Log

STATUS_LIMIT = 60.0  # seconds without a shutdown status until the card is reset anyway (COSM-33)
OS_END_LIMIT = 20.0
STABLE_AFTER = 60.0  # seconds online after which earlier crashes are forgiven
MAX_PAUSE = 60.0


class Policy:
    """Follows one card. ``boot`` boots what the card's strings name and waits for the result."""

    def __init__(
        self, cosm: CosmDevice, config: CardConfig, clock: Clock, log: Log, boot: Callable[[], Awaitable[None]],
        os_runs: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.cosm = cosm
        self.config = config
        self.clock = clock
        self.log = log
        self.attempts = 0  # boots in a row that ended in a crash
        self._boot = boot
        self._os_runs = os_runs
        self._wake = asyncio.Event()
        self._reboot: Status | None = None  # why the card is to be booted once it is ready
        self._last = cosm.state
        self._online_since = 0.0
        cosm.on_change.append(self.wake)

    def wake(self) -> None:
        """Something changed: the state machine, or the card OS ended."""
        if self.cosm.state is State.ONLINE and self._last is not State.ONLINE:
            self._online_since = self.clock.monotonic()
        self._last = self.cosm.state
        self._wake.set()

    async def run(self) -> None:
        """Act on state changes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            state = self.cosm.state
            if state is State.SHUTTING_DOWN:
                await self._shutting_down()
            elif state is State.READY and self._reboot is not None:
                await self._boot_again()
            elif state is State.RESET_FAILED and self._reboot is not None:
                self._reboot = None  # no loop: somebody has to look at it (COSM-65)
                self.log.error("the card is not booted again: its reset failed")

    async def _shutting_down(self) -> None:
        try:
            await self.clock.within(
                self._until(self._status_known), STATUS_LIMIT, "the card's shutdown status"
            )
        except TimeoutError:
            self.log.warning("no shutdown status: resetting the card")
        status = self.cosm.shutdown_status
        if self.cosm.state is not State.SHUTTING_DOWN:
            return
        self._reboot = None
        if status is Status.CRASHED:
            if self.config.on_crash == "keep":
                return
            if self.config.on_crash == "reboot":
                self._reboot = status
        else:
            if status is Status.RESTART:
                self._reboot = status
            await self._os_ended()
        if self.cosm.state is State.SHUTTING_DOWN:
            await self.cosm.reset()

    async def _os_ended(self) -> None:
        """The status comes before the card has taken its devices down: let it finish (VOP-18)."""
        try:
            await self.clock.within(
                self._until(lambda: not self._os_runs()), OS_END_LIMIT, "the end of the card OS"
            )
        except TimeoutError:
            self.log.warning("the card OS does not end: resetting the card")

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self._wake.wait()
            self._wake.clear()

    def _status_known(self) -> bool:
        return self.cosm.state is not State.SHUTTING_DOWN or self.cosm.shutdown_status is not Status.NOP

    async def _boot_again(self) -> None:
        """After a restart at once; after a crash, or when the boot fails, with a growing pause."""
        crashed, self._reboot = self._reboot is Status.CRASHED, None
        if crashed and self.clock.monotonic() - self._online_since > self.clock.limit(STABLE_AFTER):
            self.attempts = 0
        while self.cosm.state is State.READY:
            if crashed:
                self.attempts += 1
                if self.attempts > self.config.max_reboots:
                    text = f"crashed {self.attempts} times in a row: left in ready, boot it by hand"
                    self.log.error(text, event="gave_up", attempts=self.attempts)
                    self.attempts = 0
                    return
                await self.clock.pause(min(2.0**self.attempts, MAX_PAUSE))
            try:
                await self._boot()
                return
            except StateError:
                return  # somebody else was faster
            except (MicemuError, OSError, TimeoutError) as e:
                self.log.error(f"booting the card again failed: {e}")
            if self.config.on_crash != "reboot":
                return
            crashed = True
