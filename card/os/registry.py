"""Which driver serves which virtio device type."""

from __future__ import annotations

from collections.abc import Callable

from mic_emu import layout as L
from mic_emu.card.os.disk import BlockDriver
from mic_emu.card.os.drivers import ConsoleDriver, Environment, NetworkDriver
from mic_emu.card.os.vop import VirtioDriver

C = L.CONSTANTS

DRIVERS: dict[int, Callable[[Environment], VirtioDriver]] = {
    C["VIRTIO_ID_CONSOLE"]: ConsoleDriver,
    C["VIRTIO_ID_NET"]: NetworkDriver,
    C["VIRTIO_ID_BLOCK"]: BlockDriver,
}
