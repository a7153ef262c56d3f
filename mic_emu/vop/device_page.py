"""The device page: slots, their arithmetic and their walk (VOP 2).

Both sides use these functions on a ``View`` of the page. Whoever reads the page reads what the
other side may be changing, so every step is bounded by the page and reads each field once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mic_emu import layout as L
from mic_emu.memory import View, page_align

C = L.CONSTANTS
FREE, REMOVED = 0, -1


def align8(n: int) -> int:
    return (n + 7) & ~7


@dataclass(frozen=True)
class SlotShape:
    """The lengths that decide where everything in a slot lies; offsets are bytes from its start."""

    num_vq: int
    feature_len: int
    config_len: int

    @property
    def features_off(self) -> int:
        return L.DEVICE_DESC.size + L.VQCONFIG.size * self.num_vq

    @property
    def accepted_off(self) -> int:
        return self.features_off + self.feature_len

    @property
    def config_off(self) -> int:
        return self.features_off + 2 * self.feature_len

    @property
    def ctrl_off(self) -> int:
        """Size of the 8-aligned descriptor block; the control block follows (VOP-1)."""
        return align8(self.config_off + self.config_len)

    @property
    def total(self) -> int:
        """Bytes to the next slot."""
        return self.ctrl_off + L.DEVICE_CTRL.size

    def vq_off(self, index: int) -> int:
        return L.DEVICE_DESC.size + L.VQCONFIG.size * index


@dataclass(frozen=True)
class Slot:
    """One slot as it was read."""

    off: int
    type: int
    shape: SlotShape

    @property
    def ctrl(self) -> int:
        """Offset of the control block in the page."""
        return self.off + self.shape.ctrl_off


def walk(page: View) -> Iterator[Slot]:
    """Every slot up to the list's end, removed ones too (VOP-17). Bounded by the page."""
    off = C["DP_FIRST_SLOT"]
    while off + L.DEVICE_DESC.size + L.DEVICE_CTRL.size <= C["DP_SIZE"]:
        kind = L.DEVICE_DESC.get(page, off, "type")  # acquire: nothing else of the slot is read before
        if kind == FREE:
            return
        shape = SlotShape(*(L.DEVICE_DESC.get(page, off, n) for n in ("num_vq", "feature_len", "config_len")))
        if off + shape.total > C["DP_SIZE"]:
            return
        yield Slot(off, kind, shape)
        off += shape.total


def find_room(slots: Iterable[Slot], shape: SlotShape) -> tuple[int, bool] | None:
    """Where a new slot of ``shape`` goes: (offset, reuses a removed slot), or None when full.

    ``slots`` are all slots of the page by offset. A removed slot is reused only by one of equal
    size, so that no live slot ever moves (VOP-17).
    """
    end = C["DP_FIRST_SLOT"]
    for slot in slots:
        if slot.type == REMOVED and slot.shape.total == shape.total:
            return slot.off, True
        end = slot.off + slot.shape.total
    return (end, False) if end <= C["DP_SIZE"] - shape.total else None


# --- ring blocks (VOP 3.1) -----------------------------------------------------------------------


def vring_size(num: int) -> int:
    """Bytes of the legacy ring layout; the info area follows at this (unaligned) offset (VOP-3)."""
    align = C["VRING_ALIGN"]
    return ((16 * num + 2 * (3 + num) + align - 1) & ~(align - 1)) + 6 + 8 * num


def block_size(num: int) -> int:
    """Bytes of the block the host allocates for one ring."""
    return page_align(vring_size(num) + L.VRING_INFO.size)


def used_size(num: int) -> int:
    """Bytes of the used ring the card allocates."""
    return page_align(6 + 8 * num)


def ring_magic(kind: int, index: int) -> int:
    """Magic of ring ``index`` of a device of type ``kind`` (VOP-4)."""
    return (C["MIC_MAGIC"] + kind + index) & 0xFFFFFFFF


def feature_bytes(bits: int, length: int) -> bytes:
    """A feature bitmap."""
    return (bits & ((1 << (8 * length)) - 1)).to_bytes(length, "little")
