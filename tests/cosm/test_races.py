"""Several requests to one card at once, and those who watch it (COSM 2.4)."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest
from lab import Lab, errno_of

from mic_emu.cosm.states import State
from mic_emu.host.sysfs import watch_states
from mic_emu.testing.cosm import FakeConnection, settle

S = State


async def test_cosm_22_two_simultaneous_boot_writers_one_wins() -> None:
    """Exactly one succeeds, the other gets EINVAL."""
    lab = Lab()
    lab.ops.gate = asyncio.Event()
    writers = [asyncio.ensure_future(errno_of(lab.boot())) for _ in range(2)]
    await settle()
    lab.ops.gate.set()
    assert sorted(await asyncio.gather(*writers)) == [0, errno.EINVAL]
    assert lab.ops.calls == ["start"]


async def test_cosm_23_reset_while_booting_refuses_the_late_connection() -> None:
    """resetting, then ready; a late connection of the old boot is closed and changes nothing."""
    lab = Lab()
    await lab.boot()
    lab.ops.gate = asyncio.Event()
    await lab.dev.reset()
    late = FakeConnection(lab.clock)
    adopting = asyncio.ensure_future(lab.dev.adopt(late))
    await settle()
    lab.ops.gate.set()
    await adopting
    await settle()
    assert late.closed
    assert lab.words == ["booting", "resetting", "ready"]


async def test_cosm_24_reset_while_resetting_succeeds_and_is_no_second_reset() -> None:
    """T19."""
    lab = Lab()
    await lab.goto(S.RESETTING)
    await lab.dev.reset()
    assert lab.ops.gate
    lab.ops.gate.set()
    await settle()
    assert (lab.ops.calls.count("reset"), lab.dev.state) == (1, S.READY)


async def test_cosm_24_two_writers_of_reset_behind_a_boot_are_one_reset() -> None:
    """Both waited for the start; the second finds a reset under way, succeeds and adds nothing to it."""
    lab = Lab()
    lab.ops.gate = asyncio.Event()
    boot = asyncio.ensure_future(lab.boot())
    await settle()
    resets = [asyncio.ensure_future(errno_of(lab.dev.reset())) for _ in range(2)]
    await settle()
    lab.ops.gate.set()
    await boot
    assert await asyncio.gather(*resets) == [0, 0]
    await settle()
    assert (lab.ops.calls, lab.words) == (["start", "stop", "reset"], ["booting", "resetting", "ready"])


async def test_cosm_25_boot_behind_a_reset_that_has_not_begun_is_einval() -> None:
    """COSM 2.4: the state is resetting, the reset's work has not taken the lock: refused, the hardware untouched."""
    lab = Lab()
    await lab.online()
    await lab.dev.reset()
    assert (lab.seen, lab.ops.calls) == (("resetting", "nop"), ["start"])
    assert await errno_of(lab.dev.boot()) == errno.EINVAL
    await settle()
    assert (lab.seen, lab.ops.calls) == (("ready", "nop"), ["start", "stop", "reset"])


async def test_cosm_23_25_reset_while_start_runs_waits_and_resets_from_booting() -> None:
    """COSM 2.4: the reset's writer waits until start has finished."""
    lab = Lab()
    lab.ops.gate = asyncio.Event()
    boot = asyncio.ensure_future(lab.boot())
    await settle()
    reset = asyncio.ensure_future(lab.dev.reset())
    await settle()
    assert not reset.done()
    lab.ops.gate.set()
    await asyncio.gather(boot, reset)
    await settle()
    assert lab.words == ["booting", "resetting", "ready"]


@pytest.mark.parametrize("first", ["shutdown", "reset"])
async def test_cosm_26_shutdown_and_reset_at_once_end_ready(first: str) -> None:
    """No deadlock, at most one writer sees an error, the card ends ready."""
    lab = Lab()
    await lab.online()
    requests = {"shutdown": lab.dev.shutdown, "reset": lab.dev.reset}
    order = [first, next(n for n in requests if n != first)]
    results = await asyncio.gather(*(errno_of(requests[n]()) for n in order))
    await settle()
    assert lab.seen == ("ready", "nop")
    assert results == ([0, 0] if first == "shutdown" else [0, errno.EINVAL])


async def test_cosm_27_reads_do_not_wait_for_a_long_reset() -> None:
    """State and status are plain values: readable while the lock is held for 46 s."""
    lab = Lab()
    await lab.online()
    lab.ops.polls = 44
    await lab.dev.reset()
    await settle()
    for _ in range(43):
        assert lab.seen == ("resetting", "nop")
        await lab.clock.advance(1)
    await lab.clock.advance(2)
    assert lab.seen == ("ready", "nop")


async def test_cosm_57_watcher_that_is_slow_hears_the_last_state() -> None:
    """The card boots and comes online while the state before is on its way to the watcher: it misses booting, and hears
    online without a further change."""
    lab = Lab()
    told: list[dict[str, Any]] = []

    class Channel:
        async def send(self, state: dict[str, Any]) -> None:
            told.append(state)
            if len(told) == 1:
                await lab.online()

    instance = SimpleNamespace(
        cards={"mic0": SimpleNamespace(name="mic0", cosm=lab.dev)}, card_watchers=set()
    )
    gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    watcher = asyncio.ensure_future(watch_states(instance, Channel(), gone))  # type: ignore[arg-type]
    await settle(100)
    assert told == [
        {"card": "mic0", "changes": 0, "state": "ready"}, {"card": "mic0", "changes": 2, "state": "online"},
    ]  # fmt: skip
    gone.set_result(None)
    await asyncio.wait_for(watcher, 10)
    await lab.dev.shutdown()
    assert (len(told), len(lab.dev.on_state)) == (2, 1)  # the lab's own
