"""PCI configuration space of a card: what the host finds before it knows what it has (HW 1).

``build`` lays the function out as a powered-on X100 shows it, with the capabilities where the real
card has them; ``ConfigSpace.write`` is the configuration cycle: read-only bits stay, status bits
clear on 1, BARs answer the sizing protocol, and the interrupt logic looks at the new mode bits.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

from mic_emu import layout
from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS as C

STEPPINGS = {0x00: "A0", 0x10: "B0", 0x11: "B1", 0x20: "C0"}
DEVICE_IDS = range(C["PCI_DEVICE_FIRST"], C["PCI_DEVICE_LAST"] + 1)

CLASS_COPROCESSOR = 0x0B4000
_CAP_PM, _CAP_MSI, _CAP_EXP, _CAP_MSIX, _EXT_AER = 0x01, 0x05, 0x10, 0x11, 0x0001
_PCI_EXP_SIZE = 0x3C
_AER = 0x100
_MSIX_TABLE = layout.reg("msix_addr")
_MSIX_PBA = layout.reg("msix_pba")
_MMIO_BIR = 4

# As firmware lays out a bus. A step holds the largest aperture: GDDR ends where the window bank begins.
APERTURES, APERTURE_STEP = 0x3C00_0000_0000, C["WINDOW_BANK"]
REGISTERS = 0xF000_0000


def stepping_name(revision: int) -> str:
    """``A0``, ``B0``, ``B1``, ``C0``, or ``??`` for a revision id (HW-3)."""
    return STEPPINGS.get(revision, "??")


def revision_of(stepping: str) -> int:
    """Revision id of a stepping name. Raises ValueError for an unknown one."""
    for revision, name in STEPPINGS.items():
        if name == stepping.upper():
            return revision
    raise ValueError(f"unknown stepping {stepping!r}: one of {', '.join(STEPPINGS.values())}")


def family_name(vendor: int, device: int) -> str | None:
    """``x100`` for the ids that the host driver binds, None for all others (HW-3)."""
    return "x100" if vendor == C["PCI_VENDOR"] and device in DEVICE_IDS else None


@dataclass(frozen=True)
class PciIdentity:
    """What can be chosen about a card's PCI function.

    ``msix_vectors`` 0..16 (0: no MSI-X capability), ``msi`` and ``intx`` switch the fall-backs of
    HW-15 on and off. Addresses are what the firmware assigned; they only have to be aligned.
    """

    device: int = 0x225C
    revision: int = 0x20
    subsystem_device: int = 0x2500
    msix_vectors: int = 16
    msi: bool = True
    intx: bool = True
    aperture_base: int = APERTURES
    mmio_base: int = REGISTERS
    irq_line: int = 11


def placed(identity: PciIdentity, index: int) -> PciIdentity:
    """The function in slot ``index`` (0, 1, ...): its BARs at addresses of their own."""
    return dataclasses.replace(
        identity,
        aperture_base=APERTURES + index * APERTURE_STEP,
        mmio_base=REGISTERS + index * layout.MMIO_SIZE,
    )


def bar_size(nbytes: int) -> int:
    """The power of two that holds ``nbytes``: the size of a BAR."""
    return 1 << (nbytes - 1).bit_length()


class ConfigSpace:
    """The 4096 bytes of one function. One process writes them (the host's PCI core)."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._view = bus.config
        self._sizes = {C["PCI_BAR0"]: bar_size(bus.gddr.size), C["PCI_BAR4"]: layout.MMIO_SIZE}

    # --- reading

    def read(self, off: int, size: int) -> int:
        """A configuration read of 1, 2 or 4 bytes at its natural alignment."""
        self._check(off, size)
        return self._view.load(off, size)

    def raw(self) -> bytes:
        """All 4096 bytes."""
        return self._view.read(0, self._view.size)

    def capability(self, cap_id: int) -> int:
        """Offset of a capability in the standard list, 0 when the function does not have it."""
        at = self.read(C["PCI_CAP_POINTER"], 1)
        for _ in range(48):  # as many as fit: a looping list ends too
            if at < 0x40:
                return 0
            if self.read(at, 1) == cap_id:
                return at
            at = self.read(at + 1, 1) & 0xFC
        return 0

    @property
    def vendor(self) -> int:
        """0x8086 on a card, 0 where no function was built."""
        return self.read(0, 2)

    @property
    def device(self) -> int:
        """PCI device id."""
        return self.read(2, 2)

    @property
    def revision(self) -> int:
        """Revision id = stepping."""
        return self.read(C["PCI_REVISION"], 1)

    @property
    def family(self) -> str | None:
        """``x100``, or None when the host driver would not bind this function (HW-3)."""
        return family_name(self.vendor, self.device)

    @property
    def stepping(self) -> str:
        """Name of the stepping (HW-3)."""
        return stepping_name(self.revision)

    @property
    def msix_vectors(self) -> int:
        """Size of the MSI-X table, 0 without the capability."""
        at = self.capability(_CAP_MSIX)
        return (self.read(at + 2, 2) & 0x7FF) + 1 if at else 0

    @property
    def has_msi(self) -> bool:
        """Is there an MSI capability?"""
        return self.capability(_CAP_MSI) != 0

    @property
    def has_intx(self) -> bool:
        """Is an interrupt pin wired?"""
        return self.read(C["PCI_INTERRUPT_PIN"], 1) != 0

    def bar(self, index: int) -> int:
        """Address that 64-bit memory BAR ``index`` decodes."""
        at = C["PCI_BAR0"] + 4 * index
        return (self.read(at, 4) & ~0xF) | self.read(at + 4, 4) << 32

    # --- writing

    def write(self, off: int, size: int, value: int) -> None:
        """A configuration write of 1, 2 or 4 bytes; only bits that the hardware lets go change."""
        self._check(off, size)
        word = off & ~3
        shift = 8 * (off - word)
        enabled = ((1 << (8 * size)) - 1) << shift
        old = self._view.load(word, 4)
        given = (value << shift) & enabled
        writable, clearing = self._masks(word)
        new = (old & ~(writable & enabled)) | (given & writable)
        new &= ~(given & clearing)
        if new != old:
            # Byte enables: bytes outside the access are not stored, their bits are equal anyway.
            self._view.store(word, 4, new)
        self._bus.config_changed()

    def update(self, off: int, size: int, clear: int = 0, set_: int = 0) -> None:
        """Read, change bits, write."""
        self.write(off, size, (self.read(off, size) & ~clear) | set_)

    def _masks(self, word: int) -> tuple[int, int]:
        """Writable and write-1-to-clear bits of the 32-bit word at ``word``."""
        msi, msix, pm, exp = (self.capability(c) for c in (_CAP_MSI, _CAP_MSIX, _CAP_PM, _CAP_EXP))
        for bar, size in self._sizes.items():
            if word == bar:
                return ~(size - 1) & 0xFFFFFFF0, 0
            if word == bar + 4:
                return (~(size - 1) >> 32) & 0xFFFFFFFF, 0
        table: dict[int, tuple[int, int]] = {
            C["PCI_COMMAND"]: (0x0547, 0xF900_0000),  # I/O, memory, master, parity, SERR, INTx off
            0x0C: (0xFF, 0),  # cache line size
            0x3C: (0xFF, 0),  # interrupt line
        }
        if pm:
            table[pm + 4] = (0x0003, 0x8000)  # power state; PME status
        if msi:
            table |= {msi: (0x0071_0000, 0), msi + 4: (0xFFFFFFFC, 0), msi + 8: (0xFFFFFFFF, 0)}
            table[msi + 12] = (0xFFFF, 0)
        if msix:
            table[msix] = (0xC000_0000, 0)
        if exp:
            table |= {exp + 8: (0x7FFF, 0x000F_0000), exp + 16: (0x0FFB, 0), exp + 40: (0x001F, 0)}
        if self.read(_AER, 2) == _EXT_AER:
            table |= {_AER + 4: (0, 0xFFFFFFFF), _AER + 8: (0x003F_F030, 0), _AER + 12: (0x003F_F030, 0)}
            table |= {_AER + 16: (0, 0xFFFFFFFF), _AER + 20: (0xF1C1, 0)}
        return table.get(word, (0, 0))

    def _check(self, off: int, size: int) -> None:
        if size not in (1, 2, 4) or off % size or not 0 <= off <= self._view.size - size:
            raise ValueError(f"no configuration cycle of {size} bytes at {off:#x}")

    # --- printing

    def hexdump(self, slot: str, full: bool = True) -> str:
        """The bytes in the form that ``lspci -F FILE`` reads; ``slot`` is ``bb:dd.f``.

        ``full`` prints the extended space too, as ``lspci -xxxx`` does.
        """
        data = self.raw()
        name = "Co-processor: Intel Corporation Xeon Phi coprocessor"
        lines = [f"{slot} {name} (rev {self.revision:02x})"]
        for off in range(0, 4096 if full else 256, 16):
            lines.append(f"{off:02x}: {data[off : off + 16].hex(' ')}")
        return "\n".join([*lines, "", ""])


def build(bus: Bus, identity: PciIdentity | None = None) -> ConfigSpace:
    """Write the power-on contents of the function behind ``bus``.

    Raises ValueError for an identity that no card can have.
    """
    ident = identity or PciIdentity()
    _check_identity(ident, bar_size(bus.gddr.size))
    page = bytearray(C["CONFIG_SIZE"])
    _header(page, ident)
    last = C["PCI_CAP_POINTER"]
    for at, body in _capabilities(ident):
        page[last] = at  # link: the pointer byte, then each capability's second byte
        page[at : at + len(body)] = body
        last = at + 1
    _error_reporting(page)
    bus.config.write(0, bytes(page))
    for v in range(C["MSIX_TABLE_SIZE"]):
        bus.hw_store("msix_ctrl", 1, v)  # every vector is masked at power-on
    return ConfigSpace(bus)


def _check_identity(ident: PciIdentity, aperture: int) -> None:
    if not 0 <= ident.device <= 0xFFFF or not 0 <= ident.revision <= 0xFF:
        raise ValueError(f"no such PCI function: device {ident.device:#x} revision {ident.revision:#x}")
    if not 0 <= ident.msix_vectors <= C["MSIX_TABLE_SIZE"]:
        raise ValueError(f"MSI-X vectors: 0..{C['MSIX_TABLE_SIZE']}, not {ident.msix_vectors}")
    if ident.aperture_base % aperture or ident.mmio_base % layout.MMIO_SIZE:
        raise ValueError("a BAR must be aligned to its size")


def _header(page: bytearray, ident: PciIdentity) -> None:
    pin = 1 if ident.intx else 0
    struct.pack_into("<HHHH", page, 0x00, C["PCI_VENDOR"], ident.device, 0, C["PCI_STATUS_CAPS"])
    page[0x04] = C["PCI_COMMAND_MEMORY"]  # the firmware has enabled decoding; mastering is the driver's
    struct.pack_into("<I", page, C["PCI_REVISION"], CLASS_COPROCESSOR << 8 | ident.revision)
    page[0x0C] = 0x10  # cache line: 64 bytes
    _bar64(page, C["PCI_BAR0"], ident.aperture_base, prefetch=True)
    _bar64(page, C["PCI_BAR4"], ident.mmio_base, prefetch=False)
    struct.pack_into("<HH", page, 0x2C, C["PCI_VENDOR"], ident.subsystem_device)
    struct.pack_into("<BB", page, 0x3C, ident.irq_line if ident.intx else 0xFF, pin)


def _bar64(page: bytearray, at: int, base: int, prefetch: bool) -> None:
    struct.pack_into("<Q", page, at, base | 0x4 | (0x8 if prefetch else 0))


def _capabilities(ident: PciIdentity) -> list[tuple[int, bytes]]:
    caps = [(C["PCI_CAP_PM"], struct.pack("<BBHHH", _CAP_PM, 0, 0x0003, 0x0008, 0))]
    caps.append((C["PCI_CAP_EXP"], _express()))
    if ident.msi:
        # 64-bit address, one of one message: the driver's fall-back uses a single vector.
        caps.append((C["PCI_CAP_MSI"], struct.pack("<BBHQH", _CAP_MSI, 0, 0x0080, 0, 0)))
    if ident.msix_vectors:
        body = struct.pack(
            "<BBHII", _CAP_MSIX, 0, ident.msix_vectors - 1, _MSIX_TABLE | _MMIO_BIR, _MSIX_PBA | _MMIO_BIR
        )
        caps.append((C["PCI_CAP_MSIX"], body))
    return caps


def _express() -> bytes:
    """PCI Express capability, version 2: an endpoint on a x16 link at 5 GT/s."""
    cap = bytearray(_PCI_EXP_SIZE)
    struct.pack_into("<BBH", cap, 0x00, _CAP_EXP, 0, 0x0002)
    struct.pack_into("<IHH", cap, 0x04, 0x0000_8001, 0x2810, 0)  # 256-byte payload, 512-byte requests
    struct.pack_into("<IHH", cap, 0x0C, 0x0000_0102 | 0x0C00, 0, 0x0102)  # x16, 5 GT/s; running so
    struct.pack_into("<I", cap, 0x24, 0x0000_0012)  # completion timeout ranges; disable supported
    struct.pack_into("<I", cap, 0x2C, 0x0000_0006)  # supported speeds 2.5 and 5 GT/s
    struct.pack_into("<H", cap, 0x30, 0x0002)  # target speed
    return bytes(cap)


def _error_reporting(page: bytearray) -> None:
    """Advanced error reporting, the only extended capability of the card."""
    struct.pack_into("<I", page, _AER, _EXT_AER | 1 << 16)
    struct.pack_into("<I", page, _AER + 12, 0x0006_2030)  # default severities
