"""The host half of a device's hand-shakes: used rings and reset (VOP 4.3 step 11, 4.5).

Runs in the backend process while that lives, because it owns the rings, and in the host process
when there is no backend (removal after a backend was killed, VOP-20). Everything the card wrote is
read once and checked; lengths and addresses come from the host's private copies (VOP-50).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mic_emu import layout as L
from mic_emu.bar import Bus
from mic_emu.vop.device_page import SlotShape, vring_size

DESC, CTRL, INFO = L.DEVICE_DESC, L.DEVICE_CTRL, L.VRING_INFO


@dataclass
class DeviceSlot:
    """The host's private copy of what it announced."""

    page: int  # offset of the device page in host memory
    off: int  # offset of the slot in the page
    kind: int  # virtio device id
    shape: SlotShape
    num: int  # entries of each ring
    features: int
    blocks: list[int] = field(default_factory=list)  # offsets of the ring blocks in host memory
    vector: int = 0

    @property
    def desc(self) -> int:
        """Offset of device_desc in host memory."""
        return self.page + self.off

    @property
    def ctrl(self) -> int:
        """Offset of device_ctrl in host memory."""
        return self.desc + self.shape.ctrl_off

    def to_dict(self) -> dict[str, Any]:
        plain = dict(self.__dict__)
        plain["shape"] = [self.shape.num_vq, self.shape.feature_len, self.shape.config_len]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DeviceSlot:
        return cls(**{**plain, "shape": SlotShape(*plain["shape"])})


class BottomHalf:
    """Hand-shake state of one device."""

    def __init__(self, bus: Bus, slot: DeviceSlot) -> None:
        self.bus = bus
        self.slot = slot

    def status(self) -> int:
        """The virtio status byte."""
        return DESC.get(self.bus.host, self.slot.desc, "status")

    def _ctrl(self, name: str) -> int:
        return CTRL.get(self.bus.host, self.slot.ctrl, name)

    def interrupt(self) -> None:
        """Wake the card's driver; out of range doorbells are ignored (VOP-52)."""
        self.bus.ring_card(self._ctrl("h2c_vdev_db"))

    @property
    def reset_wanted(self) -> bool:
        return self._ctrl("vdev_reset") != 0

    @property
    def rings_offered(self) -> bool:
        return self._ctrl("used_address_updated") != 0

    def accepted_features(self) -> int:
        """What the card's driver took of our offer (VOP 4.4), never more than that; written before its rings."""
        at, n = self.slot.desc + self.slot.shape.accepted_off, min(self.slot.shape.feature_len, 8)
        return int.from_bytes(self.bus.host.read(at, n), "little") & self.slot.features

    def used_addresses(self) -> list[int]:
        """What the card offered as used rings, unchecked; the ring library checks them (VOP-47)."""
        vq, d = L.VQCONFIG, self.slot.desc
        return [vq.get(self.bus.host, d + self.slot.shape.vq_off(i), "used_address") for i in range(self.slot.shape.num_vq)]

    def acknowledge_rings(self) -> None:
        """All used rings are usable: clear the flag, which is the ack, and wake the card (VOP-11)."""
        CTRL.put(self.bus.host, self.slot.ctrl, "used_address_updated", 0)
        self.interrupt()

    def acknowledge_reset(self) -> None:
        """The caller has stopped every copy: clear all state first, then ack (VOP-13)."""
        host = self.bus.host
        for block in self.slot.blocks:
            INFO.put(host, block + vring_size(self.slot.num), "avail_idx", 0)
        DESC.put(host, self.slot.desc, "status", 0)
        CTRL.put(host, self.slot.ctrl, "vdev_reset", 0)
        CTRL.put(host, self.slot.ctrl, "host_ack", 1)
        self.interrupt()

    def run_without_backend(self) -> None:
        """Answer what the card asked while nobody serves the rings: they are not used, so any is fine."""
        if self.rings_offered:
            self.acknowledge_rings()
        if self.reset_wanted:
            self.acknowledge_reset()
