"""Processes below us: find them and end them."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress


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
    after ``limit_s`` seconds (a process stuck in the kernel, or one that is not ours to kill).
    """
    deadline = time.monotonic() + limit_s
    ended: list[tuple[int, int]] = []
    while alive := children():
        for pid in alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _await_one(alive, deadline - time.monotonic())
        ended += _reap()
        if time.monotonic() >= deadline:
            break
    return ended


def _await_one(pids: Sequence[int], limit_s: float) -> None:
    """Until one of these children has ended, or the time is over."""
    watches: list[int] = []
    poller = select.poll()
    try:
        for pid in pids:
            with suppress(OSError):  # no descriptor is left for all of them: some are enough
                watches.append(os.pidfd_open(pid))
                poller.register(watches[-1], select.POLLIN)
        poller.poll(max(limit_s, 0) * 1000)
    finally:
        for fd in watches:
            os.close(fd)


def _reap() -> list[tuple[int, int]]:
    """Collect what has ended."""
    ended = []
    with suppress(ChildProcessError):
        while (row := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(row)
    return ended
