"""virtio-rng: entropy of the host for the card (virtio 1.2, 5.4). The driver is ``drivers.HwRng``."""

from __future__ import annotations

import os

from mic_emu import layout as L
from mic_emu.vop.backend import Backend, Chain


class Rng(Backend):
    """Fills every buffer with random bytes."""

    device_type = L.CONSTANTS["VIRTIO_ID_RNG"]
    num = 8

    def process(self, chain: Chain) -> int:
        return chain.write(os.urandom(chain.room))
