"""Console backend: a pty of the host, a log file and CLI clients; the bytes move in C."""

from __future__ import annotations

from typing import Any

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.host.backends.common import BackendProcess, serve
from mic_emu.virtio import console

C = L.CONSTANTS


class Console(BackendProcess):
    """virtio-console with a window size in its configuration space (modern personality)."""

    kind = C["VIRTIO_ID_CONSOLE"]
    num_vq = 2

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.listener, self.log_fd = self.extra
        self.pty = console.HostPty()
        self.size = (0, 0)
        self.dev: console.ConsoleDevice | None = None

    def features(self) -> int:
        return console.offered_features(self.args["personality"])

    def config(self) -> bytes:
        return console.pack_config(*self.size)

    def opened(self) -> None:
        self.dev = console.ConsoleDevice(
            self.vdev,
            pty_fd=self.pty.fd,
            log_fd=self.log_fd,
            listen_fd=self.listener,
            group=self.args.get("group"),
        )
        self.facts(pty=self.pty.slave)

    def loop(self) -> int:
        assert self.dev
        return self.dev.run()

    def returned(self, rc: int) -> None:
        """A client's window size goes to the card, and to whoever has the pty open."""
        if rc != lib.MIC_RUN_RESIZE or self.dev is None:
            return
        self.size = self.dev.window_size
        self.pty.resize(*self.size)
        if self.args["personality"] == "modern":
            self.channel.send({"op": "config", "config": self.config().hex()})

    def stats(self) -> dict[str, Any]:
        return self.dev.stats() if self.dev else {}

    def close(self) -> None:
        if self.dev:
            self.dev.close()
        self.pty.close()


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked."""
    return serve(Console, args, fds)
