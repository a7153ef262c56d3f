"""What the daemon decides (COSM 10.2): reset, boot again, back-off."""

from __future__ import annotations

import asyncio

import pytest
from lab import Lab

from mic_emu.config import CardConfig
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError
from mic_emu.testing.cosm import FakeConnection, message, settle

S = State


class Daemon(Lab):
    """A lab with a policy; ``boots`` counts what it booted."""

    def __init__(self, on_crash: str = "keep", max_reboots: int = 5) -> None:
        super().__init__()
        self.boots: list[float] = []
        self.fail = False
        self.ep: FakeConnection | None = None
        config = CardConfig(on_crash=on_crash, max_reboots=max_reboots)
        self.daemon, self.task = self.policy(config, self._boot)

    async def _boot(self) -> None:
        self.boots.append(self.clock.monotonic())
        if self.fail:
            raise MicemuError("the card OS did not come online")
        self.ep = await self.online()


@pytest.mark.parametrize("status", [Status.HALTED, Status.POWEROFF, Status.RESTART])
async def test_cosm_64_reset_after_an_orderly_end_and_boot_only_after_restart(status: Status) -> None:
    """halted and poweroff end ready; restart ends online again."""
    d = Daemon()
    await d.run_down(await d.online(), status)
    await d.clock.advance(1)
    assert d.dev.state is (S.ONLINE if status is Status.RESTART else S.READY)
    assert len(d.boots) == (status is Status.RESTART)


async def test_cosm_33_64_no_status_for_60_s_is_reset_anyway() -> None:
    """59 s: still shutting down."""
    d = Daemon()
    await d.goto(S.SHUTTING_DOWN)
    await d.clock.advance(59)
    assert d.seen == ("shutting_down", "nop")
    await d.clock.advance(3)
    assert (d.seen, d.boots) == (("ready", "nop"), [])


@pytest.mark.parametrize(
    ("on_crash", "end"), [("keep", S.SHUTTING_DOWN), ("reset", S.READY), ("reboot", S.ONLINE)]
)
async def test_cosm_64_crash_follows_the_configuration(on_crash: str, end: State) -> None:
    """reset is what the real daemon does; keep (default) leaves the card to be looked at."""
    d = Daemon(on_crash)
    await d.online()
    await d.clock.advance(40.5)
    assert d.dev.shutdown_status is (Status.CRASHED if on_crash == "keep" else Status.NOP)
    await d.clock.advance(5)
    assert d.dev.state is end


async def test_cosm_64_card_that_does_not_come_up_is_tried_with_growing_pauses_and_then_left() -> None:
    """Pauses of 2, 4, 8 s; after max_reboots it stays ready and the log says so; one try by hand starts afresh."""
    d = Daemon("reboot", max_reboots=3)
    await d.online()
    d.fail = True
    await d.clock.advance(41)
    start = d.clock.monotonic()
    await d.clock.advance(1000)
    gaps = [b - a for a, b in zip(d.boots, d.boots[1:], strict=False)]
    assert (len(d.boots), gaps) == (3, pytest.approx([4, 8]))
    assert d.boots[0] - start <= 2
    assert d.dev.state is S.READY
    assert any("left in ready" in t for t in d.records.texts("error"))


async def test_cosm_64_pauses_grow_up_to_a_minute() -> None:
    """4, 8, 16, 32, then a minute each time."""
    d = Daemon("reboot", max_reboots=8)
    await d.online()
    d.fail = True
    await d.clock.advance(10_000)
    gaps = [b - a for a, b in zip(d.boots, d.boots[1:], strict=False)]
    assert gaps == pytest.approx([4, 8, 16, 32, 60, 60, 60])


async def test_cosm_64_crashes_long_after_the_boot_are_forgiven() -> None:
    """A card that was online for a minute starts counting anew."""
    d = Daemon("reboot", max_reboots=1)
    ep: FakeConnection | None = await d.online()
    for n in range(3):
        assert ep
        for _ in range(3):
            await d.clock.advance(30)
            ep.say(b"x")
        await d.clock.advance(41)
        await d.clock.advance(5)
        assert (len(d.boots), d.dev.state) == (n + 1, S.ONLINE)
        ep = d.ep


async def restarts(d: Daemon, times: int) -> None:
    """The card asks for a restart as soon as it is online, and is booted, so often; then once more."""
    ep = await d.online()
    for _ in range(times):
        began = len(d.boots)
        await d.run_down(ep, Status.RESTART)
        await d.clock.advance(20)
        assert len(d.boots) == began + 1
        assert d.ep
        ep = d.ep
    await d.run_down(ep, Status.RESTART)


async def test_cosm_64_card_that_restarts_for_ever_is_booted_with_growing_pauses_and_then_left() -> None:
    """At once, after 2 and after 4 s; the fourth restart in a row leaves it ready, and the event says why and what next."""
    d = Daemon(max_reboots=3)
    pauses = []
    ep = await d.online()
    for _ in range(3):
        await d.run_down(ep, Status.RESTART)
        down = d.clock.monotonic()
        await d.clock.advance(20)
        pauses.append(d.boots[-1] - down)
        assert (d.dev.state, d.ep is not None) == (S.ONLINE, True)
        ep = d.ep or ep
    assert pauses == pytest.approx([0, 2, 4])
    await d.run_down(ep, Status.RESTART)
    await d.clock.advance(1000)
    assert (len(d.boots), d.dev.state) == (3, S.READY)
    (end,) = [r for r in d.records.records if r.get("event") == "gave_up"]
    assert (end["attempts"], end["cause"]) == (4, "restarted itself")
    assert "it restarted itself: 4 times down in a row" in end["message"]
    assert "micemu boot mic0" in end["message"]


