"""The COSM connection: adoption, messages, heartbeat and watchdog (COSM 5)."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest
from lab import Lab

from mic_emu.cosm.states import State, Status
from mic_emu.scif.errors import ScifError
from mic_emu.testing.cosm import FakeConnection, message, settle

S = State
SYNC_TIME = 1


async def test_cosm_42_sync_time_is_the_first_message_and_carries_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On accept in booting or online: id 1, seconds and nanoseconds of now, to the nanosecond."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_999_999_999)
    lab = Lab()
    ep = await lab.online()
    assert ep.sent == [{"id": SYNC_TIME, "value": 1_700_000_000, "nsec": 999_999_999}]


async def test_cosm_44_any_message_restarts_the_window() -> None:
    """Heartbeats each 30 s: online for ever; an unknown message counts as well."""
    lab = Lab()
    ep = await lab.online()
    for kind in ("HEARTBEAT", "SYNC_TIME", "HEARTBEAT", "SHUTDOWN"):
        await lab.clock.advance(39)
        ep.say(message(kind))
        await settle()
    await lab.clock.advance(39)
    assert lab.seen == ("online", "nop")
    await lab.clock.advance(2)
    assert lab.seen == ("shutting_down", "crashed")


async def test_cosm_45_unknown_ids_are_logged_and_harmless() -> None:
    """The connection lives on and still carries messages; a flood is not logged line by line."""
    lab = Lab()
    ep = await lab.online()
    for _ in range(500):
        ep.say(message("HEARTBEAT").replace(b"\2", b"\x63", 1))
    await settle(100)
    assert lab.seen == ("online", "nop")
    assert (lab.dev.connected, ep.closed) == (True, False)
    assert lab.records.texts("warning").count("unknown COSM message") == 1
    await lab.run_down(ep, Status.HALTED)
    assert lab.seen == ("shutting_down", "halted")


@pytest.mark.parametrize("state", [S.READY, S.SHUTTING_DOWN, S.RESET_FAILED])
async def test_cosm_46_connection_in_another_state_is_closed_without_effect(state: State) -> None:
    """T9: no state change, the endpoint is closed, nothing is sent on it."""
    lab = Lab()
    await lab.goto(state)
    before = list(lab.words)
    ep = await lab.connect()
    assert (ep.closed, ep.sent, lab.words) == (True, [], before)


async def test_cosm_47_reloaded_client_is_adopted_while_online() -> None:
    """T8: state stays online, new SYNC_TIME, watchdog armed again."""
    lab = Lab()
    old = await lab.online()
    old.hang_up()
    await settle()
    assert not lab.dev.watchdog
    new = await lab.connect()
    assert (lab.seen, new.sent[0]["id"], lab.dev.watchdog) == (("online", "nop"), SYNC_TIME, True)
    await lab.clock.advance(41)
    assert lab.seen == ("shutting_down", "crashed")


async def test_cosm_47_second_connection_waits_for_the_end_of_the_first() -> None:
    """COSM 5.3: only the newest waits, the overtaken one is closed; it is adopted when the first ends."""
    lab = Lab()
    first = await lab.online()
    second, third = await lab.connect(), await lab.connect()
    assert (second.closed, third.closed, third.sent) == (True, False, [])
    first.hang_up()
    await settle()
    assert third.sent[0]["id"] == SYNC_TIME
    await lab.dev.shutdown()
    assert len(third.sent) == 2


async def test_cosm_46_waiting_connection_is_closed_by_a_reset() -> None:
    """Nothing of the old boot is left."""
    lab = Lab()
    first, second = await lab.online(), await lab.connect()
    await lab.dev.reset()
    await settle()
    assert first.closed
    assert second.closed


async def test_cosm_42_connection_that_dies_at_once_leaves_booting() -> None:
    """SYNC_TIME cannot be sent: closed, still booting, the next connection is adopted."""
    lab = Lab()
    await lab.boot()
    bad = FakeConnection(lab.clock)
    bad.send_error = ScifError(errno.ECONNRESET, "gone")
    await lab.dev.adopt(bad)
    await settle()
    assert (bad.closed, lab.seen) == (True, ("booting", "nop"))
    await lab.connect()
    assert lab.seen == ("online", "nop")


@pytest.mark.parametrize("piece", [1, 5, 23, 24, 25, 72])
async def test_cosm_49_split_and_merged_messages_are_understood(piece: int) -> None:
    """Heartbeat, status, heartbeat in pieces of any size: the status is found."""
    lab = Lab()
    ep = await lab.online()
    stream = message("HEARTBEAT") + message("SHUTDOWN_STATUS", Status.RESTART) + message("HEARTBEAT")
    for at in range(0, len(stream), piece):
        ep.say(stream[at : at + piece])
        await settle()
    ep.hang_up()
    await settle()
    assert lab.seen == ("shutting_down", "restart")


async def test_cosm_31_49_messages_before_the_hang_up_are_honoured() -> None:
    """Status and close arrive together, behind more than one read's worth of heartbeats."""
    lab = Lab()
    ep = await lab.online()
    ep.say(message("HEARTBEAT") * 1000 + message("SHUTDOWN_STATUS", Status.HALTED))
    ep.hang_up()
    await settle(100)
    assert lab.seen == ("shutting_down", "halted")


