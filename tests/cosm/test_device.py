"""Requests to one card's state machine: boot, reset, shutdown, their guards and races (COSM 2 to 4)."""

from __future__ import annotations

import asyncio
import errno

import pytest
from lab import Lab, errno_of

from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError
from mic_emu.scif.errors import ScifError
from mic_emu.testing.cosm import message, settle

S = State
C_SHUTDOWN, C_SYNC_TIME = 0, 1


async def test_cosm_2_initial_values() -> None:
    """ready, nop, heartbeat on, strings unset, log addresses zero."""
    dev = Lab().dev
    assert (dev.state, dev.shutdown_status, dev.heartbeat_enable) == (S.READY, Status.NOP, True)
    assert (dev.cmdline, dev.firmware, dev.ramdisk, dev.bootmode) == (None,) * 4
    assert (dev.log_buf_addr, dev.log_buf_len) == (0, 0)


async def test_cosm_12_boot_without_bootmode_is_einval_in_every_state() -> None:
    """T6: EINVAL, nothing is touched."""
    lab = Lab()
    assert await errno_of(lab.dev.boot()) == errno.EINVAL
    assert lab.words == []
    assert lab.ops.calls == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
async def test_cosm_13_14_15_16_failed_start_leaves_ready_without_an_event(number: int) -> None:
    """T3: the start operation's errno, state ready, no notification; a correct boot then works without reset."""
    lab = Lab()
    lab.ops.fail_start = MicemuError("no such file", number)
    assert await errno_of(lab.boot()) == number
    assert (lab.seen, lab.words) == (("ready", "nop"), [])
    lab.ops.fail_start = None
    await lab.boot()
    assert (lab.dev.state, lab.ops.calls) == (S.BOOTING, ["start", "start"])


async def test_cosm_17_boot_is_booting_until_the_card_connects() -> None:
    """T1, T7: booting when the write returns; online with the connection."""
    lab = Lab()
    await lab.boot()
    assert lab.seen == ("booting", "nop")
    await lab.connect()
    assert lab.words == ["booting", "online"]


@pytest.mark.parametrize("state", [s for s in S if s is not S.READY])
async def test_cosm_18_boot_outside_ready_is_einval_without_effect(state: State) -> None:
    """T5; in resetting the writer waits for the reset and boots then (COSM-25)."""
    lab = Lab()
    await lab.goto(state)
    before, calls = list(lab.words), list(lab.ops.calls)
    lab.dev.bootmode = "linux"
    if state is S.RESETTING:
        writer = asyncio.ensure_future(lab.boot())
        await settle()
        assert not writer.done()
        assert lab.ops.gate
        lab.ops.gate.set()
        await writer
        assert lab.words == [*before, "ready", "booting"]
        return
    assert await errno_of(lab.dev.boot()) == errno.EINVAL
    assert (lab.words, lab.ops.calls) == (before, calls)


async def test_cosm_19_boot_with_firmware_not_ready_resets_first() -> None:
    """T4: an implicit reset; ready again: the boot goes on."""
    lab = Lab()
    lab.ops.is_ready = False
    await lab.boot()
    assert (lab.ops.calls, lab.dev.state) == (["reset", "start"], S.BOOTING)


async def test_cosm_19_38_implicit_reset_that_fails_is_reset_failed_and_einval() -> None:
    """T4: firmware silent for 45 looks: reset_failed, and the write fails with EINVAL."""
    lab = Lab()
    lab.ops.is_ready, lab.ops.polls = False, -1
    writer = asyncio.ensure_future(errno_of(lab.boot()))
    await lab.clock.advance(60)
    assert await writer == errno.EINVAL
    assert lab.words == ["reset_failed"]


async def test_cosm_20_card_that_never_connects_stays_booting() -> None:
    """No boot time-out: a day later still booting; shutdown EINVAL, reset works."""
    lab = Lab()
    await lab.boot()
    await lab.clock.advance(86400)
    assert lab.seen == ("booting", "nop")
    assert await errno_of(lab.dev.shutdown()) == errno.EINVAL
    await lab.dev.reset()
    await settle()
    assert lab.seen == ("ready", "nop")


