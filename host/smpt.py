"""The system memory page table: host memory as the card sees it (HW 3, HW-5..11).

32 entries of 16 GiB each translate the card addresses ``0x80_0000_0000 .. 0xFF_FFFF_FFFF``. The
software table here is the truth; the registers are written from it, at probe and again at every
start, because a card reset may scramble them (HW-10).

Where the chapter offers a choice: a partial match in the first pass falls through to the free
entries instead of failing the whole map; a request for more than 32 pieces fails.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS
from mic_emu.log import Logger

ENTRIES = CONSTANTS["SMPT_ENTRIES"]
PAGE_SHIFT = CONSTANTS["SMPT_SHIFT"]
PAGE_SIZE = 1 << PAGE_SHIFT
BASE = CONSTANTS["SMPT_BASE"]
END = CONSTANTS["SMPT_END"]
MAX_HOST_ADDR = 1 << 64  # a register holds bits 63:34 of the host address


@dataclass
class Entry:
    """``host_addr`` is the 16 GiB page that the entry shows; ``refs`` counts mapped bytes."""

    host_addr: int
    refs: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the debug dump, decoded."""

    index: int
    host_addr: int
    refs: int
    register: int


def _pieces(addr: int, size: int) -> list[int]:
    """Byte counts of ``[addr, addr + size)`` cut at 16 GiB boundaries."""
    counts = []
    while size:
        n = min(size, PAGE_SIZE - addr % PAGE_SIZE)
        counts.append(n)
        addr += n
        size -= n
    return counts


class Smpt:
    """Owner of one card's page table. All methods may be called from any thread.

    ``mapped_bytes``, ``map_count`` and ``unmap_count`` are the debug counters of HW 3.
    """

    def __init__(self, bus: Bus, log: Logger) -> None:
        self._bus = bus
        self._log = log
        self._lock = threading.Lock()
        self._entries = [Entry(i << PAGE_SHIFT) for i in range(ENTRIES)]
        self.mapped_bytes = 0
        self.map_count = 0
        self.unmap_count = 0

    def init(self) -> None:
        """Identity map of the first 512 GiB, no references, registers written (HW-5)."""
        with self._lock:
            self._entries = [Entry(i << PAGE_SHIFT) for i in range(ENTRIES)]
            self.mapped_bytes = self.map_count = self.unmap_count = 0
            self._write_all()

    def restore(self) -> None:
        """Write all 32 registers from the software table (HW-10)."""
        with self._lock:
            self._write_all()

    def uninit(self) -> None:
        """Probe is being undone: warn about every entry that is still referenced."""
        with self._lock:
            for i, e in enumerate(self._entries):
                if e.refs:
                    self._log.warning(f"smpt: entry {i} still has {e.refs} bytes mapped")

    def map(self, host_addr: int, size: int) -> int:
        """Card address of ``[host_addr, host_addr + size)`` bytes, or 0 when it cannot be mapped.

        0 is never a valid card address of host memory. A failure changes nothing (HW-8).
        """
        if not 0 < size <= ENTRIES * PAGE_SIZE or not 0 <= host_addr <= MAX_HOST_ADDR - size:
            return 0
        counts = _pieces(host_addr, size)
        if len(counts) > ENTRIES:
            return 0
        base = host_addr & ~(PAGE_SIZE - 1)
        with self._lock:
            first = self._find_match(base, len(counts))
            if first is None:
                first = self._find_free(len(counts))
            if first is None:
                self._log.warning(f"smpt: no run of {len(counts)} entries for {host_addr:#x}+{size:#x}")
                return 0
            for i, nbytes in enumerate(counts):
                entry = self._entries[first + i]
                if not entry.refs and entry.host_addr != base + i * PAGE_SIZE:
                    entry.host_addr = base + i * PAGE_SIZE
                    self._write(first + i)
                entry.refs += nbytes
            self.mapped_bytes += size
            self.map_count += 1
        return BASE + (first << PAGE_SHIFT) + host_addr % PAGE_SIZE

    def unmap(self, card_addr: int, size: int) -> None:
        """Take back a mapping. Registers keep their value, so that the next map can reuse it.

        Size 0 does nothing; an address outside the window, or a range that leaves it, is logged and
        ignored; more bytes than were mapped give a warning and a negative count (HW-9).
        """
        if size == 0:
            return
        if size < 0 or not BASE <= card_addr < END or card_addr + size > END:
            self._log.warning(f"smpt: unmap of {card_addr:#x}+{size:#x} is outside the window")
            return
        first = (card_addr - BASE) >> PAGE_SHIFT
        with self._lock:
            for i, nbytes in enumerate(_pieces(card_addr, size), first):
                entry = self._entries[i]
                entry.refs -= nbytes
                if entry.refs < 0:
                    self._log.warning(f"smpt: entry {i} unmapped below zero ({entry.refs} bytes)")
            self.mapped_bytes -= size
            self.unmap_count += 1

    def to_host(self, card_addr: int) -> int:
        """Host address behind a card address. Raises OSError EINVAL outside the window."""
        if not BASE <= card_addr < END:
            raise OSError(errno.EINVAL, f"card address {card_addr:#x} is outside the SMPT window")
        with self._lock:
            entry = self._entries[(card_addr - BASE) >> PAGE_SHIFT]
            return entry.host_addr + card_addr % PAGE_SIZE

    def rows(self) -> list[Row]:
        """The software table beside the registers, for dumps (HW 9)."""
        with self._lock:
            return [
                Row(i, e.host_addr, e.refs, self._bus.read("smpt", i)) for i, e in enumerate(self._entries)
            ]

    def _find_match(self, base: int, n: int) -> int | None:
        """First of ``n`` entries in a row that already show ``base``, ``base`` + 16 GiB, ..."""
        for first in range(ENTRIES - n + 1):
            if all(self._entries[first + i].host_addr == base + i * PAGE_SIZE for i in range(n)):
                return first
        return None

    def _find_free(self, n: int) -> int | None:
        """First of ``n`` entries in a row without references (HW-7)."""
        for first in range(ENTRIES - n + 1):
            if all(not self._entries[first + i].refs for i in range(n)):
                return first
        return None

    def _write(self, index: int) -> None:
        # Bits 31:2 are the host address >> 34, bit 0 clear = snooped.
        self._bus.write("smpt", (self._entries[index].host_addr >> PAGE_SHIFT) << 2, index)

    def _write_all(self) -> None:
        for i in range(ENTRIES):
            self._write(i)
