"""virtio-console: pty, log, clients, and the card's pty at the other end (VOP-60)."""

from __future__ import annotations

import itertools
import os
import random
import select
import socket
import struct
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from netwire import Loop, eventually

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.testing.netpair import eventfd
from mic_emu.testing.rings import DRIVER_OK, NEEDS_RESET, FakeDevice, FakeDriver, Rig
from mic_emu.virtio import console

MB = 1 << 20


class Line:
    """A console between ``card`` (a socket or pty of the test) and the host's pty, log and clients.

    ``driver=False`` leaves the card half to the test (``fake``).
    """

    def __init__(
        self,
        tmp: Path,
        *,
        features: int = console.MODERN_FEATURES,
        card_pty: bool = False,
        driver: bool = True,
    ) -> None:
        self.rig = Rig(128, num_vq=2, features=features, device_type=3, config=console.pack_config())
        self.fds = [eventfd(), eventfd()]
        self.fake = FakeDriver(self.rig, stop_fd=self.fds[1])
        self.rig.status = DRIVER_OK
        self.pty = console.HostPty()
        self.log_path = tmp / "console.log"
        self.log_fd = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.sock_path = str(tmp / "console.sock")
        self.listen = socket.socket(socket.AF_UNIX)
        self.listen.bind(self.sock_path)
        self.listen.listen(16)
        self.listen.setblocking(False)
        self.dev = FakeDevice(self.rig, control_fd=self.fds[0])
        self.dev.vdev.status = DRIVER_OK
        self.sizes: list[tuple[int, int]] = []
        self.con = console.ConsoleDevice(
            self.dev.vdev, pty_fd=self.pty.fd, log_fd=self.log_fd, listen_fd=self.listen.fileno()
        )
        self.loops = [Loop(self.con.run, self.fds[0], self._again)]
        self.drv: console.ConsoleDriver | None = None
        if card_pty:
            self.card_pty = console.HostPty()
            local = self.card_pty.fd
            self.card = -1
        else:
            a, b = socket.socketpair()
            a.setblocking(False)
            self._pair = (a, b)
            local, self.card = a.fileno(), b.fileno()
        if driver:
            area = console.driver_area()
            self.drv = console.ConsoleDriver(self.fake.vdrv, local, self.rig.alloc(area), area)
            self.loops.append(Loop(self.drv.run, self.fds[1], lambda why: False))

    def _again(self, why: int) -> bool:
        if why == lib.MIC_RUN_RESIZE:
            self.sizes.append(self.con.window_size)
        return why != lib.MIC_RUN_CONTROL

    def client(self) -> socket.socket:
        """A client that is served already."""
        before = self.con.stats()["clients_seen"]
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(20)
        s.connect(self.sock_path)
        eventually(lambda: self.con.stats()["clients_seen"] > before, "the client to be accepted")
        return s

    def logged(self) -> bytes:
        return self.log_path.read_bytes()

    def close(self) -> None:
        for loop in self.loops:
            loop.stop()
        if self.drv:
            self.drv.close()
        else:
            os.close(self.fds[1])
        for c in (self.con, self.dev, self.fake, self.pty, self.rig):
            c.close()
        self.listen.close()
        os.close(self.log_fd)
        if hasattr(self, "_pair"):
            for s in self._pair:
                s.close()
        else:
            self.card_pty.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path) as x:
        yield x


def read_exactly(fd: int, n: int, within_s: float = 40) -> bytes:
    """n bytes from a descriptor, in whatever pieces."""
    out, deadline = bytearray(), time.monotonic() + within_s
    while len(out) < n:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], f"{len(out)} of {n} bytes arrived"
        out += os.read(fd, min(65536, n - len(out)))
    return bytes(out)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        select.select([], [fd], [])
        try:
            view = view[os.write(fd, view[:65536]) :]
        except BlockingIOError:
            pass


