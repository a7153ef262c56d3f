"""A small event loop for a process that forks: epoll and timers, no threads, no hidden descriptors."""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable


class EventLoop:
    """Handlers by descriptor, actions by time."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()

    def turn(self, until: float | None = None) -> None:
        """Handle what is ready, or wait for the next event or timer."""
        ends = [t for t in (self._timers[0][0] if self._timers else None, until) if t is not None]
        timeout = max(0.0, min(ends) - time.monotonic()) if ends else -1
        for fd, _ in self._epoll.poll(timeout):
            handler = self._handlers.get(fd)
            if handler:
                handler()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call ``handler`` while ``fd`` is readable or hung up."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop watching; nothing happens when it is not watched. Call it before closing ``fd``."""
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, ``seconds`` from now."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), action))
