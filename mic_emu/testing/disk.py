"""A whole virtio disk on hand-built rings: the backend in a process of its own, the driver in this one."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.testing.rings import DRIVER_OK, EVENT_IDX, INDIRECT_DESC, FakeDevice, FakeDriver, Rig, check

C = layout.CONSTANTS
SECTOR = 512
BLK_FEATURES = sum(
    1 << C[f"VIRTIO_BLK_F_{name}"] for name in ("SEG_MAX", "BLK_SIZE", "FLUSH", "DISCARD", "WRITE_ZEROES")
)
MODERN = BLK_FEATURES | EVENT_IDX | INDIRECT_DESC


def serve_disk(
    rig: Rig, fd: int, capacity: int, control_fd: int, *, read_only: bool, serial: bytes, spin_us: int
) -> None:
    """Backend: run the C loop and answer the card's hand-shakes, until ``control_fd`` is readable."""
    dev = FakeDevice(rig, control_fd=control_fd)
    dev.vdev.spin_us = spin_us
    blk = lib.mic_blk_dev_create(dev.vdev, fd, capacity, read_only, serial)
    while True:
        rc = check(lib.mic_blk_dev_run(blk), "block loop")
        if rc == lib.MIC_RUN_CONTROL:
            return
        if rig.ctrl("vdev_reset"):
            dev.reset()
            rig.status = 0
            rig.put_ctrl("vdev_reset", 0)
            rig.put_ctrl("host_ack", 1)
            lib.mic_vdev_interrupt(dev.vdev)


class Child:
    """A forked process that runs ``main``; it ends with this one. Context manager."""

    def __init__(self, main: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                main()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self) -> None:
        """SIGKILL and reap."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Reap: the wait status."""
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return status


class Disk:
    """Image ``fd`` behind rings of a ``Rig``, with the card's driver in this process.

    capacity: sectors. ``pool``: bytes of GDDR for the driver. Context manager; the image stays open.
    """

    def __init__(
        self,
        fd: int,
        capacity: int,
        *,
        features: int = MODERN,
        num: int = 128,
        pool: int = 16 << 20,
        read_only: bool = False,
        serial: bytes = b"micemu-disk",
        spin_us: int = 50,
    ) -> None:
        self.rig = Rig(num, features=features)
        self.drv = FakeDriver(self.rig)
        self.stop_fd = check(lib.mic_eventfd(0o2004000), "eventfd")
        self.drv.vdrv.stop_fd = self.stop_fd
        self.drv.vdrv.spin_us = spin_us
        self.rig.status = DRIVER_OK
        self._control, theirs = socket.socketpair()

        def backend() -> None:
            self._control.close()  # the child's copy: ours must be the last one
            serve_disk(
                self.rig, fd, capacity, theirs.fileno(), read_only=read_only, serial=serial, spin_us=spin_us
            )

        self.backend = Child(backend)
        theirs.close()
        self.pool = self.rig.alloc(pool)
        status = self.rig.bus.host.pointer + self.rig.slot_off + layout.DEVICE_DESC.off("status")
        self.ptr: Any = lib.mic_blk_drv_create(self.drv.vdrv, self.pool, pool, features, capacity, status)
        assert self.ptr != ffi.NULL
        self.user: Any = lib.mic_blk_user_open(self.ptr)
        assert self.user != ffi.NULL

    def execute(self, kind: int, sector: int, addr: int, length: int) -> int:
        """One request through the driver: 0 or -errno."""
        return int(lib.mic_blk_execute(self.user, kind, sector, addr, length))

    def read(self, sector: int, nbytes: int) -> bytes:
        """Read ``nbytes`` at a sector; OSError when the disk says so."""
        addr = lib.mic_blk_alloc(self.ptr, nbytes)
        try:
            check(self.execute(C["VIRTIO_BLK_T_IN"], sector, addr, nbytes), "read")
            return self.rig.bus.gddr.read(addr, nbytes)
        finally:
            lib.mic_blk_free(self.ptr, addr, nbytes)

    def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors; OSError when the disk says so."""
        self.send(C["VIRTIO_BLK_T_OUT"], sector, data)

    def send(self, kind: int, sector: int, data: bytes) -> None:
        """A request with payload towards the device."""
        addr = lib.mic_blk_alloc(self.ptr, len(data))
        try:
            self.rig.bus.gddr.write(addr, data)
            check(self.execute(kind, sector, addr, len(data)), "request")
        finally:
            lib.mic_blk_free(self.ptr, addr, len(data))

    def reset(self) -> None:
        """The card's reset hand-shake, then ready again (rings from scratch)."""
        self.rig.put_ctrl("host_ack", 0)
        self.rig.put_ctrl("vdev_reset", 1)
        self.rig.bus.ring_host(0)
        while not self.rig.ctrl("host_ack"):
            if lib.mic_vdrv_sleep(self.drv.vdrv, ffi.NULL, 0, 10000) == 0:
                raise TimeoutError("the backend did not answer the reset within 10 s")
        self.drv.reset()
        self.rig.status = DRIVER_OK
        self.rig.bus.ring_host(0)

    def bench(
        self, block: int, depth: int, ms: int, *, spin_us: int = 50, random: bool = True, write: bool = False
    ) -> Any:
        """One run of the load generator: ``struct mic_blk_bench``."""
        b = ffi.new("struct mic_blk_bench *")
        b.block, b.depth, b.runtime_ms, b.random, b.write = block, depth, ms, random, write
        check(lib.mic_blk_bench(self.ptr, b, spin_us, self.stop_fd), "bench")
        return b

    def close(self) -> None:
        """Stop the driver, then the backend."""
        lib.mic_blk_drv_stop(self.ptr)
        lib.mic_blk_user_close(self.user)
        self._control.close()
        self.backend.wait() if self.backend.pid else None
        lib.mic_blk_drv_destroy(self.ptr)
        self.drv.close()
        os.close(self.stop_fd)
        self.rig.close()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class NbdServer:
    """The card's NBD server over a ``Disk``, on a Unix socket, in a thread of this process."""

    def __init__(
        self, disk: Disk, path: str, *, name: str = "vda", read_only: bool = False, spin_us: int = 50
    ) -> None:
        self.disk = disk
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._stop = check(lib.mic_eventfd(0o2004000), "eventfd")
        self.ptr: Any = lib.mic_nbd_create(disk.ptr, self._listener.fileno(), name.encode(), read_only)
        if self.ptr == ffi.NULL:
            raise OSError(ffi.errno, f"nbd: {os.strerror(ffi.errno)}")
        lib.mic_nbd_spin(self.ptr, spin_us)
        self.result: int | None = None
        self._thread = threading.Thread(target=self._run, name="nbd", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (rc := int(lib.mic_nbd_run(self.ptr, self._stop))) == -errno.EINTR:
            pass  # this process was stopped and goes on
        self.result = rc

    def stats(self) -> Any:
        """``struct mic_nbd_stats`` now."""
        s = ffi.new("struct mic_nbd_stats *")
        lib.mic_nbd_stats(self.ptr, s)
        return s

    def ended(self, within_s: float) -> int | None:
        """Wait for the server to end by itself: its result, None when it runs on."""
        self._thread.join(within_s)
        return self.result

    def close(self) -> None:
        """Stop the loop and disconnect all clients."""
        os.eventfd_write(self._stop, 1)
        self._thread.join(10)
        if self._thread.is_alive():
            raise TimeoutError("the NBD server did not stop within 10 s")
        lib.mic_nbd_destroy(self.ptr)
        self._listener.close()
        os.close(self._stop)
        os.unlink(self.path)

    def __enter__(self) -> NbdServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
