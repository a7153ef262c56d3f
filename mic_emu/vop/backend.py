"""Your own device: the host half of a virtio device in Python.

::

    class Echo(Backend):
        device_type = 42

        def process(self, chain):
            return chain.write(chain.read()[::-1])

``micemu vop add mic0 --backend MODULE:Echo`` runs it in a process of its own, like the built-in
devices: restarted when it dies, stopped with the card. ``mic_emu.testing.backend`` runs it in a test.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib

C = L.CONSTANTS
RING_FEATURES = sum(1 << C[n] for n in ("VIRTIO_F_VERSION_1", "VIRTIO_F_EVENT_IDX", "VIRTIO_F_INDIRECT_DESC"))
MAX_SEGMENTS = 256
BATCH = 64  # chains until control requests get a turn
MAX_WATCHED = 5

__all__ = ["RING_FEATURES", "Backend", "Chain", "ChainDone", "DeviceLoop", "Place"]


class ChainDone(Exception):
    """The chain belongs to the card's driver again."""


class Chain:
    """One request of the card's driver: what it sent, and room for the answer.

    ``readable`` and ``writable`` are memoryviews of card memory, in order, without copies. They are
    valid until the chain is complete or the device is reset; afterwards every use raises.
    """

    def __init__(
        self, loop: DeviceLoop, queue: int, head: int, readable: list[memoryview], writable: list[memoryview]
    ) -> None:
        self._loop = loop
        self.queue = queue
        self._head = head
        self.readable = readable
        self.writable = writable
        self._written = 0
        self._open = True

    @property
    def room(self) -> int:
        """Bytes that may still be written."""
        return sum(len(v) for v in self.writable) - self._written

    def read(self) -> bytes:
        """Everything the driver sent, as one copy."""
        self._check()
        return b"".join(self.readable)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the answer; what has no room is dropped. Returns the bytes written to this chain so far."""
        self._check()
        left = memoryview(data).cast("B")
        at = self._written
        for view in self.writable:
            if at >= len(view):
                at -= len(view)
                continue
            n = min(len(view) - at, len(left))
            view[at : at + n] = left[:n]
            left = left[n:]
            self._written += n
            at = 0
            if not left:
                break
        return self._written

    def complete(self, written: int | None = None) -> None:
        """Give the chain back; ``written`` bytes of its writable part are valid (default: what ``write`` wrote).

        Raises ChainDone when it was given back already, or the device was reset meanwhile.
        """
        self._check()
        total = sum(len(v) for v in self.writable)
        length = self._written if written is None else written
        if not 0 <= length <= total:
            raise ValueError(f"{length} bytes written to a chain with room for {total}")
        self.invalidate()
        self._loop.completed(self, length)

    def _check(self) -> None:
        if not self._open:
            raise ChainDone("this chain is complete, or the device was reset")

    @property
    def head(self) -> int:
        """Its first descriptor."""
        return self._head

    def invalidate(self) -> None:
        """The memory belongs to the card's driver again."""
        self._open = False
        for view in (*self.readable, *self.writable):
            try:
                view.release()
            except BufferError:
                pass  # somebody made a view of the view; we cannot take that away
        self.readable, self.writable = [], []


@dataclass(frozen=True)
class Place:
    """Where a backend serves."""

    card: str = "mic0"
    index: int = 0  # of the card
    folder: Path = Path()  # the card's run directory, for sockets; gone with the card


class Backend(ABC):
    """Subclass this. Class attributes give the device's shape; ``process`` is its work.

    ``device_type`` is the virtio device id (1..127). ``num_vq`` rings (1..4) of ``num`` entries.
    ``features`` are the bits offered. ``config`` is the configuration space (up to 200 bytes or so).
    ``options`` are the KEY=VALUE words of ``micemu vop add``.
    """

    device_type: int = 0
    num_vq: int = 1
    num: int = C["VRING_ENTRIES"]
    features: int = RING_FEATURES
    config: bytes = b""
    place: Place = Place()

    def __init__(self, **options: str) -> None:
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(options))}")

    def open(self) -> None:
        """``place`` is known; ``features`` and ``config`` are read after this. OSError: the device is refused."""

    @abstractmethod
    def process(self, chain: Chain) -> int | None:
        """A request has come on ``chain.queue``. Returns the bytes written, which completes it, or None
        to keep it and call ``chain.complete`` later."""

    def driver_ok(self) -> None:
        """The card's driver is ready."""

    def reset(self) -> None:
        """The card resets the device: chains that you kept are invalid already, forget them."""

    def watch(self) -> Sequence[int]:
        """Descriptors to wait for beside the rings (up to five); asked before each sleep."""
        return ()

    def readable(self, fd: int) -> None:
        """One of ``watch`` is readable."""

    def timeout(self) -> float | None:
        """Seconds until ``expired`` is to be called; asked before each sleep."""
        return None

    def expired(self) -> None:
        """The time that ``timeout`` gave is over (or nearly)."""

    def stats(self) -> dict[str, Any]:
        """Counters of your own for ``micemu``'s status output."""
        return {}

    def close(self) -> None:
        """The process ends."""

    announce: Callable[[bytes], None] = staticmethod(lambda config: None)

    def set_config(self, config: bytes) -> None:
        """New configuration space, same length; the card's driver is told."""
        if len(config) != len(self.config):
            raise ValueError(f"the configuration space has {len(self.config)} bytes, not {len(config)}")
        self.config = bytes(config)
        self.announce(self.config)


