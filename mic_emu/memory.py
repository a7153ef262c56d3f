"""Node memory: POSIX shared memory objects and the page allocator of each node.

Every address that a descriptor, an SMPT entry or a window names is an offset into one of these
objects; a window of a card lies in the window bank of its memory object. Names are unlinked as soon
as the object exists: processes get it by descriptor, and nothing is left behind whatever dies
(issue: ``/dev/shm`` is as before).
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import posix_ipc

from mic_emu import layout
from mic_emu._native import ffi, lib

PAGE = 4096
WINDOW_BANK: int = layout.CONSTANTS["WINDOW_BANK"]


def page_align(n: int) -> int:
    """``n`` bytes rounded up to whole pages."""
    return (n + PAGE - 1) & ~(PAGE - 1)


def create_shm(label: str, size: int) -> int:
    """Create an anonymous-by-unlink shared memory object of ``size`` bytes; returns its descriptor.

    It is sparse: pages cost nothing until they are reserved. Raises OSError (ENOSPC, ENOMEM).
    """
    name = f"/micemu-{os.getuid()}-{label}-{secrets.token_hex(4)}"
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    posix_ipc.unlink_shared_memory(name)
    try:
        os.ftruncate(shm.fd, size)
    except OSError:
        os.close(shm.fd)
        raise
    return int(shm.fd)


def create_gddr(label: str, size: int) -> int:
    """A card's memory of ``size`` bytes with its window bank (``mic_gddr_size``); returns its descriptor.

    Each boot of a card has an object of its own: whoever still maps an older one reaches nothing of the
    new card OS. Raises OSError (ENOSPC, ENOMEM, EMFILE).
    """
    return create_shm(label, WINDOW_BANK + size)


def gddr_size(fd: int) -> int:
    """Bytes of card memory in an object that ``create_gddr`` made."""
    return int(lib.mic_gddr_size(os.fstat(fd).st_size))


def window_allocator(pages: PageAllocator, size: int) -> PageAllocator:
    """Pages of the window bank of a card with ``size`` bytes of memory; they count as pages of ``pages``."""
    return PageAllocator(pages.fd, WINDOW_BANK, WINDOW_BANK + size, shares=pages)


def in_bank(addr: int, length: int, size: int) -> int:
    """``addr``, when [addr, addr + length) lies in the window bank of a card with ``size`` bytes of memory:
    the offset in its object, too. Raises IndexError."""
    if length < 0 or addr < WINDOW_BANK or addr + length > WINDOW_BANK + size:
        raise IndexError(f"{length} bytes at {addr:#x} are outside the card's window bank")
    return addr


def revoke_windows(fd: int) -> None:
    """The node is lost: cut its window bank off. Every mapping of a window, in whichever process and
    state, faults with SIGBUS from now on, and the pages are free (SCIF-102). Raises OSError."""
    rc = lib.mic_gddr_revoke(fd)
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))


def retire_gddr(fd: int) -> None:
    """Nothing of this object counts any more: give its pages back. Its windows fault, the rest reads as
    zeros, so that a backend or a program that looks once more does no harm and comes to none."""
    revoke_windows(fd)
    lib.mic_punch(fd, 0, gddr_size(fd))


class View:
    """Bytes of mapped shared memory by offset; loads acquire, stores release.

    ``pointer`` is a C pointer to the first byte, ``size`` the length in bytes. Every access is
    checked against the length (IndexError).
    """

    def __init__(self, pointer: Any, size: int) -> None:
        self.pointer = pointer
        self.size = size

    @cached_property
    def buffer(self) -> Any:
        """The bytes, as cffi shows them."""
        return ffi.buffer(self.pointer, self.size)

    def _check(self, off: int, length: int) -> None:
        if off < 0 or length < 0 or off + length > self.size:
            raise IndexError(f"{length} bytes at {off:#x} are outside the {self.size:#x}-byte area")

    def load(self, off: int, size: int) -> int:
        """One access of 1, 2, 4 or 8 bytes."""
        self._check(off, size)
        return int(lib.mic_shm_load(self.pointer + off, size))

    def store(self, off: int, size: int, value: int) -> None:
        """One access of 1, 2, 4 or 8 bytes."""
        self._check(off, size)
        lib.mic_shm_store(self.pointer + off, size, value)

    def read(self, off: int, length: int) -> bytes:
        """A private copy of ``length`` bytes."""
        self._check(off, length)
        return bytes(self.buffer[off : off + length])

    def write(self, off: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` in (no order among its bytes)."""
        self._check(off, len(data))
        self.buffer[off : off + len(data)] = data

    def zero(self, off: int, length: int) -> None:
        """Clear ``length`` bytes."""
        self._check(off, length)
        ffi.memmove(self.pointer + off, bytes(length), length)

    def sub(self, off: int, length: int) -> View:
        """A view of a part."""
        self._check(off, length)
        return View(self.pointer + off, length)