def open_raw(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    return fd


def test_vop_60_slave_name_is_reported_and_raw(line: Line) -> None:
    """VOP-60: the reported name is a terminal, in raw mode, and stays usable when closed and opened."""
    assert line.pty.slave.startswith("/dev/pts/")
    for i in range(3):
        fd = open_raw(line.pty.slave)
        assert os.isatty(fd)
        text = b"line %d\x03\x04\x11\x13\r\n\x00\xff" % i
        os.write(line.card, text)
        assert read_exactly(fd, len(text)) == text
        os.write(fd, text)
        assert read_exactly(line.card, len(text)) == text
        os.close(fd)


def test_vop_60_bytes_pass_unchanged_10_mb_both_ways(line: Line) -> None:
    """VOP-60: 10 MB of random bytes each way at once through a slow reader of the pty, unchanged."""
    up, down = random.Random(1).randbytes(10 * MB), random.Random(2).randbytes(10 * MB)
    fd = open_raw(line.pty.slave)
    writers = [
        threading.Thread(target=write_all, args=(line.card, up), daemon=True),
        threading.Thread(target=write_all, args=(fd, down), daemon=True),
    ]
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_exactly(line.card, len(down), 40)), daemon=True)
    for t in (*writers, reader):
        t.start()
    assert read_exactly(fd, len(up), 40) == up
    reader.join(40)
    assert got == [down]
    eventually(lambda: len(line.logged()) == len(up), "the log")
    assert line.logged() == up
    os.close(fd)


def test_vop_60_compat_console(tmp_path: Path) -> None:
    """VOP-58, 60: with no feature at all (compat) bytes pass both ways."""
    data = random.Random(3).randbytes(200_000)
    with Line(tmp_path, features=console.COMPAT_FEATURES) as line:
        fd = open_raw(line.pty.slave)
        t = threading.Thread(target=write_all, args=(line.card, data), daemon=True)
        t.start()
        assert read_exactly(fd, len(data)) == data
        os.write(fd, b"typed")
        assert read_exactly(line.card, 5) == b"typed"
        os.close(fd)


def test_output_without_a_reader_never_blocks_the_card(line: Line) -> None:
    """Nobody has the pty open: the card writes 5 MB without waiting, and all of it is in the log."""
    data = random.Random(4).randbytes(5 * MB)
    write_all(line.card, data)
    eventually(lambda: len(line.logged()) == len(data), "the log")
    assert line.logged() == data


def test_a_reader_that_stops_reading_delays_the_card_only_for_a_while(line: Line) -> None:
    """Somebody has the pty open and does not read: after 1 s the card goes on, the loss is counted."""
    fd = open_raw(line.pty.slave)
    data = bytes(300_000)
    write_all(line.card, data)
    eventually(lambda: len(line.logged()) == len(data), "the log")
    assert line.con.stats()["pty_lost"] > 0
    os.close(fd)


def test_input_typed_before_anybody_listens_waits(tmp_path: Path) -> None:
    """Input waits, bounded, until the card posts buffers; then it arrives."""
    with Line(tmp_path, driver=False) as line:
        fd = open_raw(line.pty.slave)
        os.write(fd, b"early")
        buf = line.rig.alloc(4096)
        line.fake.add([], [(buf, 2), (buf + 100, 64)], token=5, i=0)
        line.fake.kick(0)
        assert eventually(lambda: line.fake.get(0), "the input") == (5, 5)
        assert line.rig.bus.gddr.read(buf, 2) + line.rig.bus.gddr.read(buf + 100, 3) == b"early"
        os.close(fd)


def test_vop_64_input_that_waits_does_not_stop_output(tmp_path: Path) -> None:
    """VOP-64: the card posts no buffer for input, 20 KB of which wait; its output still arrives."""
    with Line(tmp_path, driver=False) as line:
        client = line.client()
        client.settimeout(0.05)
        try:
            client.sendall(console.input_message(bytes(MB)))
        except TimeoutError:
            pass  # the backend takes no more, as it should
        buf = line.rig.alloc(4096)
        line.rig.bus.gddr.write(buf, b"output")
        for i in range(20):
            line.fake.add([(buf, 6)], [], token=i, i=1)
            line.fake.kick(1)
            assert eventually(lambda: line.fake.get(1), "the completion") == (i, 0)
        client.settimeout(20)
        assert read_exactly(client.fileno(), 120) == b"output" * 20
        client.close()


