"""Runs a user's ``mic_emu.vop.driver.Driver``, and those that come with the card: virtio-rng, virtio-vsock."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mic_emu import layout as L
from mic_emu.card.os.drivers import RING, Environment, LoopDriver
from mic_emu.card.os.vop import VirtioDevice
from mic_emu.card.os.vsock import VsockDriver
from mic_emu.log import Log
from mic_emu.vop.driver import Device, DeviceBroken, Driver, Stopped
from mic_emu.vop.loading import LoadError, load_class

C = L.CONSTANTS
_loaded: set[str] = set()  # modules that may be loaded again


class PythonDriver(LoopDriver):
    """One device driven by ``kind``."""

    def __init__(self, kind: type[Driver], env: Environment) -> None:
        super().__init__(env)
        self.kind = kind
        self.rings = kind.rings
        self.features = kind.features | RING
        self._driver: Driver | None = None

    def create(self, dev: VirtioDevice) -> None:
        device = Device(
            dev.bus,
            dev.vdrv,
            dev.features,
            Path(self.env.boot["dir"]),
            dev.read_config,
            lambda text: dev.log.info(str(text)),
        )
        areas = [dev.alloc(count * size) for count, size in self.kind.shapes()]
        try:
            self._driver = self.kind(device, areas)
        except OSError:
            raise
        except Exception as e:
            self._log(e, "cannot start")
            raise OSError(errno.EIO, f"{self.kind.__name__} cannot start: {type(e).__name__}") from e

    def loop(self) -> int:
        assert self._driver
        try:
            self._driver.run()
        except Stopped:
            return 0
        except DeviceBroken as e:
            return -(e.errno or 5)
        except Exception as e:
            self._log(e, "ended")
        return 0

    def _log(self, e: Exception, what: str) -> None:
        """A user's code must not take the card down; its mistakes are told."""
        if self.dev:
            self.dev.log.error(
                f"{self.kind.__name__} {what}: {type(e).__name__}: {e}", traceback=traceback.format_exc()
            )

    def config_changed(self) -> None:
        if self._driver:
            try:
                self._driver.config_changed()
            except Exception as e:
                self._log(e, "does not take the new configuration")

    def destroy(self) -> None:
        driver, self._driver = self._driver, None
        if driver:
            try:
                driver.close()
            except Exception as e:
                self._log(e, "cannot close")


class HwRng(Driver):
    """Entropy as a stream: read the FIFO ``hwrng`` of the card's run directory."""

    device_type = C["VIRTIO_ID_RNG"]
    buffers = 2

    def run(self) -> None:
        path = self.device.folder / "hwrng"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Both ends: opening does not wait for a reader, and a reader that goes is no error.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        poller = select.epoll()
        try:
            poller.register(self._fd, select.EPOLLOUT)
            while True:
                data = self.request(room=self.buffer_size)
                while data:
                    if poller.poll(0):
                        with contextlib.suppress(BlockingIOError):
                            data = data[os.write(self._fd, data) :]
                    else:
                        self.wait(poller.fileno())
        finally:
            poller.close()

    def close(self) -> None:
        if (fd := getattr(self, "_fd", -1)) >= 0:
            os.close(fd)
        (self.device.folder / "hwrng").unlink(missing_ok=True)


def add_driver(name: str, folder: str, env: Environment) -> int:
    """Load MODULE:CLASS into a running card, afresh if it was loaded before; its device type. Raises LoadError."""
    module = name.partition(":")[0]
    if module in _loaded:
        sys.modules.pop(module, None)
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    kind: type[Driver] = load_class(name, Driver, folder)
    _loaded.add(module)
    env.registry[kind.device_type] = functools.partial(PythonDriver, kind, env)
    return kind.device_type


def user_drivers(params: dict[str, str], log: Log) -> dict[int, Callable[[Environment], PythonDriver]]:
    """Drivers by device type: ours, then those of ``micemu.drivers=MODULE:CLASS,...``, looked for in the
    caller's working directory, too. One that cannot be loaded is logged."""
    kinds: list[type[Driver]] = [HwRng, VsockDriver]
    for name in filter(None, params.get("micemu.drivers", "").split(",")):
        try:
            kinds.append(load_class(name, Driver, params.get("micemu.cwd", "")))
            _loaded.add(name.partition(":")[0])
        except LoadError as e:
            log.error(f"micemu.drivers: {e}")
    return {kind.device_type: functools.partial(PythonDriver, kind) for kind in kinds}
