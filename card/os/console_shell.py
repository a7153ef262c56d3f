"""The shell on the card's console, started again whenever it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mic_emu.card.os import program
from mic_emu.card.os.loop import EventLoop
from mic_emu.card.os.program import Command, Root, Started

_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh")
_BACKOFF_S = (0.1, 10.0)
_STEADY_S = 5.0


class ConsoleShell:
    """A shell on the card's console, started again when it ends."""

    def __init__(
        self, loop: EventLoop, root: Root, cwd: str, environment: Callable[[str], dict[str, str]]
    ) -> None:
        """environment: variables of a shell, by its path."""
        self.loop = loop
        self.root = root
        self.cwd = cwd
        self.environment = environment
        self.master, self.slave = root.open_terminal()
        self.pid = 0
        self.delay_s = _BACKOFF_S[0]
        self.since = 0.0
        self.stopped = False

    def opened(self) -> None:
        """The card OS has the master; keep none here, so that a hang-up is one."""
        self.keep = program.keep_open(self.master)
        os.close(self.master)
        self.spawn()

    def spawn(self) -> None:
        """Start the shell now."""
        if self.stopped:
            return
        shell = next((s for s in _SHELLS if os.path.exists(s)), "/bin/sh")
        self.since = time.monotonic()
        try:
            # No login shell: /etc/profile would drop the card's own commands from PATH.
            command = Command([shell, "-i"], self.environment(shell), self.cwd, terminal=self.slave)
            started = program.start(self.root, command)
        except OSError:
            self.retry()
            return
        self.pid = started.pid
        self.loop.watch(started.ready_fd, lambda: self.check(started))

    def check(self, started: Started) -> None:
        """A shell that could not be executed is tried again like one that ended, from the root folder
        in case the first one's is not on the card (any more)."""
        self.loop.unwatch(started.ready_fd)
        if started.result():
            self.cwd = "/"

    def ended(self) -> None:
        """It was reaped: once more, with a pause that grows while shells do not last."""
        self.pid = 0
        if time.monotonic() - self.since > _STEADY_S:
            self.delay_s = _BACKOFF_S[0]
        self.retry()

    def retry(self) -> None:
        """Start it again after the pause."""
        self.loop.after(self.delay_s, self.spawn)
        self.delay_s = min(self.delay_s * 2, _BACKOFF_S[1])

    def stop(self) -> None:
        """Start no more shells."""
        self.stopped = True