async def test_cosm_28_31_shutdown_asks_the_card_and_poweroff_comes_with_the_hang_up() -> None:
    """Message id 0; shutting_down when the write returns; nop until the endpoint closes; then poweroff, no reset."""
    lab = Lab()
    ep = await lab.online()
    await lab.dev.shutdown()
    assert (ep.sent[-1]["id"], lab.seen) == (C_SHUTDOWN, ("shutting_down", "nop"))
    ep.say(message("SHUTDOWN_STATUS", Status.POWEROFF))
    await settle()
    assert lab.seen == ("shutting_down", "nop")
    ep.hang_up()
    await settle()
    assert lab.seen == ("shutting_down", "poweroff")
    await lab.clock.advance(3600)
    assert (lab.seen, ep.closed) == (("shutting_down", "poweroff"), True)


@pytest.mark.parametrize("state", [s for s in S if s is not S.ONLINE])
async def test_cosm_29_shutdown_outside_online_is_einval(state: State) -> None:
    """T13: EINVAL, no change."""
    lab = Lab()
    await lab.goto(state)
    before = list(lab.words)
    request = asyncio.ensure_future(errno_of(lab.dev.shutdown()))
    await settle()
    if lab.ops.gate:  # resetting: serialised behind the reset
        lab.ops.gate.set()
    assert await request == errno.EINVAL
    assert lab.words[: len(before)] == before
    assert "shutting_down" not in lab.words[len(before) :]


async def test_cosm_30_48_shutdown_without_connection_is_enotconn() -> None:
    """A hang-up without status leaves the card online; shutdown is then ENOTCONN."""
    lab = Lab()
    ep = await lab.online()
    ep.hang_up()
    await settle()
    assert lab.seen == ("online", "nop")
    assert await errno_of(lab.dev.shutdown()) == errno.ENOTCONN
    assert lab.seen == ("online", "nop")


async def test_cosm_28_failed_send_is_the_sends_errno_and_no_change() -> None:
    """T12."""
    lab = Lab()
    ep = await lab.online()
    ep.send_error = ScifError(errno.ECONNRESET, "gone")
    with pytest.raises(ScifError) as e:
        await lab.dev.shutdown()
    assert (e.value.errno, lab.seen) == (errno.ECONNRESET, ("online", "nop"))


async def test_cosm_28_32_card_that_goes_down_while_it_is_asked_to() -> None:
    """Its own status overtakes the message: the writer has what it wanted, and the status is the card's."""
    lab = Lab()
    ep = await lab.online()
    send = ep.send

    async def slowly(data: bytes) -> int:
        ep.say(message("SHUTDOWN_STATUS", Status.HALTED))
        await settle()
        return await send(data)

    ep.send = slowly  # type: ignore[method-assign]
    assert await errno_of(lab.dev.shutdown()) == 0
    assert (lab.seen, lab.words) == (("shutting_down", "nop"), ["booting", "online", "shutting_down"])
    ep.hang_up()
    await settle()
    assert lab.seen == ("shutting_down", "halted")


async def test_cosm_60_card_that_does_not_read_cannot_hold_the_lock() -> None:
    """A full ring: shutdown ends with a time-out and a reset works."""
    lab = Lab()
    ep = await lab.online()
    ep.blocked = True
    request = asyncio.ensure_future(lab.dev.shutdown())
    for _ in range(5):  # the card still sends: it is not silent, it only does not read
        await lab.clock.advance(9)
        ep.say(message("HEARTBEAT"))
    with pytest.raises(TimeoutError):
        await request
    assert lab.dev.state is S.ONLINE
    await lab.dev.reset()
    await settle()
    assert lab.dev.state is S.READY


@pytest.mark.parametrize("status", [Status.HALTED, Status.POWEROFF, Status.RESTART])
async def test_cosm_32_card_initiated_ends(status: Status) -> None:
    """halted, poweroff and restart, each through shutting_down."""
    lab = Lab()
    ep = await lab.online()
    await lab.run_down(ep, status)
    assert (lab.seen, lab.words[-1]) == (("shutting_down", status.word), "shutting_down")


