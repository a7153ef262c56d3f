"""Virtio over PCIe: what both sides share, and the base classes of your own devices (docs/backend.md)."""

from mic_emu.vop.backend import Backend, Chain, ChainDone
from mic_emu.vop.driver import Driver

__all__ = ["Backend", "Chain", "ChainDone", "Driver"]
