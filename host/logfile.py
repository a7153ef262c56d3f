"""Rotation of the instance's log: copy, then truncate, because every process holds it open for appending.

Those processes have a descriptor only, and a card OS could not even reach the directory. So the host process
does it for all: inotify tells it that somebody has written.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from mic_emu import inotify
from mic_emu.clock import settle
from mic_emu.log import Log

MAX_BYTES = 64 << 20
KEEP = 3
LOOK_S = 60.0  # where inotify is refused
QUIET_S = 0.1  # between two looks: a chatty log costs ten a second, and grows on in this time only


def rotate(path: Path, keep: int = KEEP) -> None:
    """``path`` becomes ``path.1``, that ``path.2`` ...; at most ``keep`` old ones. Raises OSError.

    A line written between copy and truncation is lost, as with logrotate's copytruncate. Where there is no room
    for the copy, the whole content is: a log that is never cut would take what room is left.
    """
    copy = Path(f"{path}.new")
    try:
        shutil.copyfile(path, copy)
        copy.chmod(stat.S_IMODE(path.stat().st_mode))
    except OSError:
        copy.unlink(missing_ok=True)  # and the old ones stay where they are
        raise
    finally:
        with path.open("r+b") as f:
            f.truncate()
    for n in range(keep, 1, -1):
        with suppress(FileNotFoundError):
            Path(f"{path}.{n - 1}").replace(f"{path}.{n}")
    copy.replace(f"{path}.1")


async def keep_small(path: Path, log: Log, limit: int = MAX_BYTES, quiet_s: float = QUIET_S) -> None:
    """Rotate as soon as the log has outgrown ``limit`` bytes, until cancelled. A full disk is told, no more."""
    try:
        fd = inotify.watch(path, inotify.MODIFY)
    except OSError as e:
        log.warning(f"no inotify ({e.strerror}): the size of the log is looked at every {LOOK_S:g} s")
        fd = -1
    try:
        while True:
            try:
                if path.stat().st_size > limit:
                    await asyncio.to_thread(rotate, path)
            except FileNotFoundError:
                log.warning(f"{path} was removed: nobody sees what is logged from now on, and nobody cuts it")
                return  # to say it again would wake us again
            except OSError as e:
                log.warning(f"the log could not be kept when it was rotated: {e.strerror}")
            if fd < 0:
                await asyncio.sleep(LOOK_S)
            else:
                await _written(fd)
                await asyncio.sleep(quiet_s)  # no poll: at most so many looks, however many lines
    finally:
        if fd >= 0:
            os.close(fd)


async def _written(fd: int) -> None:
    """Until somebody has written."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, settle, told)
    try:
        await told
    finally:
        loop.remove_reader(fd)
    inotify.drain(fd)
