"""A card that cannot be plugged in, a board that does not live: everything is given back, nothing is tried for ever."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from bootlab import in_loop

from mic_emu.clock import Clock
from mic_emu.config import CardConfig
from mic_emu.errors import MicemuError
from mic_emu.host import board, daemon, spawn
from mic_emu.host.board import Board
from mic_emu.host.card import Card
from mic_emu.host.spawn import Spawner
from mic_emu.log import Log
from mic_emu.memory import PageAllocator, create_shm
from mic_emu.wire import Channel
from mic_emu.wire_aio import AsyncChannel

FAULT = {"kind": "packet-loss"}


def open_fds() -> set[str]:
    gc.collect()
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


class Boards(Spawner):
    """Starts no process: ``says`` is what a board says before it waits for its channel's end."""

    def __init__(
        self, says: dict[str, Any] | None = None, *, dies: bool = False, refuses: bool = False
    ) -> None:
        self.says, self.dies, self.refuses = says, dies, refuses
        self.started = 0
        self.on_exit: Callable[[int], None] = lambda status: None

    async def start(
        self, kind: str, name: str, args: dict[str, Any], fds: Sequence[int], on_exit: Callable[[int], None]
    ) -> int:
        self.started += 1
        if self.refuses or self.started > 20:
            raise MicemuError("cannot start a process: Resource temporarily unavailable", errno.EAGAIN)
        self.on_exit = on_exit
        if self.dies:
            on_exit(70)
        elif self.says:
            with Channel(socket.socket(fileno=os.dup(fds[0]))) as channel:
                channel.send(self.says)
        return 1 << 22


@pytest.mark.parametrize(
    ("boards", "faults", "why"),
    [
        (Boards(refuses=True), 0, "cannot start a process"),
        (Boards(dies=True), 0, "ended with status 70 before it had power"),
        (Boards(), 0, "does not say that it has power"),
        (Boards({"event": "no_memory", "errno": errno.ENOSPC, "why": "no room"}), 0, "no room"),
        (Boards({"event": "power_on"}), 40, "fault filters already"),
    ],
)
@in_loop
async def test_a_card_that_cannot_be_plugged_in_leaves_nothing(
    boards: Boards, faults: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors, readers of the loop, tasks and pages of host memory are as before: it may be tried again for months."""
    monkeypatch.setattr(board, "POWER_ON_LIMIT_S", 0.1)
    host_fd = create_shm("plug-host", 64 << 20)
    pages = PageAllocator(host_fd, 1 << 20, 64 << 20)
    null = os.open(os.devnull, os.O_WRONLY)
    config = CardConfig(memory=64 << 20, fault=[FAULT] * faults)
    for attempt in range(2):  # the first may load modules
        before = open_fds()
        card = Card(0, config, tmp_path, boards, cast("Any", None), pages, Clock("test"), Log(null))
        with pytest.raises((MicemuError, OSError), match=why):
            await card.open(host_fd)
        await asyncio.sleep(0)
        del card
        if attempt:
            assert open_fds() == before
    assert len(asyncio.all_tasks()) == 1
    assert pages.used_bytes == 0
    os.close(host_fd)
    os.close(null)


@in_loop
async def test_boards_that_do_not_live_are_not_forked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which the board ends at once, for want of threads say, is not kept busy with more of them."""
    monkeypatch.setattr(board, "SUCCESSORS_S", (0.0,) * len(board.SUCCESSORS_S))
    boards = Boards({"event": "power_on"})
    null = os.open(os.devnull, os.O_WRONLY)
    made = Board(0, CardConfig(), tmp_path, "test", boards, [], Log(null))
    await made.power_on()
    replaced = asyncio.Event()
    made.replaced = replaced.set
    boards.dies = True
    boards.on_exit(-9)
    await asyncio.wait_for(replaced.wait(), 20)
    assert boards.started == 1 + len(board.SUCCESSORS_S)
    assert made.pid == 0
    made.keep_off()
    await made.close()
    os.close(null)


async def pair() -> tuple[Spawner, AsyncChannel, asyncio.Task[None]]:
    """The host process's side, init's end of the channel, and what serves it."""
    ours, theirs = socket.socketpair()
    spawner = Spawner(AsyncChannel(ours))
    return spawner, AsyncChannel(theirs), asyncio.ensure_future(spawner.serve())


@in_loop
async def test_a_process_that_nobody_waits_for_is_not_taken_for_a_later_one() -> None:
    """Numbers of processes come again: that one of a start that was given up had ended says nothing of the next."""
    spawner, init, serving = await pair()
    seen: list[int] = []
    given_up = asyncio.ensure_future(spawner.start("block", "a", {}, [], seen.append))
    request = await init.recv_words(20, "the request")
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    await init.send({"spawned": 77, "id": request["id"]})
    await init.send({"exited": 77, "status": 0})
    again = asyncio.ensure_future(spawner.start("block", "b", {}, [], seen.append))
    request = await init.recv_words(20, "the request")
    await init.send({"spawned": 77, "id": request["id"]})
    assert await asyncio.wait_for(again, 20) == 77
    assert seen == []
    await init.send({"exited": 77, "status": 3})
    while not seen:
        await asyncio.sleep(0)
    assert seen == [3]
    serving.cancel()
    init.close()


@in_loop
async def test_an_init_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a process hears why there is none, and goes on."""
    monkeypatch.setattr(spawn, "START_LIMIT_S", 0.05)
    spawner, init, serving = await pair()
    with pytest.raises(MicemuError, match=r"cannot start mic0-net: init does not answer within 0\.05 s"):
        await spawner.start("net", "mic0-net", {}, [], lambda status: None)
    init.close()
    with pytest.raises(MicemuError, match="cannot start mic0-net: "):
        await spawner.start("net", "mic0-net", {}, [], lambda status: None)
    serving.cancel()


def test_the_ready_pipe_is_written_to_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that fails later tells its log; the pipe's number is another file's by then."""
    other = tmp_path / "other"
    read, write = os.pipe()
    ours, theirs = socket.socketpair()

    async def serve(args: Any, init: Any, ready: Any, log: Any) -> None:
        os.close(ready) if isinstance(ready, int) else ready.close()
        assert os.open(other, os.O_WRONLY | os.O_CREAT) == write
        raise RuntimeError("much later")

    monkeypatch.setattr(daemon, "serve", serve)
    null = os.open(os.devnull, os.O_WRONLY)
    with pytest.raises(RuntimeError):
        daemon.main({"log_fd": null}, [theirs.detach(), write])
    assert other.read_bytes() == b""
    assert os.read(read, 100) == b""
    for fd in (null, read, write):
        os.close(fd)
    ours.close()
