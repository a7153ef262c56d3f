"""The card's end of virtio-vsock: programs find it at ``$MICEMU_VSOCK``, or ``/run/vsock/vsock.sock``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mic_emu import layout as L
from mic_emu.virtio.vsock import BUFFER, EVENT, RX, SOCKET, TX
from mic_emu.virtio.vsock_conn import HEADER
from mic_emu.virtio.vsock_node import Node
from mic_emu.vop.driver import ALIGN, Driver, Queue, Request

C = L.CONSTANTS
BUFFERS = 32
PAYLOAD = 128 << 10  # bytes of one packet at most
EVENT_SIZE = 4


def prepare_folder(card: Path) -> Path:
    """The folder of the card's sockets, empty: programs make theirs there, too."""
    folder = card / "vsock"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


class TxPacket:
    """A transmit buffer: the header at its start, the payload aligned behind it."""

    def __init__(self, queue: Queue, request: Request) -> None:
        self.queue, self.request = queue, request
        self.payload: Sequence[memoryview] = [request.memory[ALIGN : ALIGN + PAYLOAD]]

    def send(self, header: bytes, length: int) -> None:
        """Post it; the device is kicked by the driver's loop."""
        self.request.memory[: HEADER.size] = header
        parts = [(0, HEADER.size), (ALIGN, length)]
        self.queue.post(self.request, parts if length else parts[:1], [])


class VsockDriver(Driver):
    """virtio 1.2, 5.10: receive buffers for the device, packets of our programs to it."""

    device_type = C["VIRTIO_ID_VSOCK"]
    rings = 3

    @classmethod
    def shapes(cls) -> list[tuple[int, int]]:
        return [(BUFFERS, ALIGN + PAYLOAD), (BUFFERS, ALIGN + PAYLOAD), (4, ALIGN)]

    def run(self) -> None:
        self._node: Node | None = None
        for request in self._take_all(RX):
            self._offer(request)
        for request in self._take_all(EVENT):
            self.queues[EVENT].post(request, [], [(0, EVENT_SIZE)])
        self._open()
        while True:
            for queue in self.queues:
                queue.kick()
            self._sleep()
            self._serve()

    def _open(self) -> None:
        cid = int.from_bytes(self.device.read_config(0, 8), "little")
        self._node = Node(cid, C["VSOCK_CID_HOST"], self.device.folder / "vsock" / SOCKET, self, BUFFER)

    def _take_all(self, queue: int) -> list[Request]:
        return [r for r in iter(self.queues[queue].reserve, None) if r]

    def _offer(self, request: Request) -> None:
        self.queues[RX].post(request, [], [(0, HEADER.size), (ALIGN, PAYLOAD)])

    def _sleep(self) -> None:
        assert self._node
        timeout = self._node.timeout()
        if self.wait(self._node.fileno(), timeout_s=timeout):
            self._node.serve()
        if timeout is not None:
            self._node.expire()

    def _serve(self) -> None:
        assert self._node
        for request in self.queues[RX].completed():
            header, payload = request.memory[: HEADER.size], request.memory[ALIGN : ALIGN + PAYLOAD]
            length = max(0, request.written - HEADER.size)
            self._node.received([header[: request.written], payload[:length]])
            self._offer(request)
        for request in self.queues[TX].completed():
            self.queues[TX].release(request)
        for request in self.queues[EVENT].completed():
            # TRANSPORT_RESET is the only one: every connection is lost, and our id may be another.
            self.queues[EVENT].post(request, [], [(0, EVENT_SIZE)])
            self._node.close()
            self._open()
        self._node.pump()

    def reserve(self) -> TxPacket | None:
        """A free transmit buffer."""
        request = self.queues[TX].reserve()
        return TxPacket(self.queues[TX], request) if request else None

    def unreserve(self, packet: TxPacket) -> None:
        """It is free again."""
        self.queues[TX].release(packet.request)

    def close(self) -> None:
        node: Node | None = getattr(self, "_node", None)
        if node:
            node.close()
