"""The card's virtio drivers: Python brings a device up, a C loop in a thread moves its bytes."""

from __future__ import annotations

import errno
import os
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fcntl import ioctl
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import Bus
from mic_emu.card.os.userland import Userland
from mic_emu.card.os.vop import VirtioDevice, VirtioDriver
from mic_emu.log import Log

C = L.CONSTANTS
STOP_LIMIT_S = 5.0


def bits(*names: str) -> int:
    """Feature bits by name."""
    return sum(1 << C[name] for name in names)


RING = bits("VIRTIO_F_EVENT_IDX", "VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_VERSION_1")


@dataclass
class Environment:
    """What drivers need of the card OS."""

    boot: dict[str, Any]
    params: dict[str, str]
    bus: Bus
    userland: Userland
    log: Log


class LoopDriver:
    """Life of a driver whose work is one blocking C call in a thread."""

    features = RING
    rings = 1

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.dev: VirtioDevice | None = None
        self._thread: threading.Thread | None = None

    async def probe(self, dev: VirtioDevice) -> None:
        """Rings, then the subclass's buffers."""
        self.dev = dev
        await dev.setup_rings(self.rings)
        self.create(dev)

    def create(self, dev: VirtioDevice) -> None:
        """Buffers and the C object. Raises OSError."""
        raise NotImplementedError

    def loop(self) -> int:
        """The blocking C call."""
        raise NotImplementedError

    def destroy(self) -> None:
        """Free the C object; the loop has ended."""

    def config_changed(self) -> None:
        """Nothing to do for most devices."""

    def start(self) -> None:
        assert self.dev
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self.dev
        rc = self.loop()
        if rc < 0:
            self.dev.log.error(f"the driver's loop ended: {os.strerror(-rc)}")

    def remove(self) -> None:
        """End the loop, wait for it, free everything; may be called after a failed probe."""
        if self.dev is None:
            return
        os.write(self.dev.stop_fd, (1).to_bytes(8, "little"))
        if self._thread:
            self._thread.join(STOP_LIMIT_S)
            if self._thread.is_alive():
                self.dev.log.error("the driver's loop does not end; its memory stays")
                return
        self.destroy()
        self.dev = None


def created(obj: Any, what: str) -> Any:
    """A C object, or the errno that it left. Raises OSError."""
    if obj == ffi.NULL:
        raise OSError(ffi.errno or errno.ENOMEM, f"{what}: {os.strerror(ffi.errno or errno.ENOMEM)}")
    return obj


class ConsoleDriver(LoopDriver):
    """hvc0: the rings <-> the master of the console's pty, on whose slave init runs a shell."""

    features = RING | bits("VIRTIO_CONSOLE_F_SIZE")
    rings = 2
    AREA = 32 * 4096

    def create(self, dev: VirtioDevice) -> None:
        area = dev.alloc(self.AREA)
        self._obj = created(
            lib.mic_con_drv_create(dev.vdrv, self.env.userland.console, area, self.AREA), "console driver"
        )

    def loop(self) -> int:
        return int(lib.mic_con_drv_run(self._obj))

    def destroy(self) -> None:
        lib.mic_con_drv_destroy(self._obj)

    def config_changed(self) -> None:
        """A new window size: the line discipline tells the foreground programs."""
        if self.dev is None or not self.dev.features & bits("VIRTIO_CONSOLE_F_SIZE"):
            return
        cols, rows = struct.unpack("<HH", self.dev.read_config(0, 4))
        ioctl(self.env.userland.console, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))


DRIVERS: dict[int, Callable[[Environment], VirtioDriver]] = {
    C["VIRTIO_ID_CONSOLE"]: ConsoleDriver,
}
