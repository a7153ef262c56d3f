"""Backend process of a user's own device: a ``mic_emu.vop.backend.Backend`` by name."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import mic_emu.virtio.rng  # noqa: F401  named by a string only: loaded before an upgrade takes its file away
from mic_emu import layout as L
from mic_emu.host.backends.common import BackendProcess, OpenFailed, serve
from mic_emu.vop.backend import Backend, DeviceLoop, Place
from mic_emu.vop.loading import LoadError, load_class
from mic_emu.wire import Channel

C = L.CONSTANTS
DEVICE_BITS = (1 << 24) - 1


class PythonDevice(BackendProcess):
    """Runs ``args["backend"]`` (MODULE:CLASS) with ``args["options"]``."""

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.backend: Backend | None = None
        self.work: DeviceLoop | None = None

    def open(self) -> None:
        try:
            made: type[Backend] = load_class(self.args["backend"], Backend, self.args.get("folder", ""))
            self.backend = made(**self.args.get("options", {}))
            self.backend.place = Place(self.args["card"], self.args["index"], Path(self.args["place"]))
            self.backend.open()
        except (LoadError, TypeError, ValueError, OSError) as e:
            raise OpenFailed(str(e)) from e
        self.backend.announce = self._announce
        self.kind, self.num_vq, self.num = self.backend.device_type, self.backend.num_vq, self.backend.num
        super().open()

    @property
    def device(self) -> Backend:
        assert self.backend
        return self.backend

    def features(self) -> int:
        offered = self.device.features
        return offered if self.args["personality"] == "modern" else offered & DEVICE_BITS

    def config(self) -> bytes:
        return self.device.config

    def _announce(self, config: bytes) -> None:
        self.channel.send({"op": "config", "config": config.hex()})

    def opened(self) -> None:
        self.work = DeviceLoop(self.device, self.vdev)
        self.facts(backend=self.args["backend"], device_type=self.kind)

    def loop(self) -> int:
        assert self.work
        return self.work.run()

    def driver_ready(self) -> None:
        self.device.driver_ok()

    def reset(self) -> None:
        if self.work:
            self.work.reset()

    def stats(self) -> dict[str, Any]:
        return {"processed": self.work.processed if self.work else 0, **self.device.stats()}

    def close(self) -> None:
        if self.backend:
            self.backend.close()


def tell_import(args: dict[str, Any], fds: list[int]) -> int:
    """Import the class ``args["check"]`` and tell the host process what became of it."""
    with Channel(socket.socket(fileno=fds[0])) as channel:
        try:
            load_class(args["check"], Backend, args["folder"])
        except LoadError as e:
            channel.send({"error": str(e).removeprefix(f"{args['check']}: ")})
        else:
            channel.send({})
    return 0


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked."""
    return tell_import(args, fds) if "check" in args else serve(PythonDevice, args, fds)