class DeviceLoop:
    """Moves chains between the rings of ``vdev`` (struct mic_vdev) and a backend."""

    def __init__(self, backend: Backend, vdev: Any) -> None:
        self.backend = backend
        self._vdev = vdev
        self._vq = [ffi.addressof(vdev.vq, i) for i in range(backend.num_vq)]
        self._iov = ffi.new("struct iovec[]", MAX_SEGMENTS)
        self._chain = ffi.new("struct mic_chain *")
        self._kept: dict[tuple[int, int], Chain] = {}
        self._dirty: set[int] = set()
        self.processed = 0

    def run(self) -> int:
        """Serve until a decision is needed: ``enum mic_run`` or -errno, as the C loops."""
        while True:
            if lib.mic_vdev_handshake(self._vdev):
                return int(lib.MIC_RUN_HANDSHAKE)
            busy = self.pump()
            if not busy:  # every ring must ask for kicks, so no short cut
                busy = sum(bool(lib.mic_vq_enable_kick(vq)) for vq in self._vq) > 0
            why = self._look(0.0 if busy else self.backend.timeout())
            if why:
                return why

    def pump(self) -> bool:
        """Hand what is available to the backend, at most BATCH chains. True when there was something."""
        for vq in self._vq:
            lib.mic_vq_disable_kick(vq)
        before = self.processed
        for index in range(len(self._vq)):
            while self.processed - before < BATCH and (chain := self._pop(index)):
                self.processed += 1
                self._kept[index, chain.head] = chain
                written = self.backend.process(chain)
                if written is not None:
                    chain.complete(written)
        self.flush()
        return self.processed != before

    def _pop(self, index: int) -> Chain | None:
        vq = self._vq[index]
        if vq.broken:
            return None
        rc = lib.mic_vq_pop(vq, self._chain, self._iov, MAX_SEGMENTS)
        if rc < 0:
            lib.mic_vdev_broken(self._vdev, vq)
        if rc <= 0:
            return None
        c = self._chain
        views = [
            memoryview(ffi.buffer(v.iov_base, v.iov_len)).cast("B")
            for v in self._iov[0 : c.out_num + c.in_num]
        ]
        return Chain(self, index, c.head, [v.toreadonly() for v in views[: c.out_num]], views[c.out_num :])

    def completed(self, chain: Chain, length: int) -> None:
        """A chain goes back to the driver; interrupts follow with ``flush``."""
        del self._kept[chain.queue, chain.head]
        lib.mic_vq_push(self._vq[chain.queue], chain.head, length)
        self._dirty.add(chain.queue)

    def flush(self) -> None:
        """Interrupt the card for what was completed, where it wants that."""
        while self._dirty:
            lib.mic_vdev_complete(self._vdev, self._vq[self._dirty.pop()])

    def _look(self, timeout_s: float | None) -> int:
        timeout_ms = -1 if timeout_s is None else int(timeout_s * 1000) + (timeout_s > 0)
        extra = list(self.backend.watch())[:MAX_WATCHED]
        fds = ffi.new("int[]", extra or [-1])
        mask = lib.mic_vdev_sleep(self._vdev, fds, len(extra), timeout_ms)
        if mask < 0:
            return int(lib.MIC_RUN_SIGNAL) if -mask == errno.EINTR else int(mask)
        for i, fd in enumerate(extra):
            if mask >> (2 + i) & 1:
                self.backend.readable(fd)
        if mask == 0 and timeout_s:
            self.backend.expired()
        self.flush()
        return int(lib.MIC_RUN_CONTROL) if mask & 2 else 0

    def reset(self) -> None:
        """Chains that the backend kept belong to the card again (VOP-57)."""
        for chain in self._kept.values():
            chain.invalidate()
        self._kept.clear()
        self._dirty.clear()
        self.backend.reset()
