"""Interrupts from one card to the host: vectors, sources, and the fall-backs (HW 4.3, HW-12..21).

MSI-X gives every request a vector of its own. With fewer than nine vectors the driver falls back to
MSI, then to INTx: one line for everything, whose owner calls ``dispatch``. In every mode a request
has an eventfd ``fd`` to wait on, so that a C loop does not care which mode it is.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import operator
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum

from mic_emu.bar import Bus, close_all, drain, eventfd
from mic_emu.layout import CONSTANTS as C
from mic_emu.log import Logger
from mic_emu.pciconfig import ConfigSpace

VECTORS = C["MSIX_VECTORS"]
ENABLE_MASK = C["IRQ_ENABLE_MASK"]
DOORBELL_MASK = (1 << C["SRC_DOORBELLS"]) - 1
MASTER, INTX_OFF = C["PCI_COMMAND_MASTER"], C["PCI_COMMAND_INTX_OFF"]
MSIX_CONTROL, MSI_CONTROL = C["PCI_CAP_MSIX"] + 2, C["PCI_CAP_MSI"] + 2

# What a message is written to: an x86 host's interrupt controllers. Nothing here looks at it; lspci and dumps do.
MSI_ADDRESS, MSI_DATA = 0xFEE0_0000, 0x4000


class Kind(IntEnum):
    """Type of an interrupt source."""

    DB = 0
    DMA = 1
    ERR = 2


SOURCES = {
    Kind.DB: (C["SRC_DOORBELL"], C["SRC_DOORBELLS"]),
    Kind.DMA: (C["SRC_DMA"], C["SRC_DMAS"]),
    Kind.ERR: (C["SRC_ERR"], 1),
}


class Mode(Enum):
    """How the card signals the host."""

    MSIX = "msix"
    MSI = "msi"
    INTX = "intx"


def source_offset(kind: int, index: int) -> int:
    """Bit of a source in SICR0, SICE0, SIAC0 and MXAR. Raises OSError EINVAL (HW-16)."""
    if kind not in SOURCES:
        raise OSError(errno.EINVAL, f"interrupt type {kind} does not exist")
    first, count = SOURCES[Kind(kind)]
    if not 0 <= index < count:
        raise OSError(errno.EINVAL, f"{Kind(kind).name} source {index} is outside 0..{count - 1}")
    return first + index


@dataclass(eq=False)
class Interrupt:
    """One requested source. ``fd`` becomes readable when it fired; ``drain`` it before looking.

    ``vector`` is 0 in MSI and INTx mode; ``cookie`` is the driver's number for it: the low half
    the vector, the high half the source (MSI-X) or the callback's id. Cookie 0 is legal.
    """

    owner: Interrupts
    name: str
    offset: int
    vector: int
    cookie: int
    fd: int
    callback: Callable[[], None] | None = None

    def ack(self) -> None:
        """What a handler does first (HW-21)."""
        self.owner.ack()

    def free(self) -> None:
        """Give the source back. A second call only warns."""
        self.owner.free(self)


class Interrupts:
    """Owner of one card's interrupts on the host. Requests come from any thread.

    ``mode`` forces a mode that configuration space offers; None takes the best one. Raises OSError:
    EINVAL no mode is possible (HW-15), ENOSPC the forced one is not.
    """

    def __init__(self, bus: Bus, mode: Mode | str | None = None, log: Logger | None = None) -> None:
        self._bus = bus
        self._log: Logger = log or logging.getLogger("micemu.irq")
        self._lock = threading.Lock()
        self._config = ConfigSpace(bus)
        self._next_db = 0
        self._ids = itertools.count()
        self._map = [0] * VECTORS  # software copy of MXAR, by vector
        self._requests: dict[int, Interrupt] = {}  # by cookie
        self._a0 = self._config.vendor != 0 and self._config.revision == 0
        self.mode = self._choose(Mode(mode) if mode is not None else None)
        self._switch_on()

    # --- set-up

    def _offers(self, mode: Mode) -> bool:
        if self._config.vendor == 0:
            return mode is Mode.MSIX  # a bare bus delivers as MSI-X
        if mode is Mode.MSIX:
            return self._config.msix_vectors >= VECTORS
        return self._config.has_msi if mode is Mode.MSI else self._config.has_intx

    def _choose(self, wanted: Mode | None) -> Mode:
        for mode in (wanted,) if wanted else Mode:
            if self._offers(mode):
                return mode
        if wanted:
            raise OSError(errno.ENOSPC, f"the card offers no {wanted.value} interrupts")
        raise OSError(errno.EINVAL, "the card offers neither nine MSI-X vectors, nor MSI, nor an INTx pin")

    def _switch_on(self) -> None:
        if self._config.vendor == 0:
            return
        config = self._config
        config.update(C["PCI_COMMAND"], 2, set_=MASTER)
        if self.mode is Mode.MSIX:
            config.update(MSIX_CONTROL, 2, set_=C["PCI_MSIX_ENABLE"])
            for v in range(VECTORS):
                self._bus.write("msix_addr", MSI_ADDRESS, v)
                self._bus.write("msix_data", MSI_DATA + v, v)
                self._bus.write("msix_ctrl", 0, v)
        elif self.mode is Mode.MSI:
            at = C["PCI_CAP_MSI"]  # a message of 64-bit address: low, high, data
            for off, size, value in ((4, 4, MSI_ADDRESS), (8, 4, 0), (12, 2, MSI_DATA)):
                config.write(at + off, size, value)
            config.update(MSI_CONTROL, 2, set_=C["PCI_MSI_ENABLE"])
        if self.mode is not Mode.INTX:
            config.update(C["PCI_COMMAND"], 2, set_=INTX_OFF)

    def close(self) -> None:
        """Undo everything: sources freed and disabled, the function's interrupts off."""
        for irq in list(self._requests.values()):
            irq.free()
        self.disable()
        if self._config.vendor == 0:
            return
        if self.mode is Mode.MSIX:
            for v in range(VECTORS):
                self._bus.write("msix_ctrl", 1, v)
            self._config.update(MSIX_CONTROL, 2, clear=C["PCI_MSIX_ENABLE"])
        elif self.mode is Mode.MSI:
            self._config.update(MSI_CONTROL, 2, clear=C["PCI_MSI_ENABLE"])
        self._config.update(C["PCI_COMMAND"], 2, clear=INTX_OFF)

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- the hardware's registers

    def enable(self) -> None:
        """Let doorbells and DMA channels interrupt; with MSI-X their causes clear by themselves."""
        if self.mode is Mode.MSIX:
            self._bus.write("siac0", self._bus.read("siac0") | ENABLE_MASK)
        self._bus.write("sice0", self._bus.read("sice0") | ENABLE_MASK)

    def disable(self) -> None:
        """No interrupt leaves the card; causes stay pending."""
        self._bus.write("sicc0", self._bus.read("sice0"))
        if self.mode is Mode.MSIX:
            self._bus.write("siac0", self._bus.read("siac0") & ~ENABLE_MASK)

    def restore(self) -> None:
        """Write the vector map again: a card reset loses it (HW 4.3)."""
        if self.mode is Mode.INTX:
            return
        with self._lock:
            for v, bits in enumerate(self._map):
                if bits:
                    self._bus.write("mxar", self._bus.read("mxar", v) | bits, v)

    def ack(self) -> None:
        """The stepping workaround a handler runs first: A0 clears the pending array, later ones
        enable again (HW-21). It does not acknowledge SICR0."""
        if self._a0:
            self._bus.write("msixpbacr", 1)
        else:
            self.enable()

    # --- sources

    def next_db(self) -> int:
        """Doorbell for a new user: 0, 1, 2, 3, 0, ... never given back, so they are shared (HW-19)."""
        with self._lock:
            db = self._next_db
            self._next_db = (db + 1) % C["SRC_DOORBELLS"]
            return db

    def request(
        self, kind: int, index: int, name: str, callback: Callable[[], None] | None = None
    ) -> Interrupt:
        """Take a source: ``Kind.DB`` 0..3, ``Kind.DMA`` 0..7 or ``Kind.ERR`` 0.

        ``callback`` is called by ``dispatch`` (MSI, INTx); with MSI-X the owner of ``fd`` acts.
        Raises OSError EINVAL (no such source), ENOSPC (all nine vectors are taken; HW-16).
        """
        offset = source_offset(kind, index)
        with self._lock:
            if self.mode is Mode.MSIX:
                irq = self._request_vector(offset, name, callback)
            else:
                irq = self._request_callback(offset, name, callback)
            self._requests[irq.cookie] = irq
        return irq

    def _request_vector(self, offset: int, name: str, callback: Callable[[], None] | None) -> Interrupt:
        for vector in range(VECTORS):
            if not self._map[vector]:
                break
        else:
            raise OSError(errno.ENOSPC, f"{name}: all {VECTORS} interrupt vectors are taken")
        fd = self._bus.vector_fd(vector)
        drain(fd)  # a ring for the vector's last owner is not ours
        self._map[vector] = 1 << offset
        self._bus.write("mxar", self._bus.read("mxar", vector) | 1 << offset, vector)
        return Interrupt(self, name, offset, vector, vector | offset << 16, fd, callback)

    def _request_callback(self, offset: int, name: str, callback: Callable[[], None] | None) -> Interrupt:
        if self.mode is Mode.MSI:
            self._map[0] |= 1 << offset
            self._bus.write("mxar", self._bus.read("mxar", 0) | 1 << offset, 0)
        return Interrupt(self, name, offset, 0, next(self._ids) << 16, eventfd(), callback)

    def free(self, irq: Interrupt) -> None:
        """Give a source back; an unknown one only gives a warning."""
        with self._lock:
            if self._requests.get(irq.cookie) is not irq:
                self._log.warning(f"irq: {irq.name} (cookie {irq.cookie:#x}) is not requested")
                return
            del self._requests[irq.cookie]
            if self.mode is Mode.MSIX:
                self._unmap(irq.vector, irq.offset)
            else:
                # MXAR0 is shared: the bit goes with the last request of the source.
                if self.mode is Mode.MSI and not any(self._of(irq.offset)):
                    self._unmap(0, irq.offset)
                close_all([irq.fd])

    def _unmap(self, vector: int, offset: int) -> None:
        self._map[vector] &= ~(1 << offset)
        self._bus.write("mxar", self._bus.read("mxar", vector) & ~(1 << offset), vector)

    def _of(self, offset: int) -> Iterator[Interrupt]:
        return (irq for irq in self._requests.values() if irq.offset == offset)

    # --- MSI and INTx

    @property
    def dispatch_fd(self) -> int | None:
        """Call ``dispatch`` when this is readable; None with MSI-X (every request has its vector)."""
        return None if self.mode is Mode.MSIX else self._bus.vector_fd(0)

    def dispatch(self) -> int:
        """The one handler of MSI and INTx: acknowledge SICR0, then serve the doorbells that rang.

        Returns the cause bits seen, 0 = not ours. DMA causes are acknowledged and never dispatched:
        completion is seen by polling only (HW-15).
        """
        drain(self._bus.vector_fd(0))
        causes = self._bus.read("sicr0")
        if not causes:
            return 0
        self._bus.write("sicr0", causes)
        with self._lock:
            due = [irq for irq in self._requests.values() if causes & DOORBELL_MASK & 1 << irq.offset]
            for irq in due:
                os.write(irq.fd, (1).to_bytes(8, "little"))
        for irq in due:
            if irq.callback:
                irq.callback()
        return causes

    def software_map(self, vector: int) -> int:
        """Bitmap of the sources that this driver mapped to a vector."""
        with self._lock:
            return self._map[vector]

    def rows(self) -> list[tuple[int, int, int, list[str]]]:
        """Per vector in use: number, MXAR register, bitmap of the sources that are heard, names of its requests (HW 9).

        INTx has no map: every requested source is heard.
        """
        with self._lock:
            vectors = range(VECTORS) if self.mode is Mode.MSIX else range(1)
            rows = []
            for v in vectors:
                users = [r for r in self._requests.values() if r.vector == v]
                mxar = self._bus.read("mxar", v)
                heard = functools.reduce(operator.or_, (1 << r.offset for r in users), 0)
                rows.append((v, mxar, heard if self.mode is Mode.INTX else mxar, [r.name for r in users]))
            return rows