async def test_cosm_64_restarts_and_crashes_are_one_count() -> None:
    """Two restarts, then a crash: the third boot is the last of max_reboots = 3, with the pause of the third."""
    d = Daemon("reboot", max_reboots=3)
    await restarts(d, 2)
    await d.clock.advance(20)
    assert (len(d.boots), d.dev.state) == (3, S.ONLINE)
    await d.clock.advance(1000)  # the card says nothing any more
    assert (len(d.boots), d.dev.state) == (3, S.READY)
    assert [r["cause"] for r in d.records.records if r.get("event") == "gave_up"] == ["crashed"]


async def test_cosm_64_restart_long_after_the_boot_is_forgiven() -> None:
    """One that was online for a minute may restart as often as it likes, each time without a pause."""
    d = Daemon(max_reboots=1)
    ep: FakeConnection | None = await d.online()
    for n in range(4):
        assert ep
        for _ in range(3):
            await d.clock.advance(30)
            ep.say(message("HEARTBEAT"))
        await d.run_down(ep, Status.RESTART)
        await d.clock.advance(1)
        assert (len(d.boots), d.dev.state) == (n + 1, S.ONLINE)
        ep = d.ep


async def test_cosm_64_minutes_of_going_down_are_no_time_online() -> None:
    """A card that is online for a moment and then takes a minute to show its status has not run well."""
    d = Daemon(max_reboots=1)
    ep = await d.online()
    for n in range(2):
        await d.clock.advance(10)
        await d.dev.shutdown()
        await d.clock.advance(59)
        await d.run_down(ep, Status.RESTART)
        await d.clock.advance(5)
        assert (len(d.boots), d.dev.state) == (1, [S.ONLINE, S.READY][n])
        ep = d.ep or ep


async def test_cosm_64_boot_by_hand_starts_a_new_count_and_ends_a_pause() -> None:
    """Somebody boots while the policy waits: it neither boots once more nor counts what was before."""
    d = Daemon(max_reboots=3)
    await restarts(d, 2)
    await d.clock.advance(1)
    assert (d.dev.state, len(d.boots)) == (S.READY, 2)
    ep = await d.online()
    assert d.daemon.attempts == 0
    await d.run_down(ep, Status.RESTART)
    await d.clock.advance(1)
    assert (d.dev.state, len(d.boots)) == (S.ONLINE, 3)


async def test_cosm_65_reset_failed_is_left_alone_and_goes_on_by_hand() -> None:
    """No loop, no boot; a reset by hand ends ready and does not boot what was once wanted."""
    d = Daemon()
    d.ops.polls = -1
    await d.run_down(await d.online(), Status.RESTART)
    await d.clock.advance(600)
    assert (d.dev.state, d.ops.calls.count("reset"), d.boots) == (S.RESET_FAILED, 1, [])
    d.ops.polls = 0
    await d.dev.reset()
    await d.clock.advance(1)
    assert (d.dev.state, d.boots) == (S.READY, [])
    await d.run_down(await d.online(), Status.RESTART)
    await d.clock.advance(1)
    assert len(d.boots) == 1


async def test_cosm_64_waits_for_the_end_of_the_card_os() -> None:
    """The status comes first; the reset follows when the OS process has ended."""
    d = Daemon()
    runs = True
    d.daemon._os_runs = lambda: runs
    await d.run_down(await d.online(), Status.POWEROFF)
    assert d.seen == ("shutting_down", "poweroff")
    runs = False
    d.daemon.wake()
    await settle()
    assert d.seen == ("ready", "nop")


async def test_cosm_64_card_os_that_does_not_end_is_reset_all_the_same() -> None:
    """20 s after its status; a card that asked for a restart is booted then."""
    for status, end in ((Status.POWEROFF, S.READY), (Status.RESTART, S.ONLINE)):
        d = Daemon()
        d.daemon._os_runs = lambda: True
        await d.run_down(await d.online(), status)
        await d.clock.advance(19)
        assert d.seen == ("shutting_down", status.word)
        await d.clock.advance(2)
        assert (d.dev.state, len(d.boots)) == (end, status is Status.RESTART)


async def test_policy_goes_on_when_somebody_else_has_reset_the_card() -> None:
    """Its own reset came too late, and is none: the next time the card goes down it acts as before."""
    d = Daemon()
    ep = await d.online()
    ep.say(message("SHUTDOWN_STATUS", Status.POWEROFF))
    await settle()
    async with d.dev._lock:  # a boot or a message holds it, and the two queue behind it
        forced = asyncio.ensure_future(d.dev.stop(force=True))
        await settle()
        ep.hang_up()  # the status is known now
        await settle()
    await d.clock.advance(60)
    await forced
    assert d.dev.state is S.READY
    await d.run_down(await d.online(), Status.POWEROFF)
    await d.clock.advance(60)
    assert d.dev.state is S.READY
    assert not d.task.done()
