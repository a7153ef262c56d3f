"""The kernel's side of init: programs, the console's terminal, the end of user land."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mic_emu.bar import Bus
from mic_emu.card.os import bootstrap, init
from mic_emu.card.os.rootfs import RootConfig, make_root
from mic_emu.card.os.vsock import prepare_folder
from mic_emu.cosm.states import Status
from mic_emu.log import Log
from mic_emu.peers import group_of
from mic_emu.virtio import net
from mic_emu.virtio.vsock import SOCKET
from mic_emu.wire import listen_unix

SHUTDOWN_GRACE_S = 2.0
PANIC_STATUS = 71
REQUESTS = {"poweroff": Status.POWEROFF, "halt": Status.HALTED, "restart": Status.RESTART}


class Userland:
    """Init and everything below it. ``console`` is the master of the console shell's terminal."""

    def __init__(self, process: init.Init, listener: socket.socket, path: str, log: Log) -> None:
        self.log = log
        self.console = -1
        self._init = process
        self._listener = listener
        self._path = path
        self._request: Callable[[Status], None] = lambda status: None

    @classmethod
    def fork(
        cls, boot: dict[str, Any], params: dict[str, str], ramdisk: tuple[int, int] | None, bus: Bus, log: Log
    ) -> Userland:
        """Fork init; call before any thread or event loop exists."""
        path = str(Path(boot["dir"]) / "run.sock")
        listener = listen_unix(path)
        vsock = prepare_folder(Path(boot["dir"]))
        env = {
            "MICEMU_VSOCK": str(vsock / SOCKET),
            "MICEMU_NODE": str(boot["index"] + 1),
            "MICEMU_CARD": boot["name"],
            "MICEMU_SCIF_SOCKET": str(Path(boot["dir"]) / "scif.sock"),
        }
        cwd = params.get("micemu.cwd", "/")
        config = init.InitConfig(boot["name"], env, cwd=cwd, folder=boot["dir"], group=group_of(path))

        archive = bytes(bus.gddr.read(*ramdisk)) if ramdisk else b""
        names = {boot["name"]: net.card_address(boot["index"]), "host": net.host_address(boot["index"])}
        root = RootConfig(
            hostname=boot["name"],
            ramdisk=archive,
            hosts={name: address.split("/")[0] for name, address in names.items()},
            expose=[boot["dir"], *bootstrap.installed],
            shared={"/run/vsock": str(vsock)},
            links={"/dev/hwrng": str(Path(boot["dir"]) / "hwrng")},
        )
        process = init.start(config, listener, lambda: make_root(boot["contained"], root))
        return cls(process, listener, path, log)

    def on_request(self, callback: Callable[[Status], None]) -> None:
        """What to do when a program asks the card to go down."""
        self._request = callback

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for init and follow it. Raises OSError when it does not come up."""
        self._init.ready()
        for note in self._init.notes:
            self.log.info(f"root file system: {note}")
        self.console = self._init.console_fd
        os.set_blocking(self.console, False)
        # A card without its init has panicked (there is no way back).
        loop.add_reader(self._init.channel.fileno(), self._hear)

    def _hear(self) -> None:
        """A program asks for the end (COSM-32), or init has died."""
        try:
            word = self._init.requested()
        except OSError:
            self.log.error("panic: init is gone")
            os._exit(PANIC_STATUS)
        if word:
            self.log.info(f"a program asked for {word}")
            self._request(REQUESTS[word])

    async def shutdown(self) -> None:
        """End all programs: SIGTERM, a while, SIGKILL."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._init.channel.fileno())
        try:
            programs, killed = await asyncio.to_thread(self._init.shutdown, SHUTDOWN_GRACE_S)
            self.log.info("user land is down", programs=programs, killed=killed)
        except OSError as e:
            self.log.warning(f"init did not end in order: {e}")
        self._listener.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
