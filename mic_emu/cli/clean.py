"""micemu clean"""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import click

from mic_emu.cli import client
from mic_emu.errors import StateError
from mic_emu.rundir import RunDir, base_dir

# The names that init gives (``mic_emu.host.launcher``); who is below a board dies with it.
OURS = re.compile(rb"micemu-(init|host|spare)|mic\d+-\S+")


def _is_left(pid: int, where: RunDir) -> bool:
    """Is it of this instance? It has the name, and the log open as init opened it: nobody reads a log that way.
    Raises OSError when it has gone, or is not ours to look at."""
    proc, log = Path(f"/proc/{pid}"), os.fsencode(where.log)
    if (proc / "fd").stat().st_uid != os.getuid() or not OURS.fullmatch((proc / "comm").read_bytes().strip()):
        return False
    for fd in (proc / "fd").iterdir():
        if os.fsencode(os.readlink(fd)).startswith(log):
            words = (proc / "fdinfo" / fd.name).read_text().split()
            flags = int(words[words.index("flags:") + 1], 8)
            if flags & os.O_APPEND and flags & os.O_ACCMODE == os.O_WRONLY:
                return True
    return False


def leftovers(where: RunDir) -> list[int]:
    """Processes of this instance that nobody watches any more."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if _is_left(int(proc.name), where):
                found.append(int(proc.name))
    return found


def _kill(pid: int, where: RunDir) -> bool:
    """Kill it if it still is who it was."""
    with suppress(OSError):
        watch = os.pidfd_open(pid)
        try:
            if _is_left(pid, where):
                signal.pidfd_send_signal(watch, signal.SIGKILL)
                return True
        finally:
            os.close(watch)
    return False


def sweep(where: RunDir) -> list[str]:
    """Remove what a dead instance left; returns what was done. The caller holds the lock."""
    done = [f"killed process {pid}" for pid in leftovers(where) if _kill(pid, where)]
    if where.path.exists():
        where.remove()
        done.append(f"removed {where.path}")
    return done


@click.command()
@client.json_option
def command(as_json: bool) -> None:
    """Remove what a crash left behind. Refuses while the emulator runs.

    Also the machines of test runs that were killed (/tmp/mt-*): never those of a run that lives, nor another user's; and
    mounts of the sysfs tree that nobody serves any more.

    \b
    Example:
      micemu clean
    """
    from mic_emu.cosm.mount import abandoned, clear
    from mic_emu.testing import homes  # an emulator needs nothing of it

    where = client.rundir()
    done = [text for home in homes.abandoned() for text in homes.remove(home)]
    for target in abandoned():
        clear(target)
        done.append(f"unmounted {target}")
    if base_dir().exists():
        with where.locked():
            if not where.read_pids():
                done += sweep(where)
            elif not done:
                raise StateError(f"the emulator runs (instance {where.instance}): micemu stop ends it")
    if as_json:
        client.emit({"done": done})
    else:
        click.echo("\n".join(done) or "nothing to clean")
