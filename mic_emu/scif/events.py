"""What a node waits for, served together; and the look for an answer before it sleeps.

A connection is a chain of short steps of several processes. Were each descriptor the loop's own affair, every step
would take a turn of the loop, which costs more than most steps. So whichever of them wakes the loop, what has become
ready by the time that a step is done is served in the same turn.

A node that grants, confirms or lets go answers within a tenth of a millisecond: no longer than it takes to
wake a sleeper on an idle CPU, and to be woken costs the node that answers as much as the answer. So
after such a message the node looks at its rings for a moment. The look ends when a program or
another node wants something, and gives the CPU away as packet loops do (``native/include/mic/linger.h``).
Fault filters on doorbells would not be felt: while there are any, nobody looks.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu._native import ffi, lib

if TYPE_CHECKING:
    from mic_emu.scif.link import Link

LOOK_US = 100
BATCH = 256  # served before the loop may do something else

Handler = Callable[[], object]


class Events:
    """The descriptors, and the links, of one node."""

    def __init__(self) -> None:
        self._state = ffi.gc(lib.mic_scif_linger_new(LOOK_US), lib.mic_scif_linger_free)
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._ready = ffi.new("int[]", lib.MIC_SCIF_EVENTS)
        self._ring = ffi.new("int *")
        self._links: list[Link] = []
        self._rings = ffi.new("struct mic_scif_rx *[]", 0)
        self._meanwhile: list[Handler] = []
        self._expecting = False
        self._active = False  # serving, or about to

    def add(self, fd: int, handler: Handler) -> None:
        """Call ``handler`` in the running loop whenever ``fd`` is readable, until ``remove``."""
        # Not our epoll descriptor in its place: a program that asks would then wake us as if it went on by itself, and
        # the kernel would look for another CPU than that which the program is about to leave.
        asyncio.get_running_loop().add_reader(fd, self._serve)
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """It is about to be closed."""
        self._epoll.unregister(fd)
        del self._handlers[fd]
        asyncio.get_running_loop().remove_reader(fd)

    def set_links(self, links: list[Link]) -> None:
        """Those that are attached to their peers."""
        self._links = links
        self._rings = ffi.new("struct mic_scif_rx *[]", [link.rings.rx for link in links if link.rings])

    def expect(self) -> None:
        """A message was sent whose answer comes at once, or not for long."""
        self._expecting = True
        self._activate()

    def meanwhile(self, work: Handler) -> None:
        """Do ``work`` soon, best while the answer of a peer is on its way."""
        self._meanwhile.append(work)
        self._activate()

    def _activate(self) -> None:
        if not self._active:
            self._active = True
            asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        """Whatever is ready, what becomes ready by that, and the answers that are expected."""
        self._active = True
        served = 0
        try:
            while served < BATCH and not self._epoll.closed and (n := self._step()):
                served += n
        finally:
            self._active = self._expecting = False

    def _step(self) -> int:
        """What is ready now; returns how much it was, 0: nothing was, nor came."""
        while self._meanwhile:
            self._meanwhile.pop()()
        look = self._expecting and not any(link.ports.disturbed() for link in self._links)
        n = lib.mic_scif_events(
            self._state,
            self._rings,
            len(self._links) if look else 0,
            self._epoll.fileno(),
            self._ready,
            self._ring,
        )
        self._expecting = False
        for fd in self._ready[0:n]:
            handler = self._handlers.get(fd)
            if handler is not None:  # one of this round may have removed another
                handler()
        i = self._ring[0]
        if i < 0:
            return int(n)
        link = self._links[i]
        link.take()
        if link.rings is not None:
            link.on_doorbell()  # it has rung meanwhile: nothing is left to wake us for
        return 1

    def close(self) -> None:
        """The node leaves."""
        self._links = []
        self._epoll.close()
