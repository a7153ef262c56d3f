"""The card's half of a virtio-vsock device, packet by packet, for tests that look at each or break the rules."""

from __future__ import annotations

import socket
from pathlib import Path

from mic_emu import layout as L
from mic_emu.testing.backend import BackendRig
from mic_emu.virtio.vsock import RX, TX, Vsock
from mic_emu.virtio.vsock_conn import HEADER, STREAM, Op

HOST, CARD = 2, 3
FIELDS = [f.name for f in L.VSOCK_HDR.fields]


class Peer:
    """Plays the driver of a ``Vsock`` in ``folder``. Context manager."""

    def __init__(self, folder: Path, room: int = 4096, buffers: int = 32, **options: str) -> None:
        self.folder, self.room = folder, room
        self.device = Vsock(**options)
        self.rig = BackendRig(self.device, folder)
        self._rx: list[int] = []
        self._buffers = buffers

    def __enter__(self) -> Peer:
        self.rig.__enter__()
        self.offer(self._buffers)
        return self

    def __exit__(self, *exc: object) -> None:
        self.rig.__exit__(*exc)  # type: ignore[arg-type]

    def offer(self, count: int = 1) -> None:
        """More receive buffers for the device."""
        self._rx += [self.rig.submit(room=HEADER.size + self.room, queue=RX) for _ in range(count)]

    def raw(self, data: bytes) -> None:
        """Any bytes as a packet; taken when this returns."""
        self.rig.answer(self.rig.submit(data, queue=TX), TX)

    def send(self, op: int, payload: bytes = b"", *, local: int = 1000, peer: int = 5, **fields: int) -> None:
        """A packet of the card: ``local`` is the card's port, ``peer`` the host's."""
        header = {"src_cid": CARD, "dst_cid": HOST, "src_port": local, "dst_port": peer, "len": len(payload), "type": STREAM,
                      "op": op, "flags": 0, "buf_alloc": 65536, "fwd_cnt": 0}  # fmt: skip
        self.raw(L.VSOCK_HDR.pack(**{**header, **fields}) + payload)

    def recv(self, within_s: float = 20.0) -> tuple[dict[str, int], bytes]:
        """The device's next packet: header, payload."""
        packet = self.rig.answer(self._rx.pop(0), RX, within_s)
        self.offer()
        header = dict(zip(FIELDS, HEADER.unpack(packet[: HEADER.size]), strict=True))
        assert len(packet) == HEADER.size + header["len"]
        return header, packet[HEADER.size :]

    def expect(self, op: Op, within_s: float = 20.0) -> dict[str, int]:
        """The next packet, which must be an ``op``."""
        header, _ = self.recv(within_s)
        assert header["op"] == op, f"{Op(header['op']).name} where {op.name} was expected"
        return header

    # --- programs of the host ---

    def connect(self, line: bytes = b"CONNECT 1000\n") -> socket.socket:
        """A program at the host's socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(self.folder / "vsock.sock"))
        sock.sendall(line)
        return sock

    def connected(self, **fields: int) -> tuple[socket.socket, int]:
        """A program that is connected with the card's port 1000; (its socket, its port)."""
        sock = self.connect()
        port = self.expect(Op.REQUEST)["src_port"]
        self.send(Op.RESPONSE, peer=port, **fields)
        assert sock.recv(64) == b"OK %d\n" % port
        return sock, port

    def listen(self, port: int = 5, backlog: int = 8) -> socket.socket:
        """A program that listens for the card."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.bind(str(self.folder / f"vsock.sock_{port}"))
        sock.listen(backlog)
        return sock

    def works(self) -> None:
        """A connection can be made and used; it is gone afterwards."""
        sock, port = self.connected()
        sock.sendall(b"works")
        assert self.recv()[1] == b"works"
        self.send(Op.RST, peer=port)
        assert sock.recv(1) == b""
        sock.close()