def test_clients_see_output_and_type(line: Line) -> None:
    """Two clients and the log get the card's bytes; input from either reaches the card."""
    a, b = line.client(), line.client()
    os.write(line.card, b"hello\r\n")
    assert read_exactly(a.fileno(), 7) == b"hello\r\n"
    assert read_exactly(b.fileno(), 7) == b"hello\r\n"
    a.sendall(console.input_message(b"from a"))
    assert read_exactly(line.card, 6) == b"from a"
    for byte in console.input_message(b"from b"):  # byte by byte: framing survives any cut
        b.sendall(bytes([byte]))
    assert read_exactly(line.card, 6) == b"from b"
    a.close()
    eventually(lambda: line.con.stats()["clients"] == 1, "the first client gone")
    os.write(line.card, b"!")
    assert b.recv(1) == b"!"
    b.close()


def test_client_input_of_1_mb_arrives_under_back_pressure(line: Line) -> None:
    """A megabyte of client input waits for a card that reads slowly; nothing is lost."""
    data = random.Random(6).randbytes(MB)
    c = line.client()
    t = threading.Thread(target=lambda: c.sendall(console.input_message(data)), daemon=True)
    t.start()
    assert read_exactly(line.card, len(data)) == data
    t.join(20)
    c.close()


def test_new_client_gets_the_last_4_kib(line: Line) -> None:
    """A client that comes later is shown the last 4 KiB, and then what follows."""
    data = random.Random(7).randbytes(10_000)
    write_all(line.card, data)
    eventually(lambda: len(line.logged()) == len(data), "the log")
    c = line.client()
    os.write(line.card, b"more")
    assert read_exactly(c.fileno(), 4100) == data[-4096:] + b"more"
    c.close()


def test_slow_client_skips_and_the_others_do_not_wait(line: Line) -> None:
    """A client that stops reading is waited for once, for a second; then it loses output and is told so,
    while a client that reads gets every byte."""
    slow, fast = line.client(), line.client()
    data = random.Random(8).randbytes(4 * MB)
    t = threading.Thread(target=write_all, args=(line.card, data), daemon=True)
    t.start()
    assert read_exactly(fast.fileno(), len(data)) == data
    t.join(20)
    eventually(lambda: len(line.logged()) == len(data), "the log")
    assert MB < line.con.stats()["client_lost"] < len(data)
    seen = bytearray()
    while select.select([slow], [], [], 0.3)[0]:
        seen += slow.recv(1 << 16)
    assert data.startswith(bytes(seen[:100_000]))
    os.write(line.card, b"end")
    tail = bytearray()
    while not tail.endswith(b"end"):
        tail += slow.recv(1 << 16)
    assert b"output skipped" in tail
    slow.close()
    fast.close()


def test_trickling_client_does_not_hold_the_card(line: Line) -> None:
    """A client that takes a few bytes now and then is not waited for beyond its second, either."""
    c = line.client()
    data = bytes(2 * MB)
    t = threading.Thread(target=write_all, args=(line.card, data), daemon=True)
    t.start()
    deadline = time.monotonic() + 20
    while len(line.logged()) < len(data):
        assert time.monotonic() < deadline, f"{len(line.logged())} bytes passed"
        c.recv(512)
        select.select([], [], [], 0.05)
    t.join(20)
    assert line.con.stats()["client_lost"] > 0
    c.close()


def test_window_size_comes_back_to_the_caller(line: Line) -> None:
    """A size message makes the loop return MIC_RUN_RESIZE with columns and rows; it then goes on."""
    c = line.client()
    c.sendall(console.size_message(132, 43))
    eventually(lambda: line.sizes == [(132, 43)], "the size")
    c.sendall(console.input_message(b"x") + console.size_message(80, 25) + console.input_message(b"y"))
    eventually(lambda: line.sizes == [(132, 43), (80, 25)], "the second size")
    assert read_exactly(line.card, 2) == b"xy"
    c.close()


@pytest.mark.parametrize(
    "bad", [b"\x00\x00\x00", b"\x63\x05\x00hello", b"\x02\x03\x00abc", b"\x02\xff\xffabcd"]
)
def test_malformed_client_messages_end_that_client(line: Line, bad: bytes) -> None:
    """An unknown type or a size message of another length ends the connection, and no other."""
    other, c = line.client(), line.client()
    c.sendall(bad)
    try:
        assert c.recv(1) == b""
    except ConnectionResetError:
        pass  # closed with our bytes unread
    other.sendall(console.input_message(b"ok"))
    assert read_exactly(line.card, 2) == b"ok"
    c.close()
    other.close()


