"""Folders of test machines (``mt-*`` in /tmp): whose they are, and which were left by a test run that was killed.

A machine writes down the process that made it. A folder counts as left behind only when it is ours and that very
process is gone; one without the note (a machine that is just being made) never does.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from mic_emu.rundir import ProcessId

PLACE, PREFIX, OWNER = Path("/tmp"), "mt-", "owner.json"
END_S = 10.0


def make(session: str) -> Path:
    """A new folder of this process; ``session`` is a word of its test run."""
    home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{session}", dir=PLACE))
    me = ProcessId.of(os.getpid())
    assert me
    note = home / f"{OWNER}.tmp"
    note.write_text(json.dumps(asdict(me)))
    note.rename(home / OWNER)
    return home


def runtime_dir(home: Path) -> Path:
    """XDG_RUNTIME_DIR of the machine's commands."""
    return home / "run"


def abandoned() -> list[Path]:
    """Our folders whose owner is gone."""
    return sorted(home for home in PLACE.glob(f"{PREFIX}*") if _is_abandoned(home))


def _is_abandoned(home: Path) -> bool:
    try:
        st = home.lstat()
        if st.st_uid != os.getuid() or not home.is_dir() or home.is_symlink():
            return False
        return not ProcessId(**json.loads((home / OWNER).read_text())).alive()
    except (OSError, ValueError, TypeError):
        return False


def processes(home: Path) -> list[int]:
    """Our processes that were started for this machine, by their environment."""
    mark = b"XDG_RUNTIME_DIR=" + os.fsencode(runtime_dir(home))
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if environ.stat().st_uid == os.getuid() and mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


def remove(home: Path) -> list[str]:
    """End what runs of an abandoned machine and remove its folder; what was done."""
    done = []
    deadline = time.monotonic() + END_S
    while (left := processes(home)) and time.monotonic() < deadline:  # again: they may have had children
        for pid in left:
            try:
                watch = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if pid in processes(home):  # the number is still the same process's: we hold it
                    signal.pidfd_send_signal(watch, signal.SIGKILL)
                    select.select([watch], [], [], max(0.0, deadline - time.monotonic()))
                    done.append(f"killed process {pid}")
            except ProcessLookupError:
                pass
            finally:
                os.close(watch)
    shutil.rmtree(home, ignore_errors=True)
    return [*done, f"removed {home}"]
