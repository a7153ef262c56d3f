"""The bootstrap: reads the downloaded image out of GDDR, checks it and starts it (HW 6.4)."""

from __future__ import annotations

import json
import os
import signal
from typing import Any, NoReturn

from mic_emu import image, namespaces
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.os import ns
from mic_emu.card.os.bringup import X100_CPU
from mic_emu.log import Log

REPORT_LIMIT = 4096


class BootRefused(Exception):
    """The image cannot be started; the sentence says why."""


class Bootstrap:
    """Starts card operating systems. ``contained`` tells how the last one is contained."""

    def __init__(self, bus: Bus, args: dict[str, Any], log: Log) -> None:
        self.bus = bus
        self.args = args
        self.log = log
        self.contained: dict[str, Any] = {}
        self.inner_pid = 0
        self._refused = (
            namespaces.refusals() if args["namespaces"] else ("user: switched off by configuration",)
        )

    def start(self, base: int, size: int) -> int:
        """Start the image of ``size`` bytes at card physical ``base``; returns the process to watch.

        Raises BootRefused (nothing was started), OSError.
        """
        fd = image.payload_memfd(self.payload(base, size))
        report_r, report_w = os.pipe2(os.O_CLOEXEC)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._child(me, fd, report_w, base, size)
        os.close(fd)
        os.close(report_w)
        with os.fdopen(report_r, "rb") as f:
            line = f.readline(REPORT_LIMIT)
        if not line:
            _, status = os.waitpid(pid, 0)
            raise BootRefused(f"the card OS could not be started (wait status {status:#x}); see stderr.log")
        self.contained = json.loads(line)
        self.inner_pid = self.contained.pop("pid")
        return pid

    def payload(self, base: int, size: int) -> bytes:
        """A private, checked copy of the image's payload: what is checked is what runs, whatever the host
        writes meanwhile. Raises BootRefused."""
        gddr = self.bus.gddr
        if size == 0 or base + size > gddr.size:
            raise BootRefused(f"an image of {size} bytes at {base:#x} does not lie in card memory")
        try:
            header = image.parse_header(gddr.read(base, min(size, image.HEADER_SIZE)), size)
            payload = gddr.read(base + header.payload_offset, header.payload_len)
            header.check_payload(payload)
        except image.ImageError as e:
            raise BootRefused(str(e)) from e
        return payload

    def _child(self, parent: int, payload_fd: int, report_fd: int, base: int, size: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(sig, signal.SIG_DFL)  # the board ignores them; what it executes shall not
            how = ns.enter(self.args["name"], report_fd, self._refused, parent)
            keep = [*self.bus.fds, self.log.fd, payload_fd]
            for fd in keep:
                os.set_inheritable(fd, True)
            boot = {
                "fds": self.bus.fds, "log_fd": self.log.fd, "base": base, "size": size,
                "contained": bool(how.namespaces), "cpu": X100_CPU,
                **{k: self.args[k] for k in ("name", "index", "dir", "timing")},
            }  # fmt: skip
            path, argv, env = image.start_command(payload_fd, [json.dumps(boot)])
            lib.mic_proc_set_name(f"{self.args['name']}-os".encode())
            os.execve(path, argv, env)
        except BaseException as e:
            self.log.error(f"the card OS cannot be started: {e}")
        finally:
            os._exit(70)
