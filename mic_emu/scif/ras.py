"""Registered address spaces: windows by offset (SCIF 2.10-2.13)."""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError

FIRST_AUTOMATIC = 1 << 62  # the X100 driver's first automatic offset (SCIF-82)
END = 1 << 63
PROT_READ, PROT_WRITE = 1, 2

Segment = tuple[int, int]  # (place, bytes)


@dataclass
class Window:
    """A run of pages in an address space. ``segments`` say where the pages lie, in order.

    Of an own window they are offsets in our node memory, of a peer's its bus addresses.
    """

    id: int  # ours
    offset: int
    length: int
    prot: int
    segments: list[Segment] = field(default_factory=list)
    peer_id: int = 0  # the other node's id of the same window
    mapped_pages: int = 0  # of a peer's window: pages in scif_mmap mappings of our programs
    lingering: bool = False  # unregistered, but still mapped somewhere
    alive: bool = False  # announced: usable
    leaving: list[Callable[[ScifError | None], None]] | None = None  # who waits for the withdrawal
    users: int = 0  # copies and signals of DMA channels that touch it
    on_idle: list[Callable[[], None]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.offset + self.length

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call it once no DMA channel touches the window: now, or when the last user is gone."""
        if self.users:
            self.on_idle.append(call)
        else:
            call()

    def user_gone(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users:
            calls, self.on_idle = self.on_idle, []
            for call in calls:
                call()

    def places(self, offset: int, length: int) -> Iterator[Segment]:
        """Where the bytes [offset, offset + length) of the address space lie; inside this window."""
        skip = offset - self.offset
        for place, size in self.segments:
            if skip >= size:
                skip -= size
                continue
            n = min(size - skip, length)
            yield place + skip, n
            length -= n
            skip = 0
            if not length:
                return


W = TypeVar("W", bound=Window)


class Space(Generic[W]):
    """Windows that never overlap, in order of their offsets."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._windows: list[W] = []
        self._taken = FIRST_AUTOMATIC  # all is taken from there to here

    def __iter__(self) -> Iterator[W]:
        return iter(list(self._windows))

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, window: W) -> None:
        """Enter a window. Raises ScifError EADDRINUSE when it overlaps another (SCIF-81)."""
        i = bisect.bisect(self._starts, window.offset)
        if i and self._windows[i - 1].end > window.offset:
            raise ScifError(errno.EADDRINUSE, "overlaps a window")
        if i < len(self._starts) and self._starts[i] < window.end:
            raise ScifError(errno.EADDRINUSE, "overlaps a window")
        self._starts.insert(i, window.offset)
        self._windows.insert(i, window)

    def remove(self, window: W) -> None:
        """Take a window out; nothing when it is not there."""
        i = bisect.bisect_left(self._starts, window.offset)
        if i < len(self._windows) and self._windows[i] is window:
            del self._starts[i], self._windows[i]
            if window.offset < self._taken:
                self._taken = max(window.offset, FIRST_AUTOMATIC)

    def free_offset(self, length: int) -> int:
        """First fit ascending from 2^62 (SCIF-82). Raises ScifError ENOMEM."""
        i = bisect.bisect(self._starts, self._taken)
        if i:
            self._taken = max(self._taken, self._windows[i - 1].end)
        while i < len(self._windows) and self._starts[i] == self._taken:
            self._taken = self._windows[i].end
            i += 1
        at = self._taken
        while i < len(self._windows) and self._starts[i] - at < length:
            at = self._windows[i].end
            i += 1
        if at + length > END:
            raise ScifError(errno.ENOMEM, "no room in the address space")
        return at

    def cover(self, offset: int, length: int, prot: int = 0, *, usable: bool = True) -> list[W]:
        """The windows that hold all of [offset, offset + length), in order.

        Raises ScifError ENXIO (outside, a gap), EPERM (one lacks a bit of ``prot``), whichever comes
        first on the walk (SCIF 2.13). ``usable``: lingering windows do not count.
        """
        out: list[W] = []
        at, end = offset, offset + length
        i = bisect.bisect(self._starts, at) - 1
        while True:
            window = self._windows[i] if 0 <= i < len(self._windows) else None
            if window is None or not window.offset <= at < window.end or (usable and not window.alive):
                raise ScifError(errno.ENXIO, f"no window at {at:#x}")
            if prot & ~window.prot:
                raise ScifError(errno.EPERM, f"window {window.offset:#x} does not allow that")
            out.append(window)
            if window.end >= end:
                return out
            at = window.end
            i += 1


def check_pages(offset: int, length: int) -> None:
    """Raises ScifError EINVAL unless both are whole pages, positive and below 2^63."""
    if length <= 0 or length % PAGE or offset % PAGE or offset < 0 or offset + length > END:
        raise ScifError(errno.EINVAL, "not whole pages")
