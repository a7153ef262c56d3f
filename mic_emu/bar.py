"""One process's view of a card: BARs, host memory, registers by name, doorbells.

``Slot`` is the PCI slot: it creates the memories and interrupt lines of one card. ``Bus`` attaches
to them, in any process that was given the descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.memory import View, create_gddr, create_shm

FD_COUNT: int = lib.MIC_FD_COUNT
_EVENTFD_FLAGS = 0o2000000 | 0o4000  # EFD_CLOEXEC | EFD_NONBLOCK


def eventfd() -> int:
    """A new non-blocking eventfd. Raises OSError."""
    fd: int = lib.mic_eventfd(_EVENTFD_FLAGS)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


def create_slot(name: str, gddr_size: int, host_fd: int) -> list[int]:
    """Create the memories and lines of one card; returns the descriptors in ``mic_bus_fd`` order.

    ``gddr_size`` is in bytes; ``host_fd`` is the instance's host memory, shared by all cards
    (duplicated here). The caller owns the descriptors.
    """
    fds: list[int] = []
    try:
        fds.append(create_gddr(f"{name}-gddr", gddr_size))
        fds.append(create_shm(f"{name}-mmio", layout.MMIO_SIZE))
        fds.append(os.dup(host_fd))
        fds.append(create_shm(f"{name}-config", layout.CONSTANTS["CONFIG_OBJECT_SIZE"]))
        fds.append(create_shm(f"{name}-faults", layout.CONSTANTS["FAULT_SIZE"]))
        # Registers, configuration space and filters are always there: reserve them now (no SIGBUS later).
        for fd, size in (
            (fds[1], layout.MMIO_SIZE),
            (fds[3], layout.CONSTANTS["CONFIG_OBJECT_SIZE"]),
            (fds[4], layout.CONSTANTS["FAULT_SIZE"]),
        ):
            rc = lib.mic_reserve(fd, 0, size)
            if rc < 0:
                raise OSError(-rc, f"{name}: /dev/shm has no room for the card's registers")
        while len(fds) < FD_COUNT:
            fds.append(eventfd())
    except BaseException:
        close_all(fds)
        raise
    return fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class Counts(NamedTuple):
    """How often what was signalled. A host doorbell and its vector differ: while the source is disabled or
    the vector masked rings merge into one interrupt, and several sources may share a vector."""

    doorbells: list[int]  # rings of each host doorbell
    vectors: list[int]  # interrupts of each host vector (``vector_fd``)
    lines: list[int]  # signals of each card line (``irq_fd``): rings of card doorbells, then DMA channels


class Bus:
    """Attached card. ``fds`` stay open until ``close``; they belong to this object from now on."""

    def __init__(self, fds: Sequence[int]) -> None:
        if len(fds) != FD_COUNT:
            raise ValueError(f"a card has {FD_COUNT} descriptors, not {len(fds)}")
        self.fds = list(fds)
        self.ptr = lib.mic_bus_attach(ffi.new("int[]", self.fds))
        if not self.ptr:
            raise OSError(ffi.errno, f"cannot map the card: {os.strerror(ffi.errno)}")
        self.gddr = View(lib.mic_bus_gddr(self.ptr), lib.mic_bus_gddr_size(self.ptr))
        self.host = View(lib.mic_bus_host(self.ptr), lib.mic_bus_host_size(self.ptr))
        self.mmio = View(lib.mic_bus_mmio(self.ptr), layout.MMIO_SIZE)
        self.config = View(lib.mic_bus_config(self.ptr), layout.CONSTANTS["CONFIG_SIZE"])
        self.faults = View(lib.mic_bus_faults(self.ptr), layout.CONSTANTS["FAULT_SIZE"])

    def close(self) -> None:
        """Unmap and close; the object is useless afterwards."""
        if self.ptr:
            lib.mic_bus_detach(self.ptr)
            self.ptr = ffi.NULL
            close_all(self.fds)

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def replace_gddr(self, fd: int) -> None:
        """The card's memory is the object behind ``fd`` from now on (a new generation after a reset), under
        the same pointer and in the same place of ``fds``; ``fd`` is closed. Raises OSError."""
        try:
            rc = lib.mic_bus_replace_gddr(self.ptr, fd)
        finally:
            os.close(fd)
        if rc < 0:
            raise OSError(-rc, f"cannot map the card's memory: {os.strerror(-rc)}")

    def vector_fd(self, vector: int) -> int:
        """eventfd of interrupt vector 0..15 towards the host."""
        return self.fds[int(lib.MIC_FD_VEC) + vector]

    def irq_fd(self, line: int) -> int:
        """eventfd of a card interrupt line: doorbells 0..15, then DMA channels 4..7."""
        return self.fds[int(lib.MIC_FD_IRQ) + line]

    def read(self, name: str, index: int = 0) -> int:
        """Register by name."""
        return int(lib.mic_mmio_read(self.ptr, layout.reg(name, index)))

    def write(self, name: str, value: int, index: int = 0) -> None:
        """Register by name, with the hardware's side effects."""
        lib.mic_mmio_write(self.ptr, layout.reg(name, index), value & 0xFFFFFFFF)

    def hw_store(self, name: str, value: int, index: int = 0) -> None:
        """Store as the hardware does, without side effects (board process only)."""
        lib.mic_hw_store(self.ptr, layout.reg(name, index), value & 0xFFFFFFFF)

    def hw_reset(self) -> None:
        """Registers to their reset values, doorbells in flight dropped (board process only)."""
        lib.mic_hw_reset(self.ptr)

    def doorbells_disturbed(self) -> bool:
        """Is a fault filter armed that acts on doorbells?"""
        return bool(self.faults.load(0, 4) >> layout.CONSTANTS["FAULT_AT_DOORBELL"] & 1)

    def ring_host(self, db: int, source: int = 0) -> None:
        """The card rings host doorbell ``db``; unknown numbers are ignored (HW-18).

        ``source``: what fault filters know the ringer by, 0 for hand-shakes of all kinds.
        """
        lib.mic_ring_host(self.ptr, db, source)

    def ring_card(self, db: int, source: int = 0) -> None:
        """The host rings card doorbell ``db``; unknown numbers are ignored (HW-18)."""
        lib.mic_ring_card(self.ptr, db, source)

    def counts(self) -> Counts:
        """Rings and interrupts since the slot was made; a reset leaves them."""
        at = ffi.cast("uint64_t *", lib.mic_bus_config(self.ptr) + layout.CONSTANTS["COUNTS"])
        rings, vectors = layout.CONSTANTS["SRC_DOORBELLS"], layout.CONSTANTS["MSIX_TABLE_SIZE"]
        all_of_them = [int(at[i]) for i in range(rings + vectors + layout.CONSTANTS["CARD_IRQS"])]
        return Counts(
            all_of_them[:rings], all_of_them[rings : rings + vectors], all_of_them[rings + vectors :]
        )

    def set_over_pci(self) -> None:
        """This process is the host: register accesses need memory decoding enabled and power state D0."""
        lib.mic_bus_set_over_pci(self.ptr, True)

    def config_changed(self) -> None:
        """Configuration space was written: deliver the interrupts that became possible."""
        lib.mic_bus_config_changed(self.ptr)

    def card_view(self, addr: int, length: int) -> View:
        """Memory at a card address: GDDR, or host memory through the SMPT (HW-11).

        Raises IndexError when any byte is outside.
        """
        p = lib.mic_card_at(self.ptr, addr, length)
        if p == ffi.NULL:
            raise IndexError(f"card address {addr:#x}+{length:#x} is not backed by memory")
        return View(ffi.cast("uint8_t *", p), length)


def drain(fd: int) -> None:
    """Clear an eventfd (non-blocking)."""
    try:
        os.read(fd, 8)
    except BlockingIOError:
        pass
