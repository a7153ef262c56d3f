"""What the rows of the layout table are: registers, and structs with accessors over shared memory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Access = Literal[
    "rw",  # stored as written
    "ro",  # hardware writes, software's stores are ignored
    "cause",  # SICR0: write 1 to clear
    "enable",  # SICE0: writing 1 sets, 0 leaves; a pending cause fires when it is enabled
    "disable",  # SICC0: writing 1 clears the enable bit
    "sdbic",  # card -> host doorbell: bit 31 requests
    "apicicr",  # host -> card doorbell: bit 13 of the low word sends
    "rdmasr",  # host -> card doorbell: any write fires
    "rgcr",  # reset control
    "dcar",  # DMA channel attributes: interrupt masks
    "dhpr",  # DMA head: starts work
    "dcr",  # DMA owner and enable bits
    "msixtbl",  # MSI-X table: belongs to the PCI function, so a card reset leaves it alone
    "msixctl",  # vector control in that table: clearing bit 0 sends what is pending
    "msixpba",  # pending bits: set by hardware
    "pbacr",  # writing 1 clears the pending bits
]


@dataclass(frozen=True)
class Reg:
    """``count`` registers that lie ``stride`` bytes apart, the first at ``off`` (bytes into BAR 4)."""

    name: str
    off: int
    access: Access
    clause: str
    doc: str
    count: int = 1
    stride: int = 4
    reset: int = 0


@dataclass(frozen=True)
class Field:
    """A field at byte ``off``; ``fmt`` is a ``struct`` code, or ``"20s"`` for bytes."""

    name: str
    off: int
    fmt: str
    doc: str = ""

    @property
    def size(self) -> int:
        return struct.calcsize("<" + self.fmt)


class Memory(Protocol):
    """What struct accessors need: bytes of shared memory by offset."""

    def load(self, off: int, size: int) -> int: ...
    def store(self, off: int, size: int, value: int) -> None: ...


@dataclass(frozen=True)
class Struct:
    """A struct whose bytes the specification fixes: little-endian, no implied padding."""

    name: str
    size: int
    clause: str
    fields: tuple[Field, ...]
    packed: bool = False

    def __getitem__(self, name: str) -> Field:
        for f in self.fields:
            if f.name == name:
                return f
        raise KeyError(f"struct {self.name} has no field {name}")

    def off(self, name: str) -> int:
        """Byte offset of a field."""
        return self[name].off

    def get(self, mem: Memory, base: int, name: str) -> int:
        """Load one field with a single access (acquire); signed fields are sign-extended."""
        f = self[name]
        value = mem.load(base + f.off, f.size)
        if f.fmt in "bhiq" and value >> (8 * f.size - 1):
            value -= 1 << (8 * f.size)
        return value

    def loader(self, name: str) -> Callable[[Memory, int], int]:
        """``get`` of an unsigned field, for what is read often: (memory, base) -> value."""
        off, size = self[name].off, self[name].size
        return lambda mem, base: mem.load(base + off, size)

    def put(self, mem: Memory, base: int, name: str, value: int) -> None:
        """Store one field with a single access (release)."""
        f = self[name]
        mem.store(base + f.off, f.size, value & ((1 << (8 * f.size)) - 1))

    def pack(self, **values: int | bytes) -> bytes:
        """The struct's bytes with the named fields set, all others 0."""
        out = bytearray(self.size)
        for name, value in values.items():
            f = self[name]
            struct.pack_into("<" + f.fmt, out, f.off, value)
        return bytes(out)

    def unpack(self, data: bytes | bytearray | memoryview, base: int = 0) -> dict[str, int]:
        """All fields of a private copy, by name."""
        return {f.name: struct.unpack_from("<" + f.fmt, data, base + f.off)[0] for f in self.fields}
