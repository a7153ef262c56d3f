"""A small NBD client that says exactly what a test wants, right or wrong."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

IHAVEOPT = 0x49484156454F5054
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED = 1, 2, 3, 5, 6, 7, 8
ACK, SERVER, REP_INFO = 1, 2, 3
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009
READ, WRITE, DISC, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE, DF = 1, 2, 4


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


class Chunk(NamedTuple):
    flags: int
    kind: int
    cookie: int
    data: bytes


class NbdClient:
    """One connection; ``go`` negotiates, then requests by hand. Context manager."""

    def __init__(self, path: str, *, greet: bool = True, connect: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        if connect:
            self.sock.connect(path)
        self.size = self.flags = 0
        self._cookie = 0
        if greet:
            assert self.recv(16) == b"NBDMAGICIHAVEOPT"
            self.server_flags = int.from_bytes(self.recv(2), "big")
            self.sock.sendall(struct.pack(">I", 3))

    def recv(self, n: int) -> bytes:
        out = b""
        while len(out) < n:
            part = self.sock.recv(n - len(out))
            if not part:
                raise ConnectionResetError(f"end of stream after {len(out)} of {n} bytes")
            out += part
        return out

    def closed(self) -> bool:
        """The server has hung up (waits for it)."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def option(self, option: int, data: bytes = b"") -> None:
        self.sock.sendall(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)

    def reply(self) -> OptionReply:
        magic, option, kind, length = struct.unpack(">QIII", self.recv(20))
        assert magic == 0x3E889045565A9
        return OptionReply(option, kind, self.recv(length))

    def go(self, name: bytes = b"", *, structured: bool = False) -> None:
        if structured:
            self.option(STRUCTURED)
            assert self.reply().kind == ACK
        self.option(GO, struct.pack(">I", len(name)) + name + b"\0\0")
        while (r := self.reply()).kind != ACK:
            assert r.kind == REP_INFO
            if r.data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", r.data[2:])

    def request(self, kind: int, off: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Send one request; returns its cookie."""
        self._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, off, length or len(data))
        self.sock.sendall(head + data)
        return self._cookie

    def simple(self, length: int = 0) -> tuple[int, int, bytes]:
        """A simple reply: (error, cookie, data of a successful READ of ``length``)."""
        magic, error, cookie = struct.unpack(">IIQ", self.recv(16))
        assert magic == 0x67446698
        return error, cookie, self.recv(length) if not error else b""

    def chunk(self) -> Chunk:
        """A structured reply chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.recv(20))
        assert magic == 0x668E33EF
        return Chunk(flags, kind, cookie, self.recv(length))

    def call(
        self, kind: int, off: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """One request with a simple reply: (error, data)."""
        cookie = self.request(kind, off, length, data, flags)
        error, back, got = self.simple(length if kind == READ else 0)
        assert back == cookie
        return error, got

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
