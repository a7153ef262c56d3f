"""Waiting with a limit: who is cancelled is cancelled, in whichever moment."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mic_emu.clock import Clock, wait_for
from mic_emu.host.spawn import Spawner
from mic_emu.wire import Channel, connect_unix
from mic_emu.wire_aio import AsyncChannel, serve_unix

LIMIT_S = 20.0


async def turns(count: int) -> None:
    """Let what is ready run, so often."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("of_a_clock", [False, True])
async def test_a_cancellation_as_the_work_ends_is_none_the_less_one(turn: int, of_a_clock: bool) -> None:
    """asyncio.wait_for of Python 3.11 returns the result then, and nobody hears of the cancellation."""
    clock = Clock("x100")
    event = asyncio.Event()
    within: Callable[[Awaitable[bool]], Awaitable[bool]] = (
        (lambda work: clock.within(work, LIMIT_S, "the event"))
        if of_a_clock
        else (lambda work: wait_for(work, LIMIT_S))
    )

    async def rounds() -> None:
        while True:
            await within(event.wait())
            event.clear()

    task = asyncio.ensure_future(rounds())
    await turns(4)
    event.set()
    await turns(turn)
    task.cancel()
    await asyncio.wait({task}, timeout=LIMIT_S)
    assert task.cancelled()


async def test_the_time_out_ends_the_work_and_its_last_word_counts() -> None:
    """As asyncio.wait_for: the work is cancelled and has ended when the caller hears of the time-out."""
    ended = []

    async def work(result: str) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(result)
            if not result:
                raise
        return result

    with pytest.raises(asyncio.TimeoutError):
        await wait_for(work(""), 0.01)
    assert await wait_for(work("all the same"), 0.01) == "all the same"
    assert ended == ["", "all the same"]
    assert await wait_for(asyncio.sleep(0, "at once"), None) == "at once"
    with pytest.raises(ZeroDivisionError):
        await wait_for(asyncio.to_thread(lambda: 1 // 0), LIMIT_S)


@pytest.mark.parametrize("turn", range(6))
async def test_a_server_closes_also_in_the_moment_in_which_a_client_takes_its_answer(
    tmp_path: Path, turn: int
) -> None:
    """Its handler waits for ever for the next request; nobody may wait for that."""

    async def handler(channel: AsyncChannel) -> None:
        while True:
            await channel.recv(None, "a request")
            await channel.send({"x": "y" * (4 << 20)})

    server = await serve_unix(str(tmp_path / "sock"), handler)
    loop = asyncio.get_running_loop()
    with Channel(connect_unix(str(tmp_path / "sock"))) as client:
        client.send({"op": "much"})
        client.sock.setblocking(False)
        await loop.sock_recv(client.sock, 1)
        client.sock.recv(4 << 20)  # room for more of its answer
        await turns(turn)
        closing = asyncio.ensure_future(server.close())
        await asyncio.wait({closing}, timeout=LIMIT_S)
        assert closing.done()


async def test_a_process_that_nobody_waits_for_any_more_leaves_no_word() -> None:
    """The next process may get its number."""
    ours, inits = map(AsyncChannel, socket.socketpair())
    async with ours, inits:
        spawner = Spawner(ours)
        serve = asyncio.ensure_future(spawner.serve())
        ends: list[int] = []
        first = asyncio.ensure_future(spawner.start("net", "mic0-net", {}, [], ends.append))
        asked = await inits.recv_words(LIMIT_S, "the first request")
        await inits.send({"spawned": 7, "id": asked["id"]})
        while spawner._waiting:
            await turns(1)
        first.cancel()
        await asyncio.wait({first}, timeout=LIMIT_S)
        await inits.send({"exited": 7, "status": -9})
        second = asyncio.ensure_future(spawner.start("net", "mic0-net", {}, [], ends.append))
        asked = await inits.recv_words(LIMIT_S, "the second request")
        await inits.send({"spawned": 7, "id": asked["id"]})
        assert await second == 7
        assert first.cancelled()
        assert not ends
        serve.cancel()
