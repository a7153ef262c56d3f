"""Processes below us: find them and end them."""

from __future__ import annotations

import os
import signal
import time


def stat_words(pid: int | str) -> list[str]:
    """What ``/proc/PID/stat`` says behind the process's name, which may be any bytes: the state first (field 3), then
    the parent. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as f:
        return f.read().rpartition(b")")[2].decode("ascii").split()


def children() -> list[int]:
    """Our child processes, zombies included. A subreaper inherits every orphan below it."""
    me = os.getpid()
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(stat_words(entry)[1]) == me:
                found.append(int(entry))
        except OSError:
            continue
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
