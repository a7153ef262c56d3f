"""Several pieces of a memory object behind one another in memory, read only for good (VOP-42)."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED, _FAILED = 0x10, ctypes.c_void_p(-1).value


class ReadOnlyMapping:
    """``view`` shows the pieces (offset, length) of the object ``fd``. The kernel refuses to make it writable,
    because the handle behind it is read only. Raises OSError."""

    def __init__(self, fd: int, pieces: Sequence[tuple[int, int]]) -> None:
        self.length = sum(n for _, n in pieces)
        handle = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The whole range first: the pieces then replace parts of what is ours.
            self.address = self._map(None, self.length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            at = self.address
            for off, n in pieces:
                self._map(at, n, mmap.MAP_SHARED | _FIXED, handle, off)
                at += n
        finally:
            os.close(handle)
        area = (ctypes.c_ubyte * self.length).from_address(self.address)
        self.view = memoryview(area).cast("B").toreadonly()

    def _map(self, at: int | None, length: int, flags: int, fd: int, off: int) -> int:
        got = _libc.mmap(at, length, mmap.PROT_READ, flags, fd, off)
        if got == _FAILED or got is None:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(got)

    def close(self) -> None:
        """Unmap; ``view`` must not be used any more. May be repeated."""
        if self.address:
            self.view.release()
            _libc.munmap(self.address, self.length)
            self.address = 0

    def __enter__(self) -> ReadOnlyMapping:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
