"""The transition table as data (COSM 2)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest
from lab import Lab, errno_of

from mic_emu.cosm.states import NEXT, Event, State, Status, step
from mic_emu.errors import StateError
from mic_emu.testing.cosm import FakeConnection, settle

S, E = State, Event
ALL = [(s, e) for s in State for e in Event]
DOWN = (S.BOOTING, S.ONLINE, S.SHUTTING_DOWN, S.RESETTING, S.RESET_FAILED)


@pytest.mark.parametrize(("state", "event"), [p for p in ALL if p not in NEXT], ids=lambda x: x.name)
def test_cosm_18_29_36_forbidden_pair_is_einval(state: State, event: Event) -> None:
    """Every pair that the table does not have ends in EINVAL."""
    with pytest.raises(StateError) as e:
        step(state, event)
    assert e.value.errno == errno.EINVAL


def test_cosm_18_20_29_36_allowed_pairs_are_exactly_those_of_the_specification() -> None:
    """The table of COSM 2.3, written down a second time by hand, trigger by trigger."""
    by_trigger = {
        E.BOOT: {S.READY: S.BOOTING},
        E.BOOT_BARE: {S.READY: S.ONLINE},
        E.CONNECTED: {S.BOOTING: S.ONLINE, S.ONLINE: S.ONLINE},
        E.SHUTDOWN: {S.ONLINE: S.SHUTTING_DOWN},
        E.STATUS: {S.ONLINE: S.SHUTTING_DOWN, S.SHUTTING_DOWN: S.SHUTTING_DOWN},
        E.HEARTBEAT_LOST: {S.ONLINE: S.SHUTTING_DOWN},
        E.RESET: dict.fromkeys(DOWN, S.RESETTING),
        E.STOP: dict.fromkeys(State, S.RESETTING),
        E.FIRMWARE_READY: {S.READY: S.READY, S.RESETTING: S.READY},
        E.FIRMWARE_SILENT: {S.READY: S.RESET_FAILED, S.RESETTING: S.RESET_FAILED},
    }
    assert {(s, e): to for e, row in by_trigger.items() for s, to in row.items()} == dict(NEXT)


def test_states_and_statuses_have_the_values_and_words_of_the_real_header() -> None:
    """COSM 2.1 and 2.2."""
    assert [(s.value, s.word) for s in State] == list(
        enumerate(["ready", "booting", "online", "shutting_down", "resetting", "reset_failed"])
    )
    assert [(s.value, s.word) for s in Status] == list(
        enumerate(["nop", "crashed", "halted", "poweroff", "restart"])
    )


def test_every_state_is_left_by_a_reset_or_boot() -> None:
    """From each state some path of events leads back to ready: no trap."""
    good = {S.READY}
    while True:
        more = {s for (s, _), to in NEXT.items() if to in good} | good
        if more == good:
            break
        good = more
    assert good == set(State)


CAUSED = (E.BOOT, E.RESET, E.SHUTDOWN, E.CONNECTED, E.HEARTBEAT_LOST)


def requests(lab: Lab) -> dict[Event, Callable[[], Awaitable[object]]]:
    """How people, the card and the clock cause an event; the firmware's belong to a reset in work."""

    async def connected() -> None:
        await lab.dev.adopt(FakeConnection(lab.clock))
        await settle()

    async def silence() -> None:
        lab.dev._silence()

    return {
        E.BOOT: lab.dev.boot, E.RESET: lab.dev.reset, E.SHUTDOWN: lab.dev.shutdown, E.CONNECTED: connected,
        E.HEARTBEAT_LOST: silence,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("state", "event"), [p for p in ALL if p not in NEXT and p[1] in CAUSED], ids=lambda x: x.name
)
async def test_cosm_18_29_36_46_forbidden_pair_changes_nothing_on_a_card(state: State, event: Event) -> None:
    """The same pairs on a device: what somebody asked for is EINVAL, what happened is ignored; no state, no status,
    no wake-up, no call to the hardware."""
    lab = Lab()
    try:
        await lab.goto(state)
        lab.dev.bootmode = "linux"
        before = (lab.seen, lab.dev.changes, list(lab.ops.calls), lab.dev.connected)
        asked = event in (E.BOOT, E.RESET, E.SHUTDOWN)
        # A writer that meets a reset in work waits for its end; what it does then is COSM-25's test.
        if asked and state is S.RESETTING:
            request = asyncio.ensure_future(errno_of(requests(lab)[event]()))
            await settle()
            assert not request.done()
            request.cancel()
        elif asked:
            assert await errno_of(requests(lab)[event]()) == errno.EINVAL
        else:
            late = asyncio.ensure_future(requests(lab)[event]())
            await settle()
            late.cancel()
        assert (lab.seen, lab.dev.changes, lab.ops.calls, lab.dev.connected) == before
    finally:
        if lab.ops.gate:
            lab.ops.gate.set()
            await settle()
        lab.records.close()
