"""A card's hardware inside one process: BARs, host memory, registers at their reset values. No board."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mic_emu.bar import Bus, create_slot
from mic_emu.layout import register_words
from mic_emu.memory import create_shm


@contextmanager
def new_card(gddr: int = 64 << 20, host: int = 40 << 30) -> Iterator[Bus]:
    """An attached card with ``gddr`` bytes of GDDR and ``host`` bytes of host memory, both sparse.

    There is no configuration space, so nothing has to be enabled before registers work.
    """
    host_fd = create_shm("test-host", host)
    try:
        fds = create_slot("test", gddr, host_fd)
    finally:
        os.close(host_fd)
    with Bus(fds) as bus:
        bus.hw_reset()
        yield bus


def describe(bus: Bus) -> str:
    """Registers that are not 0, one a line."""
    rows = [(off, name, bus.mmio.load(off, 4)) for off, name, _ in register_words()]
    return "\n".join(f"{off:#07x}  {name:<14} {value:#010x}" for off, name, value in rows if value)
