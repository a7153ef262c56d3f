"""The caller's terminal: raw mode that is always undone, its size, and signals as readable bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import termios
import tty
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


def is_terminal(fd: int) -> bool:
    """Is this descriptor a terminal (false when it is closed)?"""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def window_size(fd: int) -> tuple[int, int]:
    """(rows, columns) in characters, zeros when they are not known."""
    try:
        rows, cols, _, _ = struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        return 0, 0
    return rows, cols


def set_window_size(fd: int, size: tuple[int, int]) -> None:
    """Tell a terminal, by its master, how large it is; its foreground programs get SIGWINCH."""
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    except OSError:
        pass  # the other end has gone: the relay notices


class Raw:
    """A terminal in raw mode, or with ``keys`` one that gives each key at once and still makes signals of Ctrl-C
    and Ctrl-Z. ``again`` repeats it after somebody (the shell) changed the mode."""

    def __init__(self, fd: int, *, keys: bool = False) -> None:
        self._fd = fd
        self._set = tty.setcbreak if keys else tty.setraw
        self._saved = termios.tcgetattr(fd)

    def __enter__(self) -> Raw:
        self.again()
        return self

    def again(self) -> None:
        """Raw mode now; the saved mode stays the one to go back to."""
        try:
            self._set(self._fd, termios.TCSANOW)
        except termios.error:
            pass  # the terminal has gone (a hang-up comes with SIGCONT): the relay notices when it reads

    def __exit__(self, *exc: object) -> None:
        # Ignored while a background process: it would stop instead of restoring.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            while True:
                try:
                    return termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
                except termios.error as e:
                    if e.args[0] != errno.EINTR:  # a signal while it shows what was printed last
                        return  # the terminal has gone
        finally:
            signal.signal(signal.SIGTTOU, before)


@contextmanager
def caught(signals: Iterable[int]) -> Iterator[int]:
    """Catch signals; yields a descriptor from which each is read as one byte, its number."""
    r, w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before_fd = signal.set_wakeup_fd(w, warn_on_full_buffer=False)
    before = {sig: signal.signal(sig, _noted) for sig in signals}
    try:
        yield r
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(before_fd)
        os.close(r)
        os.close(w)


class Interrupted(Exception):
    """One of ENDING came inside ``interruptible``, or before; the wake-up descriptor has it, too."""


ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_ended = _interruptible = False  # handlers have no other way to know


def _noted(sig: int, _frame: FrameType | None) -> None:
    global _ended
    _ended |= sig in ENDING
    if _ended and _interruptible:
        raise Interrupted  # else the wake-up descriptor alone has it


@contextmanager
def interruptible() -> Iterator[None]:
    """A caught signal of ENDING ends what blocks in here. Raises Interrupted."""
    global _interruptible
    _interruptible = True
    try:
        if _ended:
            raise Interrupted
        yield
    finally:
        _interruptible = False


def read_signals(fd: int) -> bytes:
    """Signal numbers that came since the last call, oldest first."""
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


def write_all(fd: int, data: bytes) -> None:
    """Write everything; waits while the reader does. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])
