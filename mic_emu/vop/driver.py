"""Your own driver: the card half of a virtio device in Python.

::

    class EchoDriver(Driver):
        device_type = 42

        def run(self):
            self.device.log(self.request(data=b"hello", room=16).decode())

The kernel command line loads it: ``micemu boot --cmdline micemu.drivers=MODULE:EchoDriver``. ``run`` has
a thread of its own; every wait in it ends with ``Stopped`` when the device goes.
"""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mic_emu._native import ffi, lib
from mic_emu.bar import Bus

ALIGN = 64


class Stopped(Exception):
    """The device goes away, or the card goes down."""


class DeviceBroken(OSError):
    """The device has broken its rings (EIO)."""


@dataclass
class Request:
    """One chain on its way; ``data`` is the answer once ``done``."""

    slot: int
    length: int  # bytes sent
    done: bool = False
    data: bytes = b""


@dataclass
class Device:
    """What a driver gets of its device."""

    bus: Bus
    vdrv: Any  # struct mic_vdrv *
    features: int
    folder: Path  # the card's run directory, where programs find sockets and FIFOs
    read_config: Callable[[int, int], bytes]
    log: Callable[[str], object]


class Queue:
    """One ring with buffers of ``size`` bytes each, which hold a request and its answer."""

    def __init__(self, device: Device, index: int, area: int, count: int, size: int) -> None:
        self._device = device
        self._dq = ffi.addressof(device.vdrv.dq, index)
        self._area, self._size = area, size
        self._free = deque(range(count))
        self._flying: dict[int, Request] = {}
        self._token = ffi.new("uint64_t *")
        self._len = ffi.new("uint32_t *")

    def submit(self, data: bytes = b"", room: int = 0) -> Request:
        """Send ``data`` with ``room`` bytes for the answer. Raises OSError: ENOSPC every buffer is in use, EMSGSIZE."""
        start = (len(data) + ALIGN - 1) // ALIGN * ALIGN
        if start + room > self._size or not (data or room):
            raise OSError(errno.EMSGSIZE, f"{len(data)} + {room} bytes do not fit a buffer of {self._size}")
        if not self._free:
            raise OSError(errno.ENOSPC, "every buffer of the queue is in use")
        slot = self._free.popleft()
        at = self._area + slot * self._size
        self._device.bus.gddr.write(at, data)
        segments = [s for s in ((at, len(data)), (at + start, room)) if s[1]]
        rc = lib.mic_dq_add(self._dq, ffi.new("struct mic_seg[]", segments), bool(data), bool(room), slot)
        if rc < 0:
            self._free.append(slot)
            raise DeviceBroken(-rc, "the ring takes no request")
        request = self._flying[slot] = Request(slot, start)
        lib.mic_vdrv_kick(self._device.vdrv, self._dq)
        return request

    def collect(self) -> list[Request]:
        """What has been answered since the last call. Raises DeviceBroken."""
        done: list[Request] = []
        while True:
            rc = lib.mic_dq_get(self._dq, self._token, self._len)
            if rc < 0:
                raise DeviceBroken(-rc, "the device broke the ring")
            if rc == 0:
                return done
            request = self._flying.pop(int(self._token[0]))
            at = self._area + request.slot * self._size + request.length
            request.data = self._device.bus.gddr.read(at, min(self._len[0], self._size - request.length))
            request.done = True
            self._free.append(request.slot)
            done.append(request)

    def pending(self) -> bool:
        """Ask for an interrupt; True when something was answered meanwhile."""
        return bool(lib.mic_dq_enable_interrupt(self._dq))


@dataclass
class Driver(ABC):
    """Subclass this; ``run`` is your driver. ``buffers`` of ``buffer_size`` bytes for each ring."""

    device: Device
    areas: Sequence[int]
    queues: list[Queue] = field(init=False)

    device_type = 0
    features = 0  # device bits that you understand; ring bits are added
    rings = 1
    buffers = 16
    buffer_size = 4096

    def __post_init__(self) -> None:
        self.queues = [
            Queue(self.device, i, area, self.buffers, self.buffer_size) for i, area in enumerate(self.areas)
        ]

    @abstractmethod
    def run(self) -> None:
        """The driver's work, in a thread of its own; end it with ``Stopped`` or by returning."""

    def config_changed(self) -> None:
        """The configuration space has new values (called in another thread)."""

    def close(self) -> None:
        """``run`` has ended: give back what it opened."""

    def wait(self, *fds: int, timeout_s: float | None = None) -> list[int]:
        """Sleep until the device interrupts, one of ``fds`` (up to five) is readable, or the time is over.

        Returns the readable ones. Raises Stopped.
        """
        timeout_ms = -1 if timeout_s is None else int(timeout_s * 1000)
        if sum(q.pending() for q in self.queues):  # every ring must ask for interrupts, so no short cut
            timeout_ms = 0
        mask = lib.mic_vdrv_sleep(self.device.vdrv, ffi.new("int[]", fds or [-1]), len(fds), timeout_ms)
        if mask > 0 and mask & 2:
            raise Stopped
        return [fd for i, fd in enumerate(fds) if mask > 0 and mask >> (2 + i) & 1]

    def request(self, queue: int = 0, data: bytes = b"", room: int = 0, timeout_s: float = 10.0) -> bytes:
        """Send and wait for the answer; for drivers with one request at a time.

        Raises TimeoutError, Stopped, DeviceBroken.
        """
        sent = self.queues[queue].submit(data, room)
        deadline = time.monotonic() + timeout_s
        while not sent.done:
            self.queues[queue].collect()
            if sent.done:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the device did not answer within {timeout_s:g} s")
            self.wait(timeout_s=left)
        return sent.data
