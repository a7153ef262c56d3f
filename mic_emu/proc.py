"""Processes below us: find them and end them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def children() -> list[int]:
    """Our child processes, zombies included. A subreaper inherits every orphan below it."""
    me = os.getpid()
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            found.append(int(stat.parent.name))
    return found


def kill_descendants(limit_s: float = 10.0) -> list[tuple[int, int]]:
    """SIGKILL every descendant and reap it; returns (pid, wait status) of those that ended.

    For a subreaper: what a killed child leaves behind becomes our child and goes next. Gives up
    after ``limit_s`` seconds (a process stuck in the kernel).
    """
    deadline = time.monotonic() + limit_s
    ended = []
    while time.monotonic() < deadline:
        alive = children()
        if not alive:
            break
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            ended.append(os.waitpid(-1, 0))
        except ChildProcessError:
            break
    return ended
