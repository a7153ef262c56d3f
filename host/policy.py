"""What the real stack's daemon decides, per card: reset after a shutdown or crash, boot after a restart.

Never inside the state machine (design.md section 5). A card that goes down again and again right after its
boot, because it crashes or because it restarts itself, or that does not come up at all, is booted again with
a growing pause, and at last left alone. One count for all of these; a card that ran for a while begins anew,
and so does one that somebody else boots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from mic_emu.clock import Clock
from mic_emu.config import CardConfig
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError, StateError
from mic_emu.host.cosm import CosmDevice
from mic_emu.log import Log

STATUS_LIMIT = 60.0  # seconds without a shutdown status until the card is reset anyway (COSM-33)
OS_END_LIMIT = 20.0
STABLE_AFTER = 60.0  # seconds online after which earlier boots are forgotten
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
        self.attempts = 0  # boots of ours in a row, each of which a card soon needed again
        self._boot = boot
        self._os_runs = os_runs
        self._wake = asyncio.Event()
        self._reboot: Status | None = None  # why the card is to be booted once it is ready
        self._booting = False  # this boot is ours
        self._last = cosm.state
        self._online_since = 0.0
        cosm.on_change.append(self.wake)

    def wake(self) -> None:
        """Something changed: the state machine, or the card OS ended."""
        state, before = self.cosm.state, self._last
        self._last = state
        if state is State.BOOTING and not self._booting:
            self.attempts = 0
        elif state is State.ONLINE and before is not State.ONLINE:
            self._online_since = self.clock.monotonic()
        elif (
            before is State.ONLINE
            and state is not State.ONLINE
            and self._ran_s > self.clock.limit(STABLE_AFTER)
        ):
            # Counted to here: how long it then takes to go down, or to be reset, says nothing good of it.
            self.attempts = 0
        self._wake.set()

    @property
    def _ran_s(self) -> float:
        return self.clock.monotonic() - self._online_since

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
            with suppress(StateError):  # somebody else's reset was before us, and has ended
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
        """Until it is up, or in somebody else's hands, or has had its ``max_reboots``."""
        status, self._reboot = self._reboot, None
        what = "restarted itself" if status is Status.RESTART else "crashed"
        while self.cosm.state is State.READY:
            if self.attempts >= self.config.max_reboots:
                self._give_up(what)
                return
            # A restart is what a card may ask for: the first one has no pause.
            exponent = self.attempts + (status is not Status.RESTART)
            self.attempts += 1
            if exponent and not await self._pause(min(2.0**exponent, MAX_PAUSE), what):
                return
            try:
                await self._boot_ours()
                return
            except StateError:
                return  # somebody else was faster
            except (MicemuError, OSError, TimeoutError) as e:
                left = (
                    ""
                    if self.config.on_crash == "reboot"
                    else f"; it is left in ready: micemu boot mic{self.cosm.index}"
                )
                self.log.error(f"booting the card again failed: {e}{left}")
            if self.config.on_crash != "reboot":
                return
            status, what = Status.CRASHED, "did not come up"

    async def _boot_ours(self) -> None:
        self._booting = True
        try:
            await self._boot()
        finally:
            self._booting = False

    async def _pause(self, seconds: float, what: str) -> bool:
        """False when somebody else took the card meanwhile."""
        self.log.info(
            f"it {what}: to be booted again in {self.clock.delay(seconds):g} s",
            event="boot_again", attempt=self.attempts, of=self.config.max_reboots, pause_s=self.clock.delay(seconds),
        )  # fmt: skip
        changes = self.cosm.changes
        pause = asyncio.ensure_future(self.clock.pause(seconds))
        taken = asyncio.ensure_future(self._until(lambda: self.cosm.changes != changes))
        try:
            await asyncio.wait({pause, taken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            taken.cancel()
            await asyncio.gather(pause, taken, return_exceptions=True)
        if self.cosm.changes == changes:
            return True
        self._wake.set()  # the change that ended the pause may need us
        return False

    def _give_up(self, what: str) -> None:
        name, times = f"mic{self.cosm.index}", self.attempts + 1
        limit, self.attempts = self.clock.limit(STABLE_AFTER), 0
        self.log.error(
            f"it {what}: {times} times down in a row without {limit:g} s online in between (max_reboots = "
            f"{self.config.max_reboots}), so it is left in ready. Look at its console.log, then micemu boot {name}",
            event="gave_up", attempts=times, cause=what,
        )  # fmt: skip
