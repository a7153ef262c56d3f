"""Starting one program on the card: the forked child's way to ``exec``, terminals, sessions."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import struct
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

from mic_emu import namespaces
from mic_emu._native import lib
from mic_emu.proc import stat_words
from mic_emu.runproto import LIMITS

_TIOCGPTN = 0x80045430
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
_PF_EXITING = 0x4  # of the flags in /proc/PID/stat


class Root(Protocol):
    """The file system that programs see. ``initctl`` is its /run/initctl as init sees it, or ""."""

    initctl: str

    def enter(self, cwd: str) -> None:
        """In a program's process: make it the root, with ``cwd`` writable. Raises OSError."""

    def open_terminal(self) -> tuple[int, str]:
        """A new terminal: (master descriptor, slave's path for programs). Raises OSError."""


class HostRoot:
    """The host's file system as it is, for a card without a mount namespace."""

    initctl = ""

    def enter(self, cwd: str) -> None:
        """Nothing to do."""

    def open_terminal(self) -> tuple[int, str]:
        return open_terminal("/dev/ptmx")


def open_terminal(ptmx: str) -> tuple[int, str]:
    """Allocate a terminal through ``ptmx``; (master, slave's path)."""
    master = os.open(ptmx, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        (n,) = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
    except OSError:
        os.close(master)
        raise
    return master, f"/dev/pts/{n}"


def keep_open(master: int) -> int:
    """A descriptor of a terminal's slave: while it is open, the master sees no hang-up."""
    fd: int = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return fd


def set_size(fd: int, rows: int, cols: int) -> None:
    """Window size of a terminal in characters."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))


class StartError(OSError):
    """The program was not started; ``stage`` is "root", "cwd" or "exec"."""

    def __init__(self, number: int, stage: str) -> None:
        super().__init__(number, os.strerror(number))
        self.stage = stage


STAGES = ("root", "cwd", "exec")
_REPORT = struct.Struct("=ii")


class Started:
    """A forked child on its way to ``exec``. ``ready_fd`` is readable when ``result`` knows more."""

    def __init__(self, pid: int, ready_fd: int) -> None:
        self.pid = pid
        self.ready_fd = ready_fd

    def result(self) -> StartError | None:
        """Why it failed, or None when the program runs. Closes ``ready_fd``."""
        report = os.read(self.ready_fd, _REPORT.size)
        os.close(self.ready_fd)
        if len(report) < _REPORT.size:
            return None
        number, stage = _REPORT.unpack(report)
        return StartError(number, STAGES[stage])


@dataclass(frozen=True)
class Command:
    """What a child becomes.

    stdio:     three descriptors, or none of them when ``terminal`` is given
    terminal:  path of the slave that becomes its standard descriptors and controlling terminal
    limits:    soft resource limits by name of ``runproto.LIMITS``
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    stdio: Sequence[int] = ()
    terminal: str | None = None
    umask: int = 0o022
    limits: Mapping[str, int] = field(default_factory=dict)


def start(root: Root, command: Command) -> Started:
    """Fork a child that becomes ``command`` in a session of its own.

    The caller has one thread. Raises OSError when there is no process to be had (EAGAIN, ENOMEM).
    """
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(ready_r)
        os.close(ready_w)
        raise
    if pid == 0:
        _child(root, command, ready_w, parent)
    os.close(ready_w)
    return Started(pid, ready_r)


def _child(root: Root, command: Command, ready_w: int, parent: int) -> NoReturn:
    stage, report = 0, ready_w
    try:
        namespaces.check(lib.mic_proc_die_with_parent(parent), "init died")
        _default_signals()
        os.setsid()
        root.enter(command.cwd)
        os.umask(command.umask)
        _limit(command.limits)
        # The terminal is opened here, so that its name is one of the program's own file system.
        terminal = command.terminal and os.open(command.terminal, os.O_RDWR)
        report = _stdio([terminal] * 3 if terminal else command.stdio, ready_w)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        stage = 1
        os.chdir(command.cwd)
        stage = 2
        os.execvpe(command.argv[0], list(command.argv), {**command.env, "PWD": command.cwd})
    except OSError as e:
        os.write(report, _REPORT.pack(_why(e.errno or errno.EIO, stage, command), stage))
    except Exception:
        os.write(report, _REPORT.pack(errno.EINVAL, stage))
    finally:
        os._exit(127)


def _why(code: int, stage: int, command: Command) -> int:
    """As a shell says it: not found, when only a folder in PATH could not be searched."""
    name = command.argv[0]
    searched = code == errno.EACCES and stage == 2 and "/" not in name
    if searched and shutil.which(name, os.F_OK, command.env.get("PATH")) is None:
        return errno.ENOENT
    return code


def _limit(limits: Mapping[str, int]) -> None:
    """Soft resource limits, as far as the card's hard ones permit."""
    for name, soft in limits.items():
        _, hard = resource.getrlimit(LIMITS[name])
        if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
            soft = hard
        try:
            resource.setrlimit(LIMITS[name], (soft, hard))
        except (OSError, ValueError):
            pass  # below what is in use, or refused: the card's own limit stays


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for sig in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(sig, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _stdio(stdio: Sequence[int], ready_w: int) -> int:
    """Descriptors 0, 1, 2, the report's pipe as 3 (closed by exec), and no other. Returns 3."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (*stdio, ready_w)]
    for n, fd in enumerate(high):
        os.dup2(fd, n, inheritable=n < 3)
    os.closerange(4, 1 << 20 if max(high) > 4096 else 4097)
    return 3


class ProcessRow(NamedTuple):
    """Of one process: its parent, its session, and whether it has a controlling terminal."""

    parent: int
    session: int
    terminal: bool


def processes() -> dict[int, ProcessRow]:
    """All live processes that this /proc shows, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = stat_words(entry)
        except OSError:
            continue
        if fields[0] not in "ZX":
            found[int(entry)] = ProcessRow(int(fields[1]), int(fields[3]), fields[4] != "0")
    return found


def ends(pid: int) -> bool:
    """Is this process on its way out, or a zombie? The kernel marks it before it closes anything of it."""
    try:
        fields = stat_words(pid)
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_EXITING)


def descendants(ancestor: int) -> set[int]:
    """Live processes below ``ancestor``."""
    table = processes()
    below: dict[int, list[int]] = {}
    for pid, row in table.items():
        below.setdefault(row.parent, []).append(pid)
    found: set[int] = set()
    todo = [ancestor]
    while todo:
        children = [p for p in below.get(todo.pop(), []) if p not in found]
        found.update(children)
        todo += children
    return found


def session_members(session: int) -> list[int]:
    """Live processes of a session."""
    return [pid for pid, row in processes().items() if row.session == session]


def terminal_leaders(pids: set[int]) -> list[int]:
    """Those of ``pids`` that lead a session on a terminal: what a hang-up is for."""
    return [pid for pid, row in processes().items() if pid in pids and pid == row.session and row.terminal]


def kill_all(pids: Sequence[int] | set[int], *signals: int) -> None:
    """Send signals; a process that has gone is fine, and one that became another user's (sudo, where the card has
    no user namespace) is left to him."""
    for pid in pids:
        for sig in signals:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, sig)
