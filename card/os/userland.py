"""The kernel's side of init: programs, console shell, shutdown requests."""

from __future__ import annotations

import asyncio
import os
import tty
from collections.abc import Callable
from typing import Any

from mic_emu.bar import Bus
from mic_emu.cosm.states import Status
from mic_emu.log import Log


class Userland:
    """Init and everything below it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.console, slave = os.openpty()
        tty.setraw(slave)
        self._slave = slave
        os.set_blocking(self.console, False)
        self._request: Callable[[Status], None] = lambda status: None

    @classmethod
    def fork(cls, boot: dict[str, Any], params: dict[str, str], ramdisk: tuple[int, int] | None, bus: Bus, log: Log) -> Userland:
        """Fork init; call before any thread or event loop exists."""
        return cls(log)

    def on_request(self, callback: Callable[[Status], None]) -> None:
        """What a program on the card asks by poweroff, halt or reboot."""
        self._request = callback

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Follow init."""

    async def shutdown(self) -> None:
        """End all programs."""