async def test_cosm_33_53_card_that_ignores_shutdown_stays_for_ever_and_is_no_crash() -> None:
    """The watchdog is off during shutdown; no time-out in the state machine."""
    lab = Lab()
    await lab.goto(S.SHUTTING_DOWN)
    await lab.clock.advance(86400)
    assert (lab.seen, lab.dev.watchdog) == (("shutting_down", "nop"), False)


@pytest.mark.parametrize("value", [0, 5, 6, 255, 1 << 63, (1 << 64) - 1])
async def test_cosm_34_status_out_of_range_is_ignored(value: int) -> None:
    """T15: logged, no change at all, also not of what is published at the end."""
    lab = Lab()
    ep = await lab.online()
    ep.say(message("SHUTDOWN_STATUS", value))
    await settle()
    assert lab.seen == ("online", "nop")
    assert lab.dev.watchdog
    ep.hang_up()
    await settle()
    assert lab.seen == ("online", "nop")
    assert "shutdown status out of range" in lab.records.texts("warning")


@pytest.mark.parametrize("status", list(Status)[1:])
async def test_cosm_35_every_reset_ends_with_nop_before_ready_is_announced(status: Status) -> None:
    """Who is woken for ready never reads the old status."""
    lab = Lab()
    ep = await lab.online()
    await lab.run_down(ep, status)
    at_ready: list[str] = []
    lab.dev.on_state.append(
        lambda: lab.dev.state is S.READY and at_ready.append(lab.dev.shutdown_status.word)
    )
    await lab.dev.reset()
    await settle()
    assert (lab.seen, at_ready) == (("ready", "nop"), ["nop"])


@pytest.mark.parametrize("force", [False, True])
async def test_cosm_35_reset_that_fails_ends_with_nop_too(force: bool) -> None:
    """The old status says nothing of a card whose firmware is silent."""
    lab = Lab()
    await lab.run_down(await lab.online(), Status.HALTED)
    lab.ops.polls = -1
    reset = asyncio.ensure_future(lab.dev.stop(force=True) if force else lab.dev.reset())
    await lab.clock.advance(60)
    await reset
    assert lab.seen == ("reset_failed", "nop")


async def test_cosm_36_reset_in_ready_is_einval() -> None:
    """T20."""
    lab = Lab()
    assert await errno_of(lab.dev.reset()) == errno.EINVAL
    assert lab.words == []


async def test_cosm_36_39_reset_from_reset_failed_tears_down_no_second_time() -> None:
    """The stop operation runs once: at the reset that failed."""
    lab = Lab()
    await lab.goto(S.RESET_FAILED)
    assert lab.ops.calls == ["start", "stop", "reset"]
    await lab.dev.reset()
    await settle()
    assert (lab.ops.calls, lab.dev.state) == (["start", "stop", "reset", "reset"], S.READY)


async def test_cosm_37_reset_returns_before_it_is_finished() -> None:
    """The write returns in resetting."""
    lab = Lab()
    await lab.online()
    lab.ops.polls = 3
    await lab.dev.reset()
    assert lab.dev.state is S.RESETTING
    await settle()
    assert lab.dev.state is S.RESETTING
    await lab.clock.advance(4)
    assert lab.dev.state is S.READY


@pytest.mark.parametrize(("polls", "end"), [(44, S.READY), (45, S.RESET_FAILED)])
async def test_cosm_38_firmware_has_45_looks(polls: int, end: State) -> None:
    """Ready at the 45th look is in time, later is reset_failed; boot is then EINVAL, reset leaves it."""
    lab = Lab()
    await lab.online()
    lab.ops.polls = polls
    await lab.dev.reset()
    await lab.clock.advance(43.5)
    assert lab.dev.state is S.RESETTING
    await lab.clock.advance(2)
    assert lab.dev.state is end
    if end is S.RESET_FAILED:
        assert await errno_of(lab.dev.boot()) == errno.EINVAL
        lab.ops.polls = 0
        await lab.dev.reset()
        await settle()
        assert lab.dev.state is S.READY


