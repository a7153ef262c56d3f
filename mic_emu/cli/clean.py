"""micemu clean"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from mic_emu.cli import client
from mic_emu.errors import StateError
from mic_emu.rundir import RunDir, base_dir


def leftovers(where: RunDir) -> list[int]:
    """Processes of this instance that nobody watches any more: they hold its run directory open."""
    mark = str(where.path).encode()
    found = []
    for fds in Path("/proc").glob("[0-9]*/fd"):
        pid = int(fds.parent.name)
        if pid == os.getpid():
            continue
        try:
            if fds.stat().st_uid != os.getuid():
                continue
            if any(os.fsencode(os.readlink(fd)).startswith(mark + b"/") for fd in fds.iterdir()):
                comm = (fds.parent / "comm").read_bytes()
                if comm.startswith((b"mic", b"micemu")):
                    found.append(pid)
        except OSError:
            continue
    return found


def sweep(where: RunDir) -> list[str]:
    """Remove what a dead instance left; returns what was done. The caller holds the lock."""
    done = []
    for pid in leftovers(where):
        try:
            os.kill(pid, signal.SIGKILL)
            done.append(f"killed process {pid}")
        except ProcessLookupError:
            pass
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
