"""Block backend: a raw image; requests are served in C straight from and into card memory."""

from __future__ import annotations

import os
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.host.backends.common import BackendProcess, serve

C = L.CONSTANTS
SECTOR = 512
MODERN = ("SEG_MAX", "BLK_SIZE", "FLUSH", "DISCARD", "WRITE_ZEROES")


class Block(BackendProcess):
    """virtio-blk over the descriptor that the host process opened."""

    kind = C["VIRTIO_ID_BLOCK"]
    num_vq = 1

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.modern = args["personality"] == "modern"
        self.fd = self.extra[0]
        # Whole sectors only: what a short last sector holds is not the card's (VOP 8.7).
        self.capacity = os.lseek(self.fd, 0, os.SEEK_END) // SECTOR
        self.dev = ffi.NULL

    def features(self) -> int:
        names = [f"VIRTIO_BLK_F_{n}" for n in (MODERN if self.modern else ("SEG_MAX",))]
        if self.args["read_only"]:
            names.append("VIRTIO_BLK_F_RO")
        if self.modern:
            names += ["VIRTIO_F_EVENT_IDX", "VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_VERSION_1"]
        return sum(1 << C[n] for n in names)

    def config(self) -> bytes:
        values: dict[str, int] = {"capacity": self.capacity, "seg_max": lib.MIC_BLK_SEG_MAX}
        if self.modern:
            values |= {
                "blk_size": SECTOR,
                "max_discard_sectors": lib.MIC_BLK_MAX_DISCARD,
                "max_discard_seg": lib.MIC_BLK_MAX_RANGES,
                "discard_sector_alignment": 1,
                "max_write_zeroes_sectors": lib.MIC_BLK_MAX_ZEROES,
                "max_write_zeroes_seg": lib.MIC_BLK_MAX_RANGES,
                "write_zeroes_may_unmap": 1,
            }
        return L.BLK_CONFIG.pack(**values)

    def opened(self) -> None:
        serial = self.args["serial"].encode()[: C["VIRTIO_BLK_ID_LEN"]]
        self.dev = lib.mic_blk_dev_create(self.vdev, self.fd, self.capacity, self.args["read_only"], serial)
        if self.dev == ffi.NULL:
            raise MemoryError("block device")

    def loop(self) -> int:
        return int(lib.mic_blk_dev_run(self.dev))

    def returned(self, rc: int) -> None:
        if rc < 0:
            self.event(f"the disk's loop failed: {os.strerror(-rc)}")
            self.done = True

    def stats(self) -> dict[str, Any]:
        s = ffi.new("struct mic_blk_stats *")
        lib.mic_blk_dev_stats(self.dev, s)
        return {name: int(getattr(s, name)) for name, _ in ffi.typeof("struct mic_blk_stats").fields}

    def close(self) -> None:
        if self.dev != ffi.NULL:
            lib.mic_blk_dev_destroy(self.dev)


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked."""
    return serve(Block, args, fds)
