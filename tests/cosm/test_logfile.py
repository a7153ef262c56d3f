"""Log rotation while processes append."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mic_emu.host.logfile import keep_small, rotate
from mic_emu.log import Log


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


async def test_rotation_starts_beyond_the_limit(tmp_path: Path) -> None:
    """At the limit nothing happens, one byte more rotates."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"x" * 100)
    task = asyncio.ensure_future(keep_small(path, 100, 0.001))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not Path(f"{path}.1").exists()
    path.write_bytes(b"x" * 101)
    for _ in range(5000):
        if not path.stat().st_size:
            break
        await asyncio.sleep(0.001)
    task.cancel()
    assert Path(f"{path}.1").stat().st_size == 101