def test_too_many_clients_are_refused(line: Line) -> None:
    """Eight clients are served, a ninth is closed at once and counted."""
    clients = [line.client() for _ in range(8)]
    ninth = socket.socket(socket.AF_UNIX)
    ninth.settimeout(20)
    ninth.connect(line.sock_path)
    assert ninth.recv(1) == b""
    assert line.con.stats()["clients_refused"] == 1
    for c in (*clients, ninth):
        c.close()


def test_full_disk_under_the_log_is_counted_not_fatal(tmp_path: Path) -> None:
    """A log that cannot be written is counted with its errno; the console works on."""
    with Line(tmp_path) as line:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, line.log_fd)
        os.close(full)
        fd = open_raw(line.pty.slave)
        os.write(line.card, b"still here")
        assert read_exactly(fd, 10) == b"still here"
        s = line.con.stats()
        assert s["log_errors"] >= 1
        assert s["last_log_errno"] == 28
        os.close(fd)


def test_broken_ring_from_the_card_keeps_input_working(tmp_path: Path) -> None:
    """VOP-44: a chain that loops stops only its own ring; typed bytes still reach the card."""
    with Line(tmp_path, driver=False) as line:
        line.fake.desc(0, 0, 64, flags=1, nxt=0, i=1)
        line.fake.offer(0, i=1)
        line.rig.bus.ring_host(0)
        eventually(lambda: line.rig.status & NEEDS_RESET, "NEEDS_RESET")
        buf = line.rig.alloc(4096)
        line.fake.add([], [(buf, 4096)], token=1, i=0)
        line.fake.kick(0)
        fd = open_raw(line.pty.slave)
        os.write(fd, b"abc")
        assert eventually(lambda: line.fake.get(0), "the input") == (1, 3)
        os.close(fd)


def test_large_chain_is_handed_out_in_pieces(tmp_path: Path) -> None:
    """VOP-22: a chain of many segments and 200 KB is handed out whole and completed once."""
    with Line(tmp_path, driver=False) as line:
        data = random.Random(9).randbytes(200_000)
        buf = line.rig.alloc(len(data))
        line.rig.bus.gddr.write(buf, data)
        cuts = [0, 1, 7, 4096, 50_000, 120_001, len(data)]
        line.fake.add([(buf + a, b - a) for a, b in itertools.pairwise(cuts)], [], token=3, i=1)
        line.fake.kick(1)
        assert eventually(lambda: line.fake.get(1), "the completion") == (3, 0)
        assert line.logged() == data
        assert line.fake.get(1) is None


def test_card_pty_without_a_program_is_not_the_end(tmp_path: Path) -> None:
    """On the card nobody has the slave open: the driver waits, then serves each program that opens it."""
    with Line(tmp_path, card_pty=True) as line:
        host = open_raw(line.pty.slave)
        for text in (b"first", b"second"):
            prog = os.open(line.card_pty.slave, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(prog)
            os.write(prog, text)
            assert read_exactly(host, len(text)) == text
            os.write(host, text[::-1])
            assert read_exactly(prog, len(text)) == text[::-1]
            os.close(prog)
        assert line.loops[1].results == []
        os.close(host)


def test_idle_console_sleeps_although_nobody_has_the_pty_open(line: Line) -> None:
    """A pty without a reader reports POLLHUP for ever; the loops sleep all the same."""
    fd = open_raw(line.pty.slave)
    os.write(line.card, b"x")
    read_exactly(fd, 1)
    os.close(fd)
    select.select([], [], [], 0.1)
    cpu = time.process_time()
    select.select([], [], [], 0.5)
    assert time.process_time() - cpu < 0.1


def test_local_end_closed_is_reported(line: Line) -> None:
    """When the card's end is closed for good the driver returns MIC_RUN_LOCAL."""
    line._pair[1].shutdown(socket.SHUT_RDWR)
    line.loops[1].join()
    assert line.loops[1].results == [lib.MIC_RUN_LOCAL]


def test_vop_58_compat_console_offers_nothing() -> None:
    """VOP-58: console feature word 0 and 12 bytes of configuration; modern offers SIZE."""
    assert console.offered_features("compat") == 0
    assert console.offered_features("modern") & 1 << layout.CONSTANTS["VIRTIO_CONSOLE_F_SIZE"]
    assert struct.unpack_from("<HH", console.pack_config(100, 40)) == (100, 40)
    assert len(console.pack_config()) == 12
