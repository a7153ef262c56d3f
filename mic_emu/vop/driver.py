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
    """One chain on its way; ``data`` is the answer once ``done``.

    ``memory`` is the whole buffer: for drivers that fill it in place (``Queue.reserve``), valid as long as
    the request is theirs.
    """

    slot: int
    memory: memoryview
    length: int = 0  # bytes sent
    done: bool = False
    data: bytes = b""
    written: int = 0  # bytes that the device wrote


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
        memory = memoryview(device.bus.gddr.buffer)[area : area + count * size].cast("B")
        self._memory = [memory[i * size : (i + 1) * size] for i in range(count)]
        self._free = deque(range(count))
        self._flying: dict[int, Request] = {}
        self._token = ffi.new("uint64_t *")
        self._len = ffi.new("uint32_t *")

    # --- a request and its answer ---

    def submit(self, data: bytes = b"", room: int = 0) -> Request:
        """Send ``data`` with ``room`` bytes for the answer. Raises OSError: ENOSPC every buffer is in use, EMSGSIZE."""
        start = (len(data) + ALIGN - 1) // ALIGN * ALIGN
        if start + room > self._size or not (data or room):
            raise OSError(errno.EMSGSIZE, f"{len(data)} + {room} bytes do not fit a buffer of {self._size}")
        request = self.reserve()
        if request is None:
            raise OSError(errno.ENOSPC, "every buffer of the queue is in use")
        request.memory[: len(data)] = data
        request.length = start
        try:
            self.post(request, [(0, len(data))] if data else [], [(start, room)] if room else [])
        except OSError:
            self.release(request)
            raise
        self.kick()
        return request

    def collect(self) -> list[Request]:
        """What has been answered since the last call. Raises DeviceBroken."""
        done = self.completed()
        for request in done:
            request.data = bytes(request.memory[request.length : request.length + request.written])
            self.release(request)
        return done

    # --- the same in place, without copies ---

    def reserve(self) -> Request | None:
        """A free buffer, yours until ``post`` or ``release``; None: every one is in use."""
        if not self._free:
            return None
        slot = self._free.popleft()
        return Request(slot, self._memory[slot])

    def post(
        self, request: Request, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]
    ) -> None:
        """Make parts (offset, length) of its buffer available as one chain; ``kick`` afterwards.

        Raises DeviceBroken; the buffer is yours still.
        """
        base = self._area + request.slot * self._size
        segments = [(base + at, length) for at, length in (*readable, *writable)]
        segs = ffi.new("struct mic_seg[]", segments)
        rc = lib.mic_dq_add(self._dq, segs, len(readable), len(writable), request.slot)
        if rc < 0:
            raise DeviceBroken(-rc, "the ring takes no request")
        request.done = False
        self._flying[request.slot] = request

    def kick(self) -> None:
        """Tell the device of what was posted, if it wants that."""
        lib.mic_vdrv_kick(self._device.vdrv, self._dq)

    def completed(self) -> list[Request]:
        """What came back since the last call; the buffers are yours. Raises DeviceBroken."""
        done: list[Request] = []
        while True:
            rc = lib.mic_dq_get(self._dq, self._token, self._len)
            if rc < 0:
                raise DeviceBroken(-rc, "the device broke the ring")
            if rc == 0:
                return done
            request = self._flying.pop(int(self._token[0]))
            request.written = int(self._len[0])
            request.done = True
            done.append(request)

    def release(self, request: Request) -> None:
        """The buffer is free again."""
        self._free.append(request.slot)

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
            Queue(self.device, i, area, *shape)
            for i, (area, shape) in enumerate(zip(self.areas, self.shapes(), strict=True))
        ]

    @classmethod
    def shapes(cls) -> list[tuple[int, int]]:
        """(buffers, bytes of each) of every ring, where they differ."""
        return [(cls.buffers, cls.buffer_size)] * cls.rings

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
        timeout_ms = -1 if timeout_s is None else int(timeout_s * 1000) + (timeout_s > 0)
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
