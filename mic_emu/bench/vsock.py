"""virtio-vsock: a stream each way beside the same programs over a plain Unix socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from mic_emu.testing.machine import Machine

Row = dict[str, Any]
PIECE = 1 << 20
GIB = 1 << 30
ROUNDS = 5

# Reads everything from its one connection, then says how much.
SINK = f"""
import socket, sys
l = socket.socket(socket.AF_UNIX); l.bind(sys.argv[1]); l.listen(1); print("up", flush=True)
c, n, b = l.accept()[0], 0, bytearray({PIECE})
while k := c.recv_into(b):
    n += k
c.sendall(b"%d" % n)
"""
# Connects through vsock and writes.
SOURCE = f"""
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(os.environ["MICEMU_VSOCK"]); s.sendall(b"CONNECT 70\\n"); s.recv(64)
b = bytes({PIECE})
for _ in range(int(sys.argv[1])):
    s.sendall(b)
s.shutdown(socket.SHUT_WR); s.recv(1)
"""
Start = Callable[[str], "subprocess.Popen[bytes]"]


def _to_sink(start: Start, sink: str, path: Path, greeting: bytes, pieces: int) -> float:
    """GiB/s from this process to a sink that listens at ``sink``, through the socket ``path``."""
    with start(sink) as program, socket.socket(socket.AF_UNIX) as sock:
        assert program.stdout
        program.stdout.readline()
        sock.connect(str(path))
        if greeting:
            sock.sendall(greeting)
            sock.recv(64)
        piece = bytes(PIECE)
        began = time.perf_counter()
        for _ in range(pieces):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        assert int(sock.recv(64)) == pieces * PIECE
        return pieces * PIECE / GIB / (time.perf_counter() - began)


def _from_card(machine: Machine, folder: Path, pieces: int) -> float:
    """GiB/s from a program of the card to this process."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "vsock.sock_70"))
        listener.listen(1)
        argv = ("run", "mic0", "--", sys.executable, "-c", SOURCE, str(pieces))
        with machine.popen(*argv, stdin=subprocess.DEVNULL):
            conn, _ = listener.accept()
            with conn:
                total, buffer, began = 0, bytearray(PIECE), time.perf_counter()
                while n := conn.recv_into(buffer):
                    total += n
                assert total == pieces * PIECE
                return total / GIB / (time.perf_counter() - began)


def rows(scale: float) -> list[Row]:
    """Throughput of one connection, to the card and from it: medians of alternating rounds."""
    pieces = max(16, int(512 * scale))
    with Machine() as m:
        folder = Path(m.boot("--disk", "none", "--net", "none", "--device", "vsock")["cards"][0]["run_dir"])
        command = [sys.executable, "-c", SINK]

        def on_host(path: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([*command, path], stdout=subprocess.PIPE)

        def on_card(path: str) -> subprocess.Popen[bytes]:
            return m.popen(
                "run", "mic0", "--", *command, path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )

        plain = m.home / "plain.sock"
        limits, to_card, from_card = [], [], []
        for port in range(60, 60 + ROUNDS):
            limits.append(_to_sink(on_host, str(plain), plain, b"", pieces))
            plain.unlink()
            sink, greeting = f"/run/vsock/vsock.sock_{port}", b"CONNECT %d\n" % port
            to_card.append(_to_sink(on_card, sink, folder / "vsock.sock", greeting, pieces))
            from_card.append(_from_card(m, folder, pieces))
            (folder / "vsock.sock_70").unlink()
    limit = median(limits)
    return [
        {"name": name, "value": median(got), "unit": "GiB/s", "limit": limit, "ratio": median(got) / limit}
        for name, got in (
            ("vsock stream, host to card", to_card),
            ("vsock stream, card to host", from_card),
        )
    ]