@pytest.mark.parametrize("state", list(S))
async def test_cosm_40_forced_reset_works_in_every_state(state: State) -> None:
    """T22: synchronous, ends ready, tears down only what was started."""
    lab = Lab()
    await lab.goto(state)
    stops = lab.ops.calls.count("stop")
    if lab.ops.gate:
        lab.ops.gate.set()
    await lab.dev.stop(force=True)
    assert lab.seen == ("ready", "nop")
    started = state in (S.BOOTING, S.ONLINE, S.SHUTTING_DOWN)
    assert lab.ops.calls.count("stop") == stops + started
    assert lab.ops.calls[-1] == "reset"


async def test_cosm_54_55_reset_of_a_dead_card_needs_no_cooperation() -> None:
    """The card is gone without a message: stop, reset, ready; its endpoint is closed."""
    lab = Lab()
    ep = await lab.online()
    await lab.clock.advance(41)
    assert lab.seen == ("shutting_down", "crashed")
    await lab.dev.reset()
    await settle()
    assert (lab.seen, ep.closed, lab.dev.connected) == (("ready", "nop"), True, False)


async def test_cosm_38_60_stop_operation_that_fails_does_not_trap_the_card() -> None:
    """Whatever goes wrong in the tear-down is logged; the reset goes on."""
    lab = Lab()
    await lab.online()
    lab.ops.fail_stop = RuntimeError("broken")
    await lab.dev.reset()
    await settle()
    assert lab.dev.state is S.READY
    assert any("broken" in t for t in lab.records.texts("error"))


async def test_cosm_10_strings_survive_reset_and_crash_and_count_at_the_next_boot() -> None:
    """Changed while online: the running card is not touched, the next boot uses them."""
    lab = Lab()
    await lab.online()
    lab.dev.firmware, lab.dev.ramdisk, lab.dev.cmdline = "other.img", "other.cpio", "quiet"
    await lab.clock.advance(41)
    await lab.dev.reset()
    await settle()
    await lab.dev.boot()
    first, second = lab.ops.requests
    assert (first.firmware, first.ramdisk, first.cmdline) == ("mic/uos.img", "", "")
    assert (second.firmware, second.ramdisk, second.cmdline) == ("other.img", "other.cpio", "quiet")


@pytest.mark.parametrize("state", list(S))
async def test_cosm_59_suspend_resets_what_runs_and_is_never_refused(state: State) -> None:
    """T23, T24: booting, online, shutting_down end ready; the others are left alone; nothing boots by itself."""
    lab = Lab()
    await lab.goto(state)
    calls = len(lab.ops.calls)
    await lab.dev.suspend()
    runs = state in (S.BOOTING, S.ONLINE, S.SHUTTING_DOWN)
    assert lab.ops.calls[calls:] == (["stop", "reset"] if runs else [])
    assert lab.dev.state is (S.READY if runs else state)
    await lab.clock.advance(3600)
    assert "start" not in lab.ops.calls[calls:]


async def test_cosm_47_56_messages_that_change_no_state_wake_nobody() -> None:
    """T8, T14: a client that connects again while online, a status while the card is shutting down."""
    lab = Lab()
    ep = await lab.online()
    ep.hang_up()
    await settle()
    again = await lab.connect()
    assert lab.seen == ("online", "nop")
    assert (lab.wakes, lab.dev.changes) == (2, 2)  # booting, online
    await lab.dev.shutdown()
    await lab.run_down(again, Status.POWEROFF)
    assert lab.seen == ("shutting_down", "poweroff")
    assert (lab.wakes, lab.dev.changes) == (3, 3)


async def test_cosm_56_57_state_changes_wake_and_the_last_one_is_never_lost() -> None:
    """One wake per state set, none for a status alone; the count tells a late waiter that it missed some."""
    lab = Lab()
    ep = await lab.online()
    assert (lab.wakes, lab.dev.changes) == (2, 2)
    await lab.run_down(ep, Status.HALTED)
    assert lab.wakes == 3  # shutting_down; publishing halted wakes nobody
    seen = lab.dev.changes
    await lab.dev.reset()
    await settle()
    assert (lab.dev.changes - seen, lab.dev.state) == (2, S.READY)
