"""Looking for the answer of another node before the loop sleeps.

A node that grants, confirms or lets go answers within a tenth of a millisecond: no longer than it takes to
wake a sleeper on an idle CPU, and to be woken costs the node that answers as much as the answer. So
after such a message the node looks at its rings for a moment. The look ends when a program or
another node wants something, and gives the CPU away as packet loops do (``native/include/mic/linger.h``).
Fault filters on doorbells would not be felt: while there are any, nobody looks.
"""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING

from mic_emu._native import ffi, lib

if TYPE_CHECKING:
    from mic_emu.scif.link import Link

LOOK_US = 100


class Linger:
    """The links of one node, and what else it has to do."""

    def __init__(self) -> None:
        self._state = ffi.gc(lib.mic_scif_linger_new(LOOK_US), lib.mic_scif_linger_free)
        self._work = select.epoll()
        self._links: list[Link] = []
        self._rings = ffi.new("struct mic_scif_rx *[]", 0)
        self._expecting = False

    def watch(self, fd: int) -> None:
        """``fd`` readable is work for the loop, until ``unwatch``."""
        self._work.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """It is about to be closed."""
        self._work.unregister(fd)

    def set_links(self, links: list[Link]) -> None:
        """Those that are attached to their peers."""
        self._links = links
        self._rings = ffi.new("struct mic_scif_rx *[]", [link.rings.rx for link in links if link.rings])

    def expect(self) -> None:
        """A message was sent whose answer comes at once, or not for long."""
        if not self._expecting:
            self._expecting = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._expecting = False
        if self._links and not any(link.ports.disturbed() for link in self._links):
            i = lib.mic_scif_linger(self._state, self._rings, len(self._links), self._work.fileno())
            if i >= 0:
                link = self._links[i]
                link.take()
                if link.rings is not None:
                    link.on_doorbell()  # it has rung meanwhile: nothing is left to wake us for

    def close(self) -> None:
        """The node leaves."""
        self._links = []
        self._work.close()