async def test_cosm_60_card_that_never_stops_sending_does_not_stop_the_host() -> None:
    """Between two reads others run."""
    lab = Lab()
    ep = await lab.online()
    ep.recv_nowait = lambda length: message("HEARTBEAT") * 100  # type: ignore[method-assign]
    ep.say(message("HEARTBEAT"))
    await settle()
    await asyncio.wait_for(lab.dev.reset(), 5)
    await settle()
    assert lab.dev.state is S.READY
    assert lab.records.texts("error") == []  # nor did a time limit end the loop that reads


async def test_cosm_50_silence_of_40_s_is_a_crash_both_words_together() -> None:
    """39.9 s: online. 40 s: shutting_down and crashed, at the same wake-up; no reset follows."""
    lab = Lab()
    await lab.online()
    together: list[tuple[str, str]] = []
    lab.dev.on_change.append(lambda: together.append(lab.seen))
    await lab.clock.advance(39.9)
    assert lab.seen == ("online", "nop")
    await lab.clock.advance(0.2)
    assert together == [("shutting_down", "crashed")]
    await lab.clock.advance(86400)
    assert (lab.seen, lab.ops.calls) == (("shutting_down", "crashed"), ["start"])


async def test_cosm_51_heartbeat_off_before_boot_is_never_a_crash() -> None:
    """Nor does the death of the card OS count then."""
    lab = Lab()
    lab.dev.set_heartbeat(False)
    await lab.online()
    await lab.clock.advance(86400)
    lab.dev.os_died("killed")
    assert lab.seen == ("online", "nop")


async def test_cosm_51_switch_acts_while_online_without_reconnect() -> None:
    """0 disarms, 1 arms again; it counts at the next expiry."""
    lab = Lab()
    await lab.online()
    lab.dev.set_heartbeat(False)
    await lab.clock.advance(200)
    assert lab.seen == ("online", "nop")
    lab.dev.set_heartbeat(True)
    await lab.clock.advance(41)
    assert lab.seen == ("shutting_down", "crashed")


async def test_cosm_51_switch_in_another_state_is_only_stored() -> None:
    """While shutting down nothing is armed."""
    lab = Lab()
    await lab.goto(S.SHUTTING_DOWN)
    lab.dev.set_heartbeat(True)
    assert not lab.dev.watchdog
    await lab.clock.advance(100)
    assert lab.seen == ("shutting_down", "nop")


async def test_cosm_52_heartbeats_after_a_crash_change_nothing() -> None:
    """The card is not taken back."""
    lab = Lab()
    ep = await lab.online()
    await lab.clock.advance(41)
    ep.say(message("HEARTBEAT"))
    await settle()
    assert lab.seen == ("shutting_down", "crashed")


async def test_cosm_53_status_disarms_the_watchdog() -> None:
    """A card that takes its time between status and close has not crashed."""
    lab = Lab()
    ep = await lab.online()
    ep.say(message("SHUTDOWN_STATUS", Status.POWEROFF))
    await lab.clock.advance(500)
    assert (lab.seen, lab.dev.watchdog) == (("shutting_down", "nop"), False)


async def test_cosm_23_35_late_messages_of_an_old_connection_are_dropped() -> None:
    """COSM 2.4 a and b: neither state nor status of a reset card changes."""
    lab = Lab()
    ep = await lab.online()
    await lab.dev.reset()
    await settle()
    ep.say(message("SHUTDOWN_STATUS", Status.RESTART))
    ep.hang_up()
    await settle()
    assert lab.seen == ("ready", "nop")
    await lab.online()
    assert lab.seen == ("online", "nop")


async def test_cosm_35_status_that_arrives_during_the_reset_is_not_published_after_it() -> None:
    """It was remembered while the tear-down ran; ready shows nop, and the next boot's connection knows nothing of it."""
    lab = Lab()
    ep = await lab.goto(S.RESETTING)
    assert ep
    ep.say(message("SHUTDOWN_STATUS", Status.RESTART))
    await settle()
    assert lab.dev.state is S.RESETTING
    ep.hang_up()
    await settle()
    assert lab.ops.gate
    lab.ops.gate.set()
    await settle()
    assert lab.seen == ("ready", "nop")
    (await lab.online()).hang_up()
    await settle()
    assert lab.seen == ("online", "nop")


async def test_cosm_54_dead_card_os_is_a_crash_at_once() -> None:
    """The board saw it die: no need to wait for the watchdog; in shutdown it only sets the status."""
    lab = Lab()
    ep = await lab.online()
    ep.hang_up()
    await settle()
    lab.dev.os_died("signal 9")
    assert lab.seen == ("shutting_down", "crashed")
    lab = Lab()
    await lab.goto(S.SHUTTING_DOWN)
    lab.dev.os_died("signal 9")
    assert lab.seen == ("shutting_down", "crashed")
