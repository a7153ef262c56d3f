"""One card's state machine with everything around it under the test's control."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mic_emu.clock import ManualClock
from mic_emu.config import CardConfig
from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.policy import Policy
from mic_emu.testing.cosm import FakeConnection, FakeOps, Records, message, settle


class Lab:
    """A CosmDevice on fake hardware; ``words`` lists every state it went through."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ops = FakeOps()
        self.records = Records()
        self.dev = CosmDevice(0, self.ops, self.clock, self.records.log)
        self.words: list[str] = []
        self.wakes = 0
        self.dev.on_state.append(self._on_state)

    def _on_state(self) -> None:
        self.wakes += 1
        self.words.append(self.dev.state.word)

    @property
    def seen(self) -> tuple[str, str]:
        """What sysfs shows: state and shutdown status."""
        return self.dev.state.word, self.dev.shutdown_status.word

    async def boot(self) -> None:
        self.dev.bootmode = "linux"
        self.dev.firmware = "mic/uos.img"
        await self.dev.boot()

    async def connect(self) -> FakeConnection:
        ep = FakeConnection(self.clock)
        await self.dev.adopt(ep)
        await settle()
        return ep

    async def online(self) -> FakeConnection:
        await self.boot()
        ep = await self.connect()
        assert self.dev.state is State.ONLINE
        return ep

    async def goto(self, state: State) -> FakeConnection | None:
        """Bring the card into a state by what leads there in real life."""
        if state is State.READY:
            return None
        if state is State.BOOTING:
            await self.boot()
            return None
        if state is State.RESET_FAILED:
            await self.boot()
            self.ops.polls = -1
            await self.dev.reset()
            await self.clock.advance(60)
            self.ops.polls = 0
            return None
        ep = await self.online()
        if state is State.SHUTTING_DOWN:
            await self.dev.shutdown()
        if state is State.RESETTING:
            self.ops.gate = asyncio.Event()
            await self.dev.reset()
            await settle()
        assert self.dev.state is state
        return ep

    async def run_down(self, ep: FakeConnection, status: int) -> None:
        """The card goes down in order: status, then its endpoint closes."""
        ep.say(message("SHUTDOWN_STATUS", status))
        await settle()
        ep.hang_up()
        await settle()

    def policy(
        self, config: CardConfig, boot: Callable[[], Awaitable[None]]
    ) -> tuple[Policy, asyncio.Task[None]]:
        policy = Policy(self.dev, config, self.clock, self.records.log, boot, lambda: False)
        return policy, asyncio.ensure_future(policy.run())


async def errno_of(request: Awaitable[None]) -> int:
    """0 when it succeeds."""
    try:
        await request
    except MicemuError as e:
        return e.errno
    return 0
