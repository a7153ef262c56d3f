"""Pages of node memory that programs' own memory was moved into.

A run is held by the process that maps it and by every window over it; it is free again when neither
is left. A process counts until the kernel says that it is gone, however that comes.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mic_emu.scif.errors import ScifError
from mic_emu.scif.ras import Segment

if TYPE_CHECKING:
    from mic_emu.scif.node import Node


@dataclass
class Run:
    """Contiguous pages [off, off + length)."""

    off: int
    length: int
    holder: int  # pid, 0: nobody maps it any more
    windows: int = 0


@dataclass
class Holder:
    """A process that maps runs."""

    pidfd: int
    runs: set[int] = field(default_factory=set)


class Pages:
    """All runs of a node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._runs: dict[int, Run] = {}
        self._starts: list[int] = []
        self._holders: dict[int, Holder] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes held by programs."""
        return sum(r.length for r in self._runs.values())

    def allocate(self, pid: int, nbytes: int) -> int:
        """Offset of a new run that process ``pid`` will map. Raises ScifError ENOMEM."""
        try:
            off = self.node.window_allocator.alloc(nbytes)
        except OSError as e:
            raise ScifError(errno.ENOMEM, str(e)) from None
        try:
            self._holder(pid).runs.add(off)
        except OSError:
            self.node.window_allocator.free(off)
            raise
        self._runs[off] = Run(off, nbytes, pid)
        bisect.insort(self._starts, off)
        return off

    def _holder(self, pid: int) -> Holder:
        holder = self._holders.get(pid)
        if holder is None:
            holder = self._holders[pid] = Holder(os.pidfd_open(pid))
            asyncio.get_running_loop().add_reader(holder.pidfd, self._gone, pid)
        return holder

    def _gone(self, pid: int) -> None:
        """The process is dead."""
        holder = self._holders.pop(pid)
        asyncio.get_running_loop().remove_reader(holder.pidfd)
        os.close(holder.pidfd)
        for off in holder.runs:
            self._runs[off].holder = 0
            self._free_if_unused(self._runs[off])

    def close(self) -> None:
        """Forget everything."""
        for pid in list(self._holders):
            self._gone(pid)

    def drop(self, pid: int, off: int) -> None:
        """Process ``pid`` no longer maps the run at ``off``; wrong claims are ignored."""
        run = self._runs.get(off)
        if run is not None and run.holder == pid:
            self._holders[pid].runs.discard(off)
            run.holder = 0
            self._free_if_unused(run)

    def hold(self, pid: int, segments: list[Segment]) -> list[Segment]:
        """A window of ``pid`` over ``segments``, each inside runs of that process; returns them cut at
        run boundaries. Raises ScifError EFAULT when any byte is not its own."""
        pieces: list[tuple[Run, Segment]] = []
        for off, length in segments:
            while length > 0:
                i = bisect.bisect(self._starts, off) - 1
                run = self._runs[self._starts[i]] if i >= 0 else None
                if run is None or run.holder != pid or off >= run.off + run.length:
                    raise ScifError(errno.EFAULT, "not memory of this process")
                n = min(length, run.off + run.length - off)
                pieces.append((run, (off, n)))
                off += n
                length -= n
        for run, _ in pieces:
            run.windows += 1
        return [seg for _, seg in pieces]

    def release(self, segments: list[Segment]) -> None:
        """The window over these (as ``hold`` returned them) is destroyed."""
        for off, _ in segments:
            run = self._runs[self._starts[bisect.bisect(self._starts, off) - 1]]
            run.windows -= 1
            self._free_if_unused(run)

    def _free_if_unused(self, run: Run) -> None:
        if run.holder == 0 and run.windows == 0 and run.off in self._runs:
            del self._runs[run.off]
            self._starts.remove(run.off)
            self.node.window_allocator.free(run.off)