class Mapping(View):
    """A whole memory object, mapped shared; unmapped when the object goes."""

    def __init__(self, fd: int, size: int) -> None:
        # MAP_NORESERVE: most of it is never touched.
        self._area = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | 0x4000)
        super().__init__(ffi.cast("uint8_t *", ffi.from_buffer(self._area)), size)


class OutOfNodeMemory(OSError):
    """The node's memory, or ``/dev/shm`` under it, is used up (ENOMEM)."""

    def __init__(self, wanted: int, why: str) -> None:
        super().__init__(errno.ENOMEM, f"no room for {wanted} bytes of node memory: {why}")


@dataclass
class _Room:
    """Bytes that the allocators of a node may still hand out."""

    left: int


class PageAllocator:
    """First-fit allocator of whole pages in ``[start, end)`` of one memory object.

    What it hands out is reserved in the file system (a full ``/dev/shm`` is an error here, never a
    SIGBUS later) and reads as zeros; what comes back is punched out.

    shares: an allocator of the same node; the two together hand out no more than that one has pages.
    """

    def __init__(self, fd: int, start: int, end: int, shares: PageAllocator | None = None) -> None:
        if start % PAGE or end % PAGE or not 0 <= start <= end:
            raise ValueError(f"bad page range {start:#x}..{end:#x}")
        self._fd = fd
        self._room: _Room = _Room(end - start) if shares is None else shares._room
        self._free: list[tuple[int, int]] = [(start, end - start)] if end > start else []
        self._used: dict[int, int] = {}

    @property
    def fd(self) -> int:
        """The memory object; stays the caller's."""
        return self._fd

    @property
    def used_bytes(self) -> int:
        """Bytes handed out now."""
        return sum(self._used.values())

    def used_areas(self) -> list[tuple[int, int]]:
        """Offset and length of everything handed out now."""
        return sorted(self._used.items())

    @property
    def free_bytes(self) -> int:
        """Bytes that are left."""
        return min(self._room.left, sum(length for _, length in self._free))

    def alloc(self, nbytes: int, align: int = PAGE) -> int:
        """Offset of ``nbytes`` (rounded up to pages) of zeroed, reserved, contiguous memory.

        Raises OutOfNodeMemory.
        """
        length = page_align(nbytes)
        if length <= 0:
            raise ValueError("cannot allocate nothing")
        for i, (off, room) in enumerate(self._free):
            at = (off + align - 1) & ~(align - 1)
            if at + length <= off + room and length <= self._room.left:
                break
        else:
            raise OutOfNodeMemory(nbytes, f"{self.free_bytes} bytes are free, not in one piece")
        rc = lib.mic_reserve(self._fd, at, length)
        if rc < 0:
            lib.mic_punch(self._fd, at, length)
            raise OutOfNodeMemory(nbytes, os.strerror(-rc))
        pieces = [p for p in ((off, at - off), (at + length, off + room - at - length)) if p[1]]
        self._free[i : i + 1] = pieces
        self._used[at] = length
        self._room.left -= length
        return at

    def free(self, off: int) -> None:
        """Give back what ``alloc`` returned. Raises KeyError when it is not allocated."""
        length = self._used.pop(off)
        self._room.left += length
        lib.mic_punch(self._fd, off, length)
        i = bisect.bisect(self._free, (off, 0))
        if i < len(self._free) and self._free[i][0] == off + length:
            length += self._free.pop(i)[1]
        if i and self._free[i - 1][0] + self._free[i - 1][1] == off:
            prev = self._free[i - 1]
            self._free[i - 1] = (prev[0], prev[1] + length)
        else:
            self._free.insert(i, (off, length))
