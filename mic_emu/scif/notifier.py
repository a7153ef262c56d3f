"""The node's notify page: how programs of any node tell this one that an endpoint has bytes or room.

A C thread serves the page. For a program's endpoint it changes the readiness of its descriptor, for
a kernel client it wakes this loop.
"""

from __future__ import annotations

import errno
import heapq
import os
from typing import TYPE_CHECKING, Any

from mic_emu._native import ffi, lib
from mic_emu.bar import drain
from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

SLOTS: int = lib.MIC_SCIF_SLOTS
_EVENTFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


class Notifier:
    """Slots 0..SLOTS-1, one per connected endpoint of the node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        # Of the notify page, in our memory; the page that says whether the node lives is behind it.
        self.offset = 0
        self.page: Any = None  # struct mic_scif_notify *, while it runs
        self._thread: Any = None
        self._event_fd = -1
        self._owners: dict[int, Endpoint] = {}
        self._free: list[int] = []
        self._next = 0

    def start(self) -> None:
        """Allocate the page and start the thread; nothing when it runs. Raises OutOfNodeMemory."""
        if self._thread is not None:
            return
        self.offset = self.node.allocator.alloc(2 * PAGE)
        self._event_fd = lib.mic_eventfd(_EVENTFD_FLAGS)
        self.page = ffi.cast("struct mic_scif_notify *", self.node.memory.pointer + self.offset)
        self._thread = lib.mic_scif_notifier_start(self.page, self._event_fd)
        if self._event_fd < 0 or self._thread == ffi.NULL:
            self._thread = None
            raise OSError(ffi.errno, "cannot start the SCIF notifier")
        self.node.events.add(self._event_fd, self._on_event)

    def stop(self) -> None:
        """End the thread and free the page."""
        if self._thread is None:
            return
        self.node.events.remove(self._event_fd)
        lib.mic_scif_notifier_stop(self._thread)
        self._thread = None
        os.close(self._event_fd)
        self.node.allocator.free(self.offset)

    def take(self, owner: Endpoint) -> int:
        """A slot for ``owner``. Raises ScifError ENOMEM when all are taken."""
        if self._free:
            slot = heapq.heappop(self._free)
        elif self._next < SLOTS:
            slot = self._next
            self._next += 1
        else:
            raise ScifError(errno.ENOMEM, "too many connections on this node")
        self._owners[slot] = owner
        self.refresh(slot)
        return slot

    def refresh(self, slot: int) -> None:
        """The owner's descriptor changed."""
        lib.mic_scif_notifier_set(self._thread, slot, self._owners[slot].notify_fd)

    def give_back(self, slot: int) -> None:
        """The slot's endpoint is gone."""
        if self._thread is not None:
            lib.mic_scif_notifier_clear(self._thread, slot)
        del self._owners[slot]
        heapq.heappush(self._free, slot)

    def _on_event(self) -> None:
        drain(self._event_fd)
        while (slot := lib.mic_scif_notifier_next(self._thread)) != -1:
            if slot == lib.MIC_SCIF_COPY_LEFT:
                self.node.look_at_copies()
                continue
            owner = self._owners.get(slot)
            if owner is not None:
                owner.changed()
