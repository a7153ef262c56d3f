"""Programs that have a device file open and mean no good, or do not answer: the host and the card's stop go on."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest
from life import BOOT, TYPE, VERSION_1, Life, in_loop, manual

from mic_emu.dma import DmaChannel
from mic_emu.host.vop_dma import ProgramDma
from mic_emu.host.vop_files import RELEASE_LIMIT, VopFiles
from mic_emu.wire_aio import AsyncChannel

ADD = {
    "op": "add",
    "type": TYPE,
    "num_vq": 1,
    "num": 8,
    "features": VERSION_1,
    "config": "",
    "feature_len": 8,
}


@asynccontextmanager
async def opened(files: VopFiles) -> AsyncIterator[tuple[AsyncChannel, asyncio.Task[None]]]:
    """A program's end of an open file, greeted; and what serves it."""
    ours, theirs = socket.socketpair()
    async with AsyncChannel(ours) as program, AsyncChannel(theirs) as channel:
        serving = asyncio.ensure_future(files.serve(channel))
        await program.recv_words(20, "the greeting")
        try:
            yield program, serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize(
    "words",
    [
        {"type": 1.0}, {"type": "1"}, {"num_vq": True}, {"num_vq": 1.0}, {"num": 8.0}, {"features": "x"}, {"features": None},
        {"feature_len": 8.0},
    ],
)  # fmt: skip
@in_loop
async def test_numbers_that_are_none_cost_nothing(words: dict[str, Any]) -> None:
    """EINVAL, and neither a vector nor a page is missing afterwards: there are nine vectors."""
    with Life() as life:
        files = VopFiles(life.host, "modern", life.log)
        async with opened(files) as (program, serving):
            before = life.memory.used_bytes, life.smpt.mapped_bytes
            await program.send({**ADD, **words})
            assert (await program.recv_words(20, "the refusal"))["errno"] == errno.EINVAL
            assert (life.memory.used_bytes, life.smpt.mapped_bytes) == before
            assert [users for *_, users in life.irq.rows() if users] == []
            await program.send(ADD)
            assert "slot" in await program.recv_words(20, "the device")
            assert not serving.done()


@pytest.mark.parametrize(
    "nonsense", [{"op": "add"}, {**ADD, "config": "x"}, {**ADD, "config": 5}, {"op": "config"}, {"op": []}]
)
@in_loop
async def test_nonsense_ends_the_connection(nonsense: dict[str, Any]) -> None:
    """The file is closed and the log says why; it is nobody's exception."""
    with Life() as life:
        files = VopFiles(life.host, "modern", life.log)
        async with opened(files) as (program, serving):
            await program.send(nonsense)
            if nonsense != {"op": []}:  # an operation that there is not is passed over
                await asyncio.wait_for(asyncio.wait({serving}), 20)
                assert serving.exception() is None
                assert "nonsense" in life.records[-1]["message"]
            else:
                await program.send(ADD)
                assert "slot" in await program.recv_words(20, "the device")


@in_loop
async def test_changes_of_a_configuration_do_not_pile_up() -> None:
    """Each holds up everybody else's devices for as long as a card does not answer: a program has one at a time."""
    clock = manual()
    with Life(clock) as life:
        files = VopFiles(life.host, "modern", life.log)
        async with opened(files) as (program, serving):
            await program.send({**ADD, "config": "00"})
            await program.recv_words(20, "the device")
            BOOT.put(life.page, 0, "h2c_config_db", 3)  # somebody listens, and never answers
            for _ in range(3):
                await program.send({"op": "config", "config": "01"})
            life.host.peer_alive = lambda: False  # what follows is not about the card's answers
            life.host.peer_died()
            await clock.advance(1)
            await asyncio.wait_for(asyncio.wait({serving}), 20)
            assert serving.exception() is None
            assert any("under way" in r["message"] for r in life.records)


@in_loop
async def test_vop_55_a_stop_waits_once_for_all_silent_programs() -> None:
    """However many files are open whose programs say nothing, the stop of the card waits one limit for them."""
    clock = manual()
    with Life(clock) as life:
        files = VopFiles(life.host, "modern", life.log)
        async with opened(files), opened(files), opened(files):
            closing = asyncio.ensure_future(files.close())
            await clock.advance(RELEASE_LIMIT + 0.1)
            assert closing.done()


@in_loop
async def test_vop_32_a_program_that_takes_no_answer_is_not_waited_for() -> None:
    """It asks for copies until nothing more goes in either direction; closing its file ends all the same."""
    with Life() as life:
        dma = ProgramDma(cast("DmaChannel", None), life.memory, life.smpt, life.bus.gddr.size, life.clock)
        program = dma.theirs.dup()
        program.setblocking(False)
        for _ in range(2000):
            with suppress(BlockingIOError):
                program.send(bytes(32))  # a copy of nothing: refused at once
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            program.send(bytes(32))
        assert await asyncio.wait_for(dma.close(), 20)
        dma.free()
        program.close()


@in_loop
async def test_descriptors_of_a_program_are_not_kept() -> None:
    """A request needs none: those that come along are closed."""
    with Life() as life, open("/dev/null") as null:
        files = VopFiles(life.host, "modern", life.log)
        async with opened(files) as (program, _):
            before = os.listdir("/proc/self/fd")
            for _ in range(3):
                await program.send({**ADD, "type": 0}, [null.fileno()] * 100)
                await program.recv_words(20, "the refusal")
            assert os.listdir("/proc/self/fd") == before
