"""The 16-bit port space of one node (SCIF 2.2)."""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable

from mic_emu import layout
from mic_emu.scif.errors import ScifError

ADMIN_END: int = layout.CONSTANTS["SCIF_ADMIN_PORT_END"]
FIRST_EPHEMERAL: int = layout.CONSTANTS["SCIF_PORT_RSVD"] + 1
LAST = 65535


class Ports:
    """Which ports are taken, with a reference count: a listener and what it accepted share one.

    Ephemeral numbers are given out lowest first (SCIF-23).
    """

    def __init__(self) -> None:
        self._refs: dict[int, int] = {}
        self._next = FIRST_EPHEMERAL  # nothing at or above it was ever given out
        self._returned: list[int] = []  # heap of numbers below _next; may hold taken ones
        self._waiting: dict[int, list[Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, port: int) -> bool:
        return port in self._refs

    def take(self, port: int) -> int:
        """Take ``port``, or the lowest free ephemeral one for 0; returns the number.

        Raises ScifError EINVAL (in use), ENOSPC (none left).
        """
        if port:
            if port in self._refs:
                raise ScifError(errno.EINVAL, f"port {port} is in use")
            self._refs[port] = 1
            return port
        port = self._lowest()
        self._refs[port] = 1
        return port

    def _lowest(self) -> int:
        while self._returned:
            port = heapq.heappop(self._returned)
            if port not in self._refs:
                return port
        while self._next <= LAST:
            port = self._next
            self._next += 1
            if port not in self._refs:
                return port
        raise ScifError(errno.ENOSPC, "no free port")

    def share(self, port: int) -> None:
        """One more endpoint uses ``port`` (an accepted one, SCIF-25)."""
        self._refs[port] += 1

    def drop(self, port: int) -> None:
        """One endpoint less uses ``port``; with the last it is free at once."""
        self._refs[port] -= 1
        if self._refs[port] == 0:
            del self._refs[port]
            if FIRST_EPHEMERAL <= port < self._next:
                heapq.heappush(self._returned, port)
            for callback in self._waiting.pop(port, ()):
                callback()

    def when_free(self, port: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` when nobody uses ``port``: now, or with the last ``drop``."""
        if port in self._refs:
            self._waiting.setdefault(port, []).append(callback)
        else:
            callback()
