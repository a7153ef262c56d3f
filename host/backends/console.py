"""Console backend: a pty of the host, a log file and CLI clients; the bytes move in C."""

from __future__ import annotations

import os
import tty
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.host.backends.common import BackendProcess, serve

C = L.CONSTANTS


class Console(BackendProcess):
    """virtio-console with a window size in its configuration space (modern personality)."""

    kind = C["VIRTIO_ID_CONSOLE"]
    num_vq = 2

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.modern = args["personality"] == "modern"
        listener, log_fd = self.extra
        self.pty, slave = os.openpty()
        tty.setraw(slave)
        self.pty_name = os.ttyname(slave)
        os.close(slave)
        os.set_blocking(self.pty, False)
        self.listener, self.log_fd = listener, log_fd
        self.dev = ffi.NULL
        self.size = (0, 0)

    def features(self) -> int:
        bits = (C["VIRTIO_CONSOLE_F_SIZE"], C["VIRTIO_F_EVENT_IDX"], C["VIRTIO_F_VERSION_1"]) if self.modern else ()
        return sum(1 << b for b in bits)

    def config(self) -> bytes:
        return L.CONSOLE_CONFIG.pack(cols=self.size[0], rows=self.size[1])

    def opened(self) -> None:
        self.dev = lib.mic_con_dev_create(self.vdev, self.pty, self.log_fd, self.listener)
        if self.dev == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.facts(pty=self.pty_name)

    def loop(self) -> int:
        return int(lib.mic_con_dev_run(self.dev))

    def returned(self, rc: int) -> None:
        if rc == lib.MIC_RUN_RESIZE and self.modern:
            packed = lib.mic_con_dev_size(self.dev)
            self.size = (packed >> 16, packed & 0xFFFF)
            self.channel.send({"op": "config", "config": self.config().hex()})

    def stats(self) -> dict[str, Any]:
        s = ffi.new("struct mic_con_stats *")
        lib.mic_con_dev_stats(self.dev, s)
        return {name: getattr(s, name) for name in ("to_card_bytes", "from_card_bytes", "log_errors", "client_lost", "clients")}

    def close(self) -> None:
        if self.dev != ffi.NULL:
            lib.mic_con_dev_destroy(self.dev)


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked."""
    return serve(Console, args, fds)
