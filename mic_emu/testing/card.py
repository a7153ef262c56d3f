"""A booted card for a test: programs, status, console, SCIF; the fixture ``card`` of the pytest plugin makes one."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from mic_emu.testing.machine import Machine, eventually
from mic_emu.wire import connect_unix

if TYPE_CHECKING:
    from mic_emu.scif import Endpoint

SOCKET = "MICEMU_SCIF_SOCKET"


class Console:
    """A client of the card's console: what somebody at ``micemu console`` types and sees."""

    def __init__(self, path: str) -> None:
        from mic_emu.virtio.console import input_message

        self._message = input_message
        self._sock: socket.socket = connect_unix(path)
        self.text = ""

    def send(self, text: str) -> None:
        """Type."""
        self._sock.sendall(self._message(text.encode()))

    def expect(self, text: str, within_s: float = 10.0) -> str:
        """Wait until ``text`` was printed; returns everything up to its end and takes it away from ``text``."""
        deadline = time.monotonic() + within_s
        while text not in self.text:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                raise AssertionError(
                    f"{text!r} is not on the console within {within_s:g} s: {self.text[-2000:]!r}"
                )
            piece = self._sock.recv(65536)
            if not piece:
                raise AssertionError(f"the console closed before {text!r}: {self.text[-2000:]!r}")
            self.text += piece.decode(errors="replace")
        end = self.text.index(text) + len(text)
        seen, self.text = self.text[:end], self.text[end:]
        return seen

    def close(self) -> None:
        """Detach."""
        self._sock.close()


class Card:
    """One card of a machine, by its name. Context manager: closes what was opened with it."""

    def __init__(self, machine: Machine, name: str = "mic0") -> None:
        self.machine = machine
        self.name = name
        self._console: Console | None = None
        self._endpoints: list[Endpoint] = []
        self._socket = os.environ.get(SOCKET)
        # libscif finds its node by this name: endpoints of the test are the host's, of this machine.
        os.environ[SOCKET] = str(machine.run_dir / "scif.sock")

    @property
    def node(self) -> int:
        """Its SCIF node number; the host is node 0."""
        return int(self.name.removeprefix("mic")) + 1

    @property
    def status(self) -> dict[str, Any]:
        """Its row of ``micemu status --json``."""
        return self.machine.card(self.name)

    @property
    def state(self) -> str:
        """``online``, ``shutting_down``, ..."""
        return str(self.status["state"])

    @property
    def run_dir(self) -> str:
        """Its folder: sockets, console.log, disk image."""
        return str(self.machine.run_dir / self.name)

    def run(self, *argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """A program on the card, to its end. AssertionError when it fails, unless ``check=False``."""
        return self.machine.on_card(*argv, card=self.name, **kwargs)

    def shell(self, script: str, **kwargs: Any) -> str:
        """A shell script on the card; its output."""
        return self.machine.shell(script, card=self.name, **kwargs)

    def device(self, kind: str) -> dict[str, Any]:
        """One device of the status, by type: ``net``, ``console``, ``block`` or your own."""
        return self.machine.device(kind, self.name)

    def dump(self, what: str) -> Any:
        """``micemu dump WHAT --json``: registers, page, vring, smpt, interrupts, dma."""
        return self.machine.json("dump", what, self.name)

    def wait(self, state: str, within_s: float = 30.0) -> None:
        """Wait until the card is in ``state`` (a state or a shutdown status)."""
        self.machine.micemu("wait", state, self.name, "--timeout", str(within_s), timeout=within_s + 10)

    def kill_os(self) -> None:
        """The card OS dies on the spot; returns when the host has seen it."""
        pid = self.status["pids"]["os"]
        assert pid, f"no OS runs on {self.name}"
        os.kill(pid, 9)
        eventually(lambda: self.status["pids"]["os"] != pid, 10, f"the end of the OS of {self.name}")

    def fault(self, kind: str, **words: object) -> int:
        """``micemu fault add``: make the card misbehave; returns the fault's number. Words are the command's options:
        ``card.fault("disk-error", rate=0.01, seed=7)``."""
        options = [part for name, value in words.items() for part in (f"--{name}", str(value))]
        return int(self.machine.json("fault", "add", self.name, kind, *options)["id"])

    def faults(self) -> list[dict[str, Any]]:
        """The card's faults, and how often each has acted."""
        found: list[dict[str, Any]] = self.machine.json("fault", "list", self.name)[self.name]
        return found

    @property
    def console(self) -> Console:
        """Attached when it is first used."""
        if self._console is None:
            self._console = Console(self.device("console")["socket"])
        return self._console

    def connect(self, port: int) -> Endpoint:
        """A SCIF endpoint of the host, connected to ``port`` of the card. Raises ScifError."""
        from mic_emu.scif import Endpoint

        ep = Endpoint()
        try:
            ep.connect((self.node, port))
        except BaseException:
            ep.close()
            raise
        self._endpoints.append(ep)
        return ep

    def close(self) -> None:
        """Detach console and endpoints; the card stays as it is."""
        if self._console:
            self._console.close()
        for ep in self._endpoints:
            ep.close()
        if self._socket is None:
            os.environ.pop(SOCKET, None)
        else:
            os.environ[SOCKET] = self._socket

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
