"""The control socket: what a client may do to the host process, and what it hears."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mic_emu.errors import MicemuError, NoSuchCard, StateError, WaitTimeout
from mic_emu.host import admin, daemon, metrics
from mic_emu.host.control import Control
from mic_emu.wire import Channel
from mic_emu.wire_aio import AsyncChannel


def control(**instance: Any) -> Control:
    """One without an emulator behind it."""
    return Control(SimpleNamespace(cards={}, card_watchers=set(), status=dict, **instance))  # type: ignore[arg-type]


def open_fds() -> set[str]:
    gc.collect()
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.mark.parametrize("request_", [{"op": "events"}, {"op": "sysfs_watch"}])
def test_descriptors_of_a_listener_are_not_kept(request_: dict[str, Any]) -> None:
    """Who follows events may say more, with descriptors: that is the end of it, and they are closed."""

    async def main() -> None:
        before = open_fds()
        ours, theirs = socket.socketpair()
        with Channel(ours) as client, open(os.devnull) as null:
            channel = AsyncChannel(theirs)
            serving = asyncio.ensure_future(control()._serve(channel))
            client.send(request_)
            client.send({"more": True}, [null.fileno()] * 50)
            await asyncio.wait_for(serving, 20)
            channel.close()
        assert open_fds() == before

    asyncio.run(main())


@pytest.mark.parametrize(
    "kinds", [(WaitTimeout, MicemuError), (NoSuchCard, StateError), (StateError, WaitTimeout)]
)
def test_errors_of_several_cards_are_told_together(
    kinds: tuple[type[MicemuError], type[MicemuError]],
) -> None:
    """The kind and the errno of the first one, the sentences of both, whatever kinds they are."""
    errors = {name: kind(f"{name} fails") for name, kind in zip(("mic0", "mic1"), kinds, strict=True)}

    async def action(name: Any) -> None:
        raise errors[name]

    async def main() -> None:
        with pytest.raises(kinds[0], match=r"^mic0 fails; mic1 fails$") as caught:
            await control(select=lambda names: list(errors))._each([], action)
        assert caught.value.errno == kinds[0]("x").errno

    asyncio.run(main())


def test_one_error_is_told_as_it_is() -> None:
    """Also one that is no sentence of ours."""

    async def action(name: Any) -> None:
        if name == "mic1":
            raise OSError(errno.EIO, "mic1 fails")

    async def main() -> None:
        with pytest.raises(OSError, match="mic1 fails"):
            await control(select=lambda names: ["mic0", "mic1"])._each([], action)

    asyncio.run(main())


def test_scrape_that_is_not_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the metrics and does not take them keeps neither a descriptor nor the text."""
    monkeypatch.setattr(admin, "SCRAPE_LIMIT_S", 0.1, raising=False)

    async def render(instance: Any) -> str:
        return "x" * (8 << 20)

    monkeypatch.setattr(metrics, "render", render)

    async def main() -> None:
        path = str(tmp_path / "metrics.sock")
        server = await asyncio.start_unix_server(control()._admin._scrape, path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            before = len(os.listdir("/proc/self/fd"))
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while len(os.listdir("/proc/self/fd")) <= before:  # it is accepted
                await asyncio.sleep(0.001)
            deadline = time.monotonic() + 20
            while len(os.listdir("/proc/self/fd")) > before:
                assert time.monotonic() < deadline, "the connection is kept"
                await asyncio.sleep(0.01)  # between two looks, bounded by the deadline
        server.close()

    asyncio.run(main())


def test_uptime_is_not_the_wall_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back or forth, as at boot without a battery, changes nothing."""
    instance = daemon.Instance.__new__(daemon.Instance)
    now = time.monotonic()
    instance._began, instance.started = now - 100, time.time() + 10**6
    instance.rundir = SimpleNamespace(instance="x")  # type: ignore[assignment]
    instance.node = SimpleNamespace(node_ids=list, endpoints={})  # type: ignore[assignment]
    instance.cards = {}
    (up,) = [value for name, _, value in metrics.samples(instance) if name == "micemu_uptime_seconds"]
    assert 100 <= up < 10**5
