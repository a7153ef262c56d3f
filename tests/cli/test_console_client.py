"""``micemu console``: the relay between a terminal and the console backend's socket."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from mic_emu.cli.console_client import frames, key_name, parse_key
from mic_emu.cli.terminal import set_window_size
from mic_emu.errors import UsageError
from mic_emu.testing.machine import Machine, eventually

CLIENT = """
import socket, sys
from mic_emu.cli import console_client
sock = socket.socket(fileno=int(sys.argv[1]))
detached = console_client.attach(sock, "mic0", console_client.parse_key(sys.argv[2]))
sys.exit(0 if detached else 9)
"""


class Console:
    """A client on a terminal, and the backend's end of its socket."""

    def __init__(self, key: str = "^]", terminal: bool = True) -> None:
        self.backend, theirs = socket.socketpair()
        self.master, self.slave = pty.openpty()
        set_window_size(self.master, (24, 80))
        self.before = termios.tcgetattr(self.slave)
        stdin = self.slave if terminal else subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(theirs.fileno()), key],
            pass_fds=[theirs.fileno()],
            stdin=stdin,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=_controlling if terminal else None,
        )
        theirs.close()
        self.screen = ""

    def frame(self) -> tuple[int, bytes]:
        """Next message of the client."""
        self.backend.settimeout(20)
        head = self._exactly(3)
        kind, length = struct.unpack("<BH", head)
        return kind, self._exactly(length)

    def _exactly(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            piece = self.backend.recv(n - len(got))
            assert piece, "the client has gone"
            got += piece
        return got

    def typed(self, n: int) -> bytes:
        """The next ``n`` bytes of input."""
        got = b""
        while len(got) < n:
            kind, content = self.frame()
            assert kind == 1
            got += content
        return got

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def expect(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while text not in self.screen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} not in {self.screen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.screen += os.read(self.master, 65536).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.backend.close()
        os.close(self.master)
        os.close(self.slave)


def _controlling() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def console() -> Iterator[Console]:
    c = Console()
    c.expect("Attached to the console of mic0, detach with Ctrl-].")
    assert c.frame() == (2, struct.pack("<HH", 80, 24))
    yield c
    c.close()


def test_bytes_both_ways_raw(console: Console) -> None:
    """What is typed arrives as it is, Ctrl-C and Ctrl-Z included; what the card says is shown as it is."""
    console.type(b"ls\r\x03\x1a\xff\x00")
    assert console.typed(7) == b"ls\r\x03\x1a\xff\x00"
    console.backend.sendall(b"\x1b[2Jhello\n")
    console.expect("\x1b[2Jhello\n")


def test_detach_key_restores_the_terminal(console: Console) -> None:
    """The key ends the relay: what came before it is sent, the terminal is as before, status 0."""
    console.type(b"abc\x1ddef")
    assert console.typed(3) == b"abc"
    assert console.process.wait(20) == 0
    assert console.backend.recv(10) == b""
    assert termios.tcgetattr(console.slave) == console.before
    console.expect("Detached from mic0.")


def test_window_size_follows(console: Console) -> None:
    """Each change of the window is told to the card."""
    set_window_size(console.master, (50, 132))
    assert console.frame() == (2, struct.pack("<HH", 132, 50))


def test_backend_gone(console: Console) -> None:
    """When the console goes away the terminal is restored and the caller told."""
    console.backend.close()
    assert console.process.wait(20) == 9
    assert termios.tcgetattr(console.slave) == console.before


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_signals_restore_the_terminal(console: Console, sig: signal.Signals) -> None:
    """A killed client leaves no raw terminal behind."""
    console.process.send_signal(sig)
    assert console.process.wait(20) == 0
    assert termios.tcgetattr(console.slave) == console.before


def test_terminal_gone(console: Console) -> None:
    """A terminal that is closed ends the relay."""
    os.close(console.master)
    try:
        assert console.process.wait(20) == 0
    finally:
        console.master = os.open("/dev/null", os.O_RDONLY)


def test_large_paste_and_slow_backend(console: Console) -> None:
    """A paste of 300 KB arrives whole although the backend reads late."""
    blob = bytes(range(32, 127)) * 3200
    os.set_blocking(console.master, False)
    console.backend.settimeout(20)
    sent, got = 0, b""
    deadline = time.monotonic() + 20
    while len(got) < len(blob):
        assert time.monotonic() < deadline
        try:
            sent += os.write(console.master, blob[sent : sent + 4096])
        except BlockingIOError:
            pass
        if sent > 200_000 or sent == len(blob) or not select.select([], [console.master], [], 0)[1]:
            got += console.frame()[1]
    assert got == blob


def test_other_and_no_detach_key() -> None:
    """The key can be chosen or switched off."""
    c = Console("ctrl-a")
    c.expect("detach with Ctrl-A.")
    c.frame()
    c.type(b"\x1d\x01")
    assert c.typed(1) == b"\x1d"
    assert c.process.wait(20) == 0
    c.close()
    c = Console("none")
    c.expect("no detach key.")
    c.frame()
    c.type(b"\x1d\x01")
    assert c.typed(2) == b"\x1d\x01"
    c.close()


def test_piped_input() -> None:
    """With a pipe as input, everything is sent, the answer shown, and the relay ends by itself."""
    c = Console(terminal=False)
    assert c.process.stdin
    c.process.stdin.write(b"echo \x1d\n")
    c.process.stdin.close()
    assert c.typed(7) == b"echo \x1d\n"
    c.backend.sendall(b"answer")
    c.expect("answer")
    assert c.process.wait(20) == 0
    c.close()


@pytest.mark.parametrize(
    ("text", "key"), [("^]", b"\x1d"), ("ctrl-A", b"\1"), ("C-x", b"\x18"), ("^\\", b"\x1c"), ("none", b"")]
)
def test_keys(text: str, key: bytes) -> None:
    """Spellings of the detach key."""
    assert parse_key(text) == key
    assert not key or parse_key(key_name(key)) == key


@pytest.mark.parametrize("text", ["", "a", "^", "^1", "ctrl-", "ctrl-ab", "^é"])
def test_bad_keys(text: str) -> None:
    """Anything else is a usage error."""
    with pytest.raises(UsageError, match="detach key"):
        parse_key(text)


def test_long_content_is_split() -> None:
    """A message holds 65535 bytes at most."""
    assert frames(1, b"") == b""
    blob = frames(1, bytes(70000))
    assert blob[:3] == struct.pack("<BH", 1, 65535)
    assert len(blob) == 70000 + 6


# --- a card that goes down -----------------------------------------------------------------------------


def attached(machine: Machine, slave: int) -> subprocess.Popen[bytes]:
    """``micemu console`` on a terminal."""
    return machine.popen(
        "console",
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_controlling,
    )


@pytest.mark.system
def test_console_of_a_crashed_card_says_so(machine: Machine) -> None:
    """Before and after: exit status 4 at once, what has happened, what to do, and the terminal as it was."""
    pid = machine.boot("--disk", "none", "--net", "none")["cards"][0]["pids"]["os"]
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with attached(machine, slave) as client:
        eventually(lambda: termios.tcgetattr(slave) != before, 20, "raw mode")
        os.kill(pid, signal.SIGKILL)
        _, err = client.communicate(timeout=20)
    assert client.returncode == 4
    assert b"mic0 has crashed, its console is dead" in err
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)
    late = machine.micemu("console", check=False, timeout=20)
    assert late.returncode == 4
    for words in ("mic0 has crashed", "micemu dump log mic0", "mic0/console.log", "micemu boot mic0"):
        assert words in late.stderr


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_console_of_a_card_that_hangs_ends_by_a_signal(machine: Machine, number: int) -> None:
    """The card takes no input and shows nothing: the signal ends the command, and the terminal is as it was."""
    pid = machine.boot("--disk", "none", "--net", "none")["cards"][0]["pids"]["os"]
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    os.kill(pid, signal.SIGSTOP)
    try:
        with attached(machine, slave) as client:
            eventually(lambda: termios.tcgetattr(slave) != before, 20, "raw mode")
            os.write(master, b"x" * 1000)
            client.send_signal(number)
            client.communicate(timeout=20)
        assert client.returncode == 0
        assert termios.tcgetattr(slave) == before
    finally:
        os.kill(pid, signal.SIGCONT)
        os.close(slave)
        os.close(master)


def test_console_ends_by_a_signal_although_nobody_reads_its_output() -> None:
    """A card that prints without end into a terminal that is not read: no write keeps SIGTERM waiting."""
    console = Console()
    try:
        console.expect("Attached")
        console.backend.setblocking(False)
        stuck = 0
        while stuck < 50:  # looks at intervals: nothing tells that somebody does not read
            try:
                console.backend.send(b"y" * 65536)
                stuck = 0
            except BlockingIOError:
                stuck += 1
                time.sleep(0.01)
        console.process.send_signal(signal.SIGTERM)
        eventually(lambda: console.process.poll() is not None, 20, "the end")
    finally:
        console.close()
