"""The emulator's own network on the host side: which mode works here, and its namespaces."""

from __future__ import annotations

import os
from typing import Any

from mic_emu.errors import MicemuError
from mic_emu.log import Log


class Network:
    """One per instance; the namespaces are made when the first card needs them."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._ns: list[int] = []

    def prepare(self, index: int, mode: str) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
        """Arguments, descriptors and facts for the net backend of card ``index``."""
        raise MicemuError("not wired yet")

    def namespace_fds(self) -> list[int]:
        """Descriptors of the user and net namespace, for ``micemu run host``; none without them."""
        return list(self._ns)

    def close(self) -> None:
        for fd in self._ns:
            os.close(fd)
        self._ns.clear()
