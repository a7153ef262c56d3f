"""Log rotation while processes append."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mic_emu.host.logfile import keep_small, rotate
from mic_emu.log import Log
from mic_emu.testing.cosm import Records


def test_rotation_keeps_three_and_appenders_go_on(tmp_path: Path) -> None:
    """An open log goes on at the start of the empty file; the oldest copy is dropped."""
    path = tmp_path / "log.jsonl"
    log = Log.open(path)
    for n in range(5):
        log.info(f"line {n}")
        rotate(path)
    log.info("last")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.jsonl",
        "log.jsonl.1",
        "log.jsonl.2",
        "log.jsonl.3",
    ]
    assert '"message": "last"' in path.read_text()
    assert ["line 4" in Path(f"{path}.1").read_text(), "line 2" in Path(f"{path}.3").read_text()] == [
        True,
        True,
    ]
    assert path.read_bytes()[:1] == b"{"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Give the rotation its turns until it is true."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)  # between two looks at files, bounded by the deadline


@asynccontextmanager
async def kept_small(path: Path, limit: int) -> AsyncIterator[Records]:
    """A log that is looked after; what was told about it."""
    records = Records()
    task = asyncio.ensure_future(keep_small(path, records.log, limit, 0))
    try:
        yield records
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        records.close()


async def test_rotation_starts_beyond_the_limit(tmp_path: Path) -> None:
    """At the limit nothing happens, one byte more rotates."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"x" * 100)
    async with kept_small(path, 100):
        with path.open("ab") as f:
            f.write(b"")
        await asyncio.sleep(0.05)  # nothing may happen in it
        assert not Path(f"{path}.1").exists()
        with path.open("ab") as f:
            f.write(b"x")
        await until(lambda: not path.stat().st_size, "the rotation")
    assert Path(f"{path}.1").stat().st_size == 101


async def test_chatty_log_is_rotated_as_it_is_written(tmp_path: Path) -> None:
    """A writer of another process, ten times the limit in a moment: no file is far beyond it, and no look is timed."""
    path = tmp_path / "log.jsonl"
    path.touch()
    limit = 100_000
    script = f"import os; fd = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND)\n"
    script += "for _ in range(100): os.write(fd, b'x' * 10_000); input()"
    async with kept_small(path, limit):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE
        )
        largest = 0
        assert writer.stdin
        for _ in range(100):
            writer.stdin.write(b"\n")
            await writer.stdin.drain()
            await asyncio.sleep(0.005)  # the pace of the lines
            largest = max([largest, *map(size, tmp_path.iterdir())])
        await asyncio.wait_for(writer.wait(), 10)
    assert limit < largest <= 5 * limit
    assert len(list(tmp_path.iterdir())) == 4


def size(path: Path) -> int:
    """Bytes; 0 when it was renamed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


async def test_rotation_on_a_full_disk_cuts_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a copy: the log is emptied and that is told once, instead of a copy at every line."""
    path = tmp_path / "log.jsonl"

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    for n in (1, 2, 3):
        Path(f"{path}.{n}").write_text(f"old {n}")
    path.write_bytes(b"x" * 101)
    async with kept_small(path, 100) as records:
        await until(lambda: not path.stat().st_size, "the cut")
        await until(lambda: bool(records.texts("warning")), "the warning")
    assert records.texts("warning") == [
        "the log could not be kept when it was rotated: No space left on device"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", *(f"log.jsonl.{n}" for n in (1, 2, 3))]
    assert [Path(f"{path}.{n}").read_text() for n in (1, 2, 3)] == ["old 1", "old 2", "old 3"]


async def test_log_that_somebody_removed_is_told_once(tmp_path: Path) -> None:
    """The warning goes where the others go, which wakes whoever watches the log: it must not say it again."""
    path = tmp_path / "log.jsonl"
    log = Log.open(path)
    records = Records()
    records.log.set_hook(lambda record: log.info(record["message"]))
    task = asyncio.ensure_future(keep_small(path, records.log, 100, 0))
    await asyncio.sleep(0)
    path.unlink()
    log.info("a line")
    await asyncio.wait_for(task, 20)
    assert os.fstat(log.fd).st_size < 1000
    records.close()
