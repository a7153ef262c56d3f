"""Virtio feature bits by name (VOP 9)."""

from __future__ import annotations

from mic_emu import layout

C = layout.CONSTANTS
_PREFIX = {
    C["VIRTIO_ID_NET"]: "VIRTIO_NET_F_",
    C["VIRTIO_ID_BLOCK"]: "VIRTIO_BLK_F_",
    C["VIRTIO_ID_CONSOLE"]: "VIRTIO_CONSOLE_F_",
}

INDIRECT_DESC: int = 1 << C["VIRTIO_F_INDIRECT_DESC"]
EVENT_IDX: int = 1 << C["VIRTIO_F_EVENT_IDX"]
VERSION_1: int = 1 << C["VIRTIO_F_VERSION_1"]
RING: int = INDIRECT_DESC | EVENT_IDX
"""What our ring library can do beyond the real stack's (VOP 9.5)."""


def bits(device: str, *names: str) -> int:
    """Feature word of ``names`` of a device: ``bits("BLK", "FLUSH", "RO")``. KeyError: unknown name."""
    return sum(1 << C[f"VIRTIO_{device}_F_{name}"] for name in names)


def names(kind: int, word: int) -> list[str]:
    """Names of the bits in a feature word of a device of virtio id ``kind``; unknown ones as ``bit N``."""
    known = {v: k.removeprefix("VIRTIO_F_") for k, v in C.items() if k.startswith("VIRTIO_F_")}
    if prefix := _PREFIX.get(kind):
        known |= {v: k.removeprefix(prefix) for k, v in C.items() if k.startswith(prefix)}
    return [known.get(bit, f"bit {bit}") for bit in range(64) if word >> bit & 1]
