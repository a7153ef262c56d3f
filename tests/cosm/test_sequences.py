"""Random sequences of commands and faults: whatever happens, the card can be brought back and nothing is left."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import Lab

from mic_emu.cosm.states import NEXT, Event, State
from mic_emu.errors import MicemuError
from mic_emu.scif.errors import ScifError
from mic_emu.testing.cosm import FakeConnection, message, settle

ACTIONS = (
    "boot", "boot_fails", "reset", "shutdown", "force_reset", "suspend", "connect", "hang_up", "die", "heartbeat", "unknown",
    "halted", "poweroff", "restart", "status_5", "half_message", "heartbeat_off", "heartbeat_on", "firmware_dead",
    "firmware_slow", "firmware_good", "stop_fails", "wait_1", "wait_41", "wait_100", "send_fails",
)  # fmt: skip
MOVES = {(s, to) for (s, _), to in NEXT.items()}


class Run(Lab):
    """One sequence. Requests run as tasks of their own, as writers do."""

    def __init__(self) -> None:
        super().__init__()
        self.eps: list[FakeConnection] = []
        self.writers: list[asyncio.Task[None]] = []
        self.last = State.READY
        self.dev.bootmode = "linux"
        self.dev.on_state.append(self._check_move)

    def _check_move(self) -> None:
        now = self.dev.state
        assert (self.last, now) in MOVES, f"{self.last.name} -> {now.name} is not in the table"
        if now is State.READY:
            assert self.dev.shutdown_status.word == "nop"
        self.last = now

    def writer(self, request: object) -> None:
        self.writers.append(asyncio.ensure_future(self._request(request)))

    async def _request(self, request: object) -> None:
        try:
            await request  # type: ignore[misc]
        except (MicemuError, ScifError, TimeoutError):
            pass

    async def act(self, action: str) -> None:
        dev, ops = self.dev, self.ops
        card = self.eps[-1] if self.eps else FakeConnection(self.clock)
        if action in ("boot", "boot_fails"):
            ops.fail_start = MicemuError("no") if action == "boot_fails" else None
            self.writer(dev.boot())
        elif action in ("reset", "shutdown", "suspend"):
            self.writer(getattr(dev, action)())
        elif action == "force_reset":
            self.writer(dev.stop(force=True))
        elif action == "connect":
            self.eps.append(FakeConnection(self.clock))
            self.writer(dev.adopt(self.eps[-1]))
        elif action == "hang_up":
            card.hang_up()
        elif action == "die":
            card.hang_up()
            dev.os_died("signal 9")
        elif action in ("heartbeat", "unknown", "half_message"):
            data = message("HEARTBEAT")
            card.say({"heartbeat": data, "unknown": b"\x63" + data[1:], "half_message": data[:7]}[action])
        elif action in ("halted", "poweroff", "restart", "status_5"):
            value = {"halted": 2, "poweroff": 3, "restart": 4, "status_5": 5}[action]
            card.say(message("SHUTDOWN_STATUS", value))
        elif action.startswith("heartbeat_o"):
            dev.set_heartbeat(action == "heartbeat_on")
        elif action.startswith("firmware"):
            ops.polls = {"firmware_dead": -1, "firmware_slow": 20, "firmware_good": 0}[action]
        elif action == "stop_fails":
            ops.fail_stop = None if ops.fail_stop else RuntimeError("broken")
        elif action == "send_fails":
            card.send_error = ScifError(104, "gone")
        else:
            await self.clock.advance(int(action.partition("_")[2]))
            return
        await settle(3)

    async def finish(self) -> None:
        """Bring it back by force and look at what is left."""
        self.ops.polls = 0
        self.ops.fail_stop = None
        await self.clock.advance(500)
        await asyncio.gather(*self.writers)
        await self.dev.stop(force=True)
        await self.clock.advance(1)
        assert self.seen == ("ready", "nop")
        assert not self.dev.connected
        assert [ep for ep in self.eps if not ep.closed] == []
        assert not self.dev._tasks
        assert not self.dev.watchdog
        # What was started was stopped exactly once.
        assert self.ops.calls.count("stop") == self.words.count("booting")


async def play(actions: list[str]) -> None:
    run = Run()
    try:
        for action in actions:
            await run.act(action)
        await run.finish()
    finally:
        run.records.close()


SEQUENCES = given(st.lists(st.sampled_from(ACTIONS), max_size=40))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@SEQUENCES
def test_cosm_18_22_24_26_35_60_random_sequences_end_in_a_state_of_the_table(actions: list[str]) -> None:
    """Every move is in the table, ready always shows nop, a forced reset always works, nothing is left open."""
    asyncio.run(play(actions))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@SEQUENCES
def test_cosm_18_22_24_26_35_60_two_thousand_random_sequences(actions: list[str]) -> None:
    """The same for longer."""
    asyncio.run(play(actions))


def test_events_and_states_of_the_table_are_all_used() -> None:
    """No dead rows: each event moves from somewhere, each state is reached."""
    assert {e for _, e in NEXT} == set(Event)
    assert set(NEXT.values()) == set(State)
