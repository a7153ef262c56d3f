"""inotify: a descriptor that becomes readable when a file changes. The standard library has none."""

from __future__ import annotations

import ctypes
import os

MODIFY, ATTRIB, DELETE_SELF = 0x2, 0x4, 0x400
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


def watch(path: os.PathLike[str] | str, mask: int) -> int:
    """A non-blocking descriptor for the changes in ``mask``; read it empty with ``drain``. Raises OSError."""
    fd: int = _libc.inotify_init1(_NONBLOCK | _CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if _libc.inotify_add_watch(fd, os.fsencode(path), mask) < 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number), os.fspath(path))
    return fd


def drain(fd: int) -> None:
    """Forget the changes that were told."""
    try:
        while os.read(fd, 65536):
            pass
    except BlockingIOError:
        pass
