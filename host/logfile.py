"""Rotation of the instance's log: copy, then truncate, because every process holds it open for appending."""

from __future__ import annotations

import asyncio
import shutil
import stat
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 64 << 20
KEEP = 3
LOOK_S = 60.0


def rotate(path: Path, keep: int = KEEP) -> None:
    """``path`` becomes ``path.1``, that ``path.2`` ...; at most ``keep`` old ones. Raises OSError.

    A line written between copy and truncation is lost, as with logrotate's copytruncate.
    """
    for n in range(keep, 1, -1):
        with suppress(FileNotFoundError):
            Path(f"{path}.{n - 1}").replace(f"{path}.{n}")
    shutil.copyfile(path, f"{path}.1")
    Path(f"{path}.1").chmod(stat.S_IMODE(path.stat().st_mode))
    with path.open("r+b") as f:
        f.truncate()


async def keep_small(path: Path, limit: int = MAX_BYTES, every_s: float = LOOK_S) -> None:
    """Rotate whenever the log has outgrown ``limit`` bytes, until cancelled. A full disk is no error here."""
    while True:
        with suppress(OSError):
            if path.stat().st_size > limit:
                await asyncio.to_thread(rotate, path)
        await asyncio.sleep(every_s)
