"""A card's hardware inside one process: no board, no host process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mic_emu import bar, memory

MiB = 1 << 20
GiB = 1 << 30


@contextmanager
def make_bus(gddr: int = 64 * MiB, host: int = 40 * GiB) -> Iterator[bar.Bus]:
    """An attached card with registers at their reset values (memories are sparse)."""
    host_fd = memory.create_shm("test-host", host)
    try:
        fds = bar.create_slot("test", gddr, host_fd)
    finally:
        os.close(host_fd)
    with bar.Bus(fds) as bus:
        bus.hw_reset()
        yield bus


def rang(fd: int) -> int:
    """Take what an eventfd has counted; 0 when it did not ring."""
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0
