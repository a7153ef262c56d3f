"""virtio-vsock on a booted card: real programs on both sides, and what kills them."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

# On the card: listens at a port, and answers each connection as its first line says.
SERVER = r"""
import hashlib, socket, sys, threading
def serve(c):
    with c:
        f = c.makefile("rb")
        word = f.readline().strip()
        if word == b"sum":
            c.sendall(hashlib.sha256(f.read()).hexdigest().encode())
        elif word == b"echo":
            while data := f.read1(65536):
                c.sendall(data)
        elif word == b"sleep":  # never reads again
            threading.Event().wait()
l = socket.socket(socket.AF_UNIX)
l.bind("/run/vsock/vsock.sock_" + sys.argv[1])
l.listen(4096)
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
"""


class Lab:
    """A card with a vsock device and the server on it at port 60."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.dir = Path(machine.boot("--disk", "none", "--net", "none")["cards"][0]["run_dir"])
        machine.micemu("vop", "add", "mic0", "vsock")
        self.server = self.start_server()

    def start_server(self) -> subprocess.Popen[bytes]:
        """Serves until it is killed."""
        (self.dir / "vsock" / "vsock.sock_60").unlink(missing_ok=True)
        server = self.machine.popen(
            "run", "mic0", "--", sys.executable, "-c", SERVER, "60", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )  # fmt: skip
        assert server.stdout
        assert server.stdout.readline() == b"up\n"
        return server

    def connect(self, word: bytes = b"", port: int = 60) -> socket.socket:
        """A program of the host, connected."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(self.dir / "vsock.sock"))
        sock.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            got = sock.recv(1)
            if not got:
                sock.close()
                raise ConnectionRefusedError
            line += got
        assert line.startswith(b"OK ")
        if word:
            sock.sendall(word + b"\n")
        return sock

    def echoes(self) -> bool:
        """Does a new connection work?"""
        try:
            with self.connect(b"echo") as sock:
                sock.sendall(b"ping")
                return sock.recv(4) == b"ping"
        except OSError:
            return False

    def descriptors(self) -> dict[str, Callable[[], int]]:
        """Open descriptors of both ends."""
        pids = {"backend": self.machine.device("vsock")["pid"], "card OS": self.machine.card()["pids"]["os"]}
        return {name: lambda pid=pid: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}  # type: ignore[misc]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        if self.server.stdout:
            self.server.stdout.close()


def back_to(counts: dict[str, Callable[[], int]], before: dict[str, int]) -> None:
    """Wait until no descriptor is open that was not."""
    eventually(lambda: all(counts[n]() <= before[n] for n in before), 20, f"descriptors as before: {before}")


@pytest.fixture
def lab(machine: Machine) -> Iterator[Lab]:
    lab = Lab(machine)
    yield lab
    lab.close()


def test_vsock_card_program_finds_it(lab: Lab) -> None:
    """$MICEMU_VSOCK and /run/vsock name the same folder; it shows in status, list and dump."""
    assert lab.machine.shell('test "$MICEMU_VSOCK" -ef /run/vsock/vsock.sock && echo same') == "same\n"
    assert lab.machine.device("vsock")["state"] == "running"
    assert any(slot["type"] == 19 for slot in lab.machine.json("dump", "page")["slots"])
    rows = [r for r in lab.machine.json("dump", "vring") if r["device"].startswith("virtio19@")]
    assert [r["ring"] for r in rows] == [0, 1, 2]


def test_vsock_bytes_arrive_both_ways(lab: Lab) -> None:
    """8 MiB to the card and 8 MiB back at once, byte exact; half close ends each direction by itself."""
    data = os.urandom(8 << 20)
    with lab.connect(b"sum") as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(64, socket.MSG_WAITALL).decode() == hashlib.sha256(data).hexdigest()
        assert sock.recv(1) == b""
    sock = lab.connect(b"echo")

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=send)
    writer.start()
    back = bytearray()
    while piece := sock.recv(1 << 20):
        back += piece
    assert back == data
    writer.join(20)
    sock.close()


@pytest.mark.peer("socat")
def test_vsock_socat_on_both_sides(lab: Lab) -> None:
    """A card program connects to the host's listener; socat on each side, no code of ours in between."""
    listener = subprocess.Popen(
        ["socat", "-u", f"UNIX-LISTEN:{lab.dir}/vsock.sock_77", "STDOUT"], stdout=subprocess.PIPE
    )
    eventually(lambda: (lab.dir / "vsock.sock_77").exists(), 30, "socat's socket")
    script = r"(printf 'CONNECT 77\n'; echo from the card) | socat -t 5 - UNIX-CONNECT:$MICEMU_VSOCK"
    assert lab.machine.shell(script).startswith("OK ")
    assert listener.communicate(timeout=20)[0] == b"from the card\n"


