"""virtio-vsock: programs of host and card connect through Unix sockets (virtio 1.2, 5.10).

The host's end is ``micN/vsock.sock`` in the run directory. The driver is ``card/os/vsock.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mic_emu import layout as L
from mic_emu.errors import UsageError
from mic_emu.sizes import parse_size
from mic_emu.virtio.vsock_conn import HEADER
from mic_emu.virtio.vsock_node import Node
from mic_emu.vop.backend import RING_FEATURES, Backend, Chain

C = L.CONSTANTS
RX, TX, EVENT = range(3)
BUFFER = 2 << 20  # bytes kept for each connection at most: a sleeping peer is not waited for
BUFFER_MAX = 1 << 30
SOCKET = "vsock.sock"


def card_cid(index: int) -> int:
    """Context id of micN; the host is 2."""
    return int(C["VSOCK_CID_CARD"]) + index


class RxPacket:
    """A receive buffer of the card's driver on its way to become a packet."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.payload: list[memoryview] = []
        skip = HEADER.size
        for view in chain.writable:
            if len(view) > skip:
                self.payload.append(view[skip:])
            skip = max(0, skip - len(view))

    def send(self, header: bytes, length: int) -> None:
        """Header and ``length`` bytes of payload are the driver's."""
        self.chain.write(header)
        self.payload = []
        self.chain.complete(HEADER.size + length)


class Vsock(Backend):
    """``buffer=SIZE``: what is kept for each connection whose reader is slow (default 2M), less when there are more
    than 128 of them."""

    device_type = C["VIRTIO_ID_VSOCK"]
    num_vq = 3
    features = RING_FEATURES

    def __init__(self, buffer: str = "", **options: str) -> None:
        super().__init__(**options)
        try:
            self.buffer = parse_size(buffer, "buffer") if buffer else BUFFER
        except UsageError as e:
            raise ValueError(str(e)) from None
        if not 4096 <= self.buffer <= BUFFER_MAX:
            raise ValueError(f"buffer={buffer}: use 4K to 1G")
        self._free: deque[RxPacket] = deque()
        self._events: deque[Chain] = deque()
        self.node: Node | None = None

    def open(self) -> None:
        cid = card_cid(self.place.index)
        self.config = cid.to_bytes(8, "little")
        path = Path(self.place.folder) / SOCKET
        self.node = Node(C["VSOCK_CID_HOST"], cid, path, self, self.buffer)

    # --- rings ----------------------------------------------------------------------------------

    def process(self, chain: Chain) -> int | None:
        assert self.node
        if chain.queue == TX:
            self.node.received(chain.readable)
            chain.complete(0)
        elif chain.queue == EVENT:
            self._events.append(chain)
            return None
        elif chain.room <= HEADER.size:
            self.node.counters["malformed"] += 1
            return 0  # no packet fits it
        else:
            self._free.append(RxPacket(chain))
        self.node.pump()
        return None

    def reserve(self) -> RxPacket | None:
        """A buffer of the driver."""
        return self._free.popleft() if self._free else None

    def unreserve(self, packet: RxPacket) -> None:
        """It is the first of the next ones."""
        self._free.appendleft(packet)

    def reset(self) -> None:
        self._free.clear()
        self._events.clear()
        if self.node:
            self.node.reset()

    # --- programs -------------------------------------------------------------------------------

    def watch(self) -> Sequence[int]:
        return (self.node.fileno(),) if self.node else ()

    def readable(self, fd: int) -> None:
        assert self.node
        self.node.serve()
        self.node.pump()

    def timeout(self) -> float | None:
        return self.node.timeout() if self.node else None

    def expired(self) -> None:
        assert self.node
        self.node.expire()
        self.node.pump()

    def stats(self) -> dict[str, Any]:
        return {"open": self.node.connections, **self.node.counters} if self.node else {}

    def close(self) -> None:
        if self.node:
            self.node.close()
