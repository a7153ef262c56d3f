"""The card's disk driver: one virtio-blk device, served to Unix tools as an NBD socket."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.card.os.drivers import RING, Environment, LoopDriver, bits, created
from mic_emu.card.os.vop import VirtioDevice
from mic_emu.wire import listen_unix

C = L.CONSTANTS
POOL = 16 << 20  # bytes of GDDR for requests in flight


class BlockDriver(LoopDriver):
    """vda, vdb, ...: ``<run dir>/micN/vdX.nbd``."""

    features = RING | bits(
        *(f"VIRTIO_BLK_F_{n}" for n in ("SEG_MAX", "RO", "BLK_SIZE", "FLUSH", "DISCARD", "WRITE_ZEROES"))
    )

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self._drv = ffi.NULL
        self._nbd = ffi.NULL
        self._path = ""
        self._removing = False

    def create(self, dev: VirtioDevice) -> None:
        capacity = int.from_bytes(dev.read_config(L.BLK_CONFIG.off("capacity"), 8), "little")
        status = ffi.cast("uint8_t *", dev.page.pointer) + dev.slot.off + L.DEVICE_DESC.off("status")
        self._drv = created(
            lib.mic_blk_drv_create(dev.vdrv, dev.alloc(POOL), POOL, dev.features, capacity, status),
            "disk driver",
        )
        self.name = self.env.free_name("vd")
        path = str(Path(self.env.boot["dir"]) / f"{self.name}.nbd")
        try:
            self._listener = listen_unix(path)
        except OSError:
            self.env.release_name(self.name)
            raise
        self._path = path
        read_only = bool(dev.features & bits("VIRTIO_BLK_F_RO"))
        self._nbd = created(
            lib.mic_nbd_create(self._drv, self._listener.fileno(), self.name.encode(), read_only),
            "NBD server",
        )
        dev.log.info(f"disk {self.name}: {capacity} sectors, NBD at {self._path}", disk=self.name)

    def loop(self) -> int:
        assert self.dev
        while (rc := int(lib.mic_nbd_run(self._nbd, self.dev.stop_fd))) == -errno.EINTR:
            pass
        return 0 if self._removing and rc == -errno.ESHUTDOWN else rc

    def bench(
        self, block: int, depth: int, seconds: float, random: bool, write: bool, spin_us: int
    ) -> dict[str, float]:
        """Load the disk from a user of its own (``struct mic_blk_bench``). Raises OSError."""
        assert self.dev
        b = ffi.new("struct mic_blk_bench *")
        b.block, b.depth, b.runtime_ms, b.random, b.write = block, depth, int(seconds * 1000), random, write
        rc = lib.mic_blk_bench(self._drv, b, spin_us, self.dev.stop_fd)
        if rc < 0:
            raise OSError(-rc, f"bench of {self.name}: {os.strerror(-rc)}")
        return {"iops": b.iops, "mb_per_s": b.mb_per_s, "p50_us": b.p50_us, "p99_us": b.p99_us}

    def remove(self) -> bool:
        self._removing = True
        if self._drv != ffi.NULL:
            lib.mic_blk_drv_stop(self._drv)  # what is outstanding ends with ESHUTDOWN
        return super().remove()

    def destroy(self) -> None:
        if self._nbd != ffi.NULL:
            lib.mic_nbd_destroy(self._nbd)
        if self._drv != ffi.NULL:
            lib.mic_blk_drv_destroy(self._drv)
        self._nbd = self._drv = ffi.NULL
        if self._path:
            self._listener.close()
            self.env.release_name(self.name)
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
            self._path = ""
