"""Backends while the card is stopped, and backends with much to say."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from life import in_loop

from mic_emu.clock import Clock
from mic_emu.errors import StateError
from mic_emu.host.running import Running
from mic_emu.host.supervisor import Backend, Supervisor
from mic_emu.log import Log


@pytest.fixture
def log() -> Iterator[Log]:
    fd = os.open(os.devnull, os.O_WRONLY)
    yield Log(fd)
    os.close(fd)


class NoProcesses:
    """A backend's process that starts for ever."""

    async def start(self, *args: Any) -> int:
        await asyncio.get_running_loop().create_future()
        raise AssertionError


class Vop:
    """Takes configurations when it is let."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.go_on = asyncio.Event()

    async def config_change(self, device: Any, config: bytes) -> bool:
        self.seen.append(config)
        await self.go_on.wait()
        return True


def supervisor(log: Log, vop: Any = None) -> Supervisor:
    return Supervisor("mic0", NoProcesses(), vop, [], "always", Clock("test"), log, lambda: None)  # type: ignore[arg-type]


@in_loop
async def test_hot_plug_of_a_card_that_is_stopped_meanwhile(log: Log) -> None:
    """Whoever waits for the device hears that the card went down, at once and as a sentence."""
    changed = asyncio.Condition()

    async def until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
        async with changed:
            await asyncio.wait_for(changed.wait_for(condition), 20)

    running = Running.__new__(Running)
    running.card = SimpleNamespace(  # type: ignore[assignment]
        name="mic0", clock=Clock("test"), until=until, not_online=lambda: StateError("mic0 is resetting"),
    )  # fmt: skip
    running.supervisor, running.stopped = supervisor(log), False
    plugging = asyncio.ensure_future(running._bring_up(Backend("block", "block1", {}, [])))
    while not running.supervisor.backends:
        await asyncio.sleep(0)
    running.stopped = True
    await running.supervisor.stop()
    async with changed:
        changed.notify_all()
    with pytest.raises(StateError, match="resetting"):
        await asyncio.wait_for(plugging, 20)


@in_loop
async def test_removal_of_what_a_stop_has_removed(log: Log) -> None:
    """Two who take a device away, the second finds it gone."""
    made = supervisor(log)
    backend = Backend("block", "block1", {}, [])
    made.add(backend)
    await asyncio.sleep(0)
    await made.stop()
    await made.remove(backend)
    assert made.backends == []


@in_loop
async def test_configurations_that_come_faster_than_a_card_takes_them(log: Log) -> None:
    """A window that is dragged while the card hangs: the card hears of the first size and of the last."""
    vop = Vop()
    made = supervisor(log, vop)
    backend = Backend("console", "console", {}, [])
    backend.device = SimpleNamespace()  # type: ignore[assignment]
    for n in range(5):
        await made._message(backend, None, {"op": "config", "config": f"{n:02x}"})  # type: ignore[arg-type]
        await asyncio.sleep(0)
    vop.go_on.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert vop.seen == [b"\0", b"\4"]