def test_vsock_nobody_listens(lab: Lab) -> None:
    """Refused in both directions, at once."""
    with pytest.raises(ConnectionRefusedError):
        lab.connect(port=61)
    ask = "import socket,os; s=socket.socket(1); s.connect(os.environ['MICEMU_VSOCK']); s.sendall(b'CONNECT 61\\n'); "
    done = lab.machine.on_card(sys.executable, "-c", ask + "print(s.recv(9))")
    assert done.stdout == "b''\n"


def test_vsock_killed_programs(lab: Lab) -> None:
    """kill -9 of the program at either end: the other reads the end of file; nothing stays open."""
    counts = lab.descriptors()
    before = {name: count() for name, count in counts.items()}
    sock = lab.connect(b"sleep")
    client = subprocess.Popen(["sleep", "60"], stdin=sock.fileno())  # the only one that holds it
    sock.close()
    client.kill()
    client.wait()
    eventually(lambda: counts["card OS"]() <= before["card OS"], 30, "the end of the connection on the card")
    sock = lab.connect(b"echo")
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    lab.close()
    try:
        assert sock.recv(1) == b""
    except ConnectionResetError:
        pass  # it was killed with bytes unread
    sock.close()
    back_to(counts, before)
    lab.server = lab.start_server()
    assert lab.echoes()


def test_vsock_reader_that_never_reads(lab: Lab) -> None:
    """A writer stops at the buffers' end; memory does not grow; another connection is as fast as ever."""
    stuck = lab.connect(b"sleep")
    stuck.setblocking(False)
    accepted = 0
    while True:
        try:
            accepted += stuck.send(bytes(1 << 20))
            assert accepted < 64 << 20, "nothing holds the writer back"
        except BlockingIOError:
            if not select.select([], [stuck], [], 1)[1]:
                break
    assert lab.echoes()
    stuck.close()


def test_vsock_thousands_of_connections(lab: Lab) -> None:
    """1000 at a time, 2000 after one another; all descriptors come back."""
    counts = lab.descriptors()
    assert lab.echoes()
    before = {name: count() for name, count in counts.items()}
    many = [lab.connect(b"echo") for _ in range(1000)]
    for i, sock in enumerate(many):
        sock.sendall(b"%04d" % i)
    for i, sock in enumerate(many):
        assert sock.recv(4, socket.MSG_WAITALL) == b"%04d" % i
        sock.close()
    for _ in range(2000):
        lab.connect().close()
    back_to(counts, before)
    assert lab.echoes()


def test_vop_20_vsock_backend_killed(lab: Lab) -> None:
    """Connections end, the device comes back, new connections work."""
    socks = [lab.connect(b"echo") for _ in range(10)]
    pid = lab.machine.device("vsock")["pid"]
    os.kill(pid, 9)
    for sock in socks:
        assert sock.recv(1) == b""
        sock.close()
    eventually(lab.echoes, 20, "a connection through the new backend")


def test_vsock_removed_under_load(lab: Lab) -> None:
    """vop remove while streams run: they end, nothing hangs; added again it works, without leaks on the card."""
    os_pid = lab.machine.card()["pids"]["os"]
    counts = []
    for _ in range(5):
        streams = [lab.connect(b"echo") for _ in range(4)]
        for sock in streams:
            sock.sendall(bytes(100000))
        lab.machine.micemu("vop", "remove", "mic0", "vsock")
        for sock in streams:
            try:
                while sock.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass
            sock.close()
        assert not (lab.dir / "vsock.sock").exists()
        assert not (lab.dir / "vsock" / "vsock.sock").exists()
        lab.machine.micemu("vop", "add", "mic0", "vsock")
        assert lab.echoes()
        counts.append(len(os.listdir(f"/proc/{os_pid}/fd")))
    assert counts[-1] <= counts[0] + 2


def test_vsock_card_reset_and_config_entry(lab: Lab) -> None:
    """A reset ends every connection; `--device vsock` gives the next boot its device from the start."""
    sock = lab.connect(b"echo")
    lab.machine.micemu("reset", "mic0")
    assert sock.recv(1) == b""
    sock.close()
    lab.close()
    lab.machine.micemu("boot", "mic0", "--disk", "none", "--net", "none", "--device", "vsock")
    lab.server = lab.start_server()
    assert lab.echoes()
