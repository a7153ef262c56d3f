"""micemu run and micemu console on a booted card."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from struct import pack

import pytest

import mic_emu
from mic_emu.testing.machine import MICEMU, Machine

pytestmark = pytest.mark.system


def test_exit_statuses_come_through(machine: Machine) -> None:
    """0, 1, 2, 126, 127, 128, 255."""
    machine.boot("--disk", "none", "--net", "none")
    for status in (0, 1, 2, 126, 127, 128, 255):
        assert machine.on_card("sh", "-c", f"exit {status}", check=False).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1])
def test_death_by_signal_comes_through(machine: Machine, number: signal.Signals) -> None:
    """A program killed by a signal ends micemu run by the same signal."""
    machine.boot("--disk", "none", "--net", "none")
    assert machine.on_card("sh", "-c", f"kill -{int(number)} $$", check=False).returncode == -number


def test_a_hundred_megabytes_pass_unchanged(machine: Machine) -> None:
    """100 MB through stdin to stdout."""
    machine.boot("--disk", "none", "--net", "none")
    data = machine.home / "data"
    data.write_bytes(os.urandom(100 << 20))
    with (
        data.open("rb") as f,
        machine.popen("run", "mic0", "--", "cat", stdin=f, stdout=subprocess.PIPE) as p,
    ):
        digest = hashlib.sha256()
        assert p.stdout
        while chunk := p.stdout.read(1 << 20):
            digest.update(chunk)
    assert p.returncode == 0
    assert digest.hexdigest() == hashlib.sha256(data.read_bytes()).hexdigest()


@pytest.mark.contained
def test_programs_see_the_card_and_write_only_where_they_may(machine: Machine, tmp_path: Path) -> None:
    """Own host name; the caller's directory is writable; the rest of the host is not."""
    machine.boot("--disk", "none", "--net", "none")
    out = machine.shell(
        "hostname; pwd; echo card > here; touch /usr/there 2>&1 || echo refused", cwd=tmp_path
    )
    assert out.splitlines()[:2] == ["mic0", str(tmp_path)]
    assert out.splitlines()[-1] == "refused"
    assert (tmp_path / "here").read_text() == "card\n"


@pytest.mark.contained
def test_ramdisk_lies_over_the_root(machine: Machine) -> None:
    """Files of the cpio archive are there, over the host's, which shine through elsewhere."""
    archive = machine.home / "extra.cpio"
    archive.write_bytes(newc({"opt/card-only": b"from the ramdisk\n", "etc/hostname": b"a card\n"}))
    machine.boot("--disk", "none", "--net", "none", "--ramdisk", str(archive))
    assert (
        machine.shell("cat /opt/card-only /etc/hostname; test -x /bin/sh && echo host")
        == "from the ramdisk\na card\nhost\n"
    )


def newc(files: dict[str, bytes]) -> bytes:
    """A cpio archive."""
    out = bytearray()
    for i, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        fields = (i, 0o100644, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def test_run_on_a_card_that_is_down_says_so(machine: Machine) -> None:
    """Exit status 4 and the fix."""
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("shutdown")
    failed = machine.on_card("true", check=False)
    assert failed.returncode == 4
    assert failed.stderr == "micemu: mic0 is ready: boot it first (micemu boot mic0)\n"


def test_the_installation_is_on_the_card_wherever_it_lies(machine: Machine) -> None:
    """A package installed below /tmp, which on the card is another /tmp, can be imported there all the same."""
    machine.boot("--disk", "none", "--net", "none")
    script = "import mic_emu.scif, os; print(os.environ['MICEMU_CARD'], mic_emu.__file__)"
    out = machine.on_card(sys.executable, "-c", script).stdout.split()
    assert out == ["mic0", mic_emu.__file__]


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_descriptor_is_dev_null_on_the_card(machine: Machine, closed: int) -> None:
    """Closed stdin, stdout or stderr never become a socket of ours: the program finds /dev/null there."""
    machine.boot("--disk", "none", "--net", "none")
    shown = 1 if closed == 2 else 2
    script = f'link=$(readlink /proc/$$/fd/{closed}); echo "$link" >&{shown}'
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *MICEMU, "run", "mic0", "--", "sh", "-c", script],
        env=machine.env, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/dev/null" in done.stdout + done.stderr


class Terminal:
    """A program under a pty."""

    def __init__(self, argv: list[str], env: dict[str, str], rows: int, cols: int) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, {**env, "TERM": "xterm"})
        self.resize(rows, cols)
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        ioctl(self.fd, termios.TIOCSWINSZ, pack("4H", rows, cols, 0, 0))

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str, within_s: float = 30) -> None:
        """Wait for text; what came before it is forgotten."""
        deadline = time.monotonic() + within_s
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear; last: {self.seen[-300:]!r}"
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:
                raise AssertionError(
                    f"{text!r} did not appear before the end; last: {self.seen[-300:]!r}"
                ) from None
        self.seen = self.seen.partition(text.encode())[2]

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(machine: Machine, *args: str) -> Iterator[Terminal]:
    t = Terminal([*MICEMU, *args], machine.env, 30, 100)
    try:
        yield t
    finally:
        os.close(t.fd)


def test_vop_60_console_is_an_interactive_shell(machine: Machine) -> None:
    """Commands, Ctrl-C, stty size after a resize, the detach key; the log file holds what was shown."""
    machine.boot("--disk", "none", "--net", "none")
    with terminal(machine, "console", "mic0") as t:
        t.send("PS1='card: '\necho ma''rk\n")
        t.expect("mark")
        t.send("stty size\n")
        t.expect("30 100")
        # What it prints shows that it runs: a Ctrl-C that comes before would be the shell's own.
        t.send("sh -c 'echo be\"\"gun; exec sleep 1000'\n")
        t.expect("begun")
        t.send("\x03echo in''terrupted $?\n")
        t.expect("interrupted 130")
        t.resize(40, 120)
        t.send("sh -c 'while [ \"$(stty size)\" != \"40 120\" ]; do :; done; echo re''sized'\n")
        t.expect("resized")
        t.send("\x1d")
        assert t.end() == 0
    log = (machine.run_dir / "mic0" / "console.log").read_text(errors="replace")
    assert "mark" in log
    assert "interrupted 130" in log


def test_vop_60_reported_pty_is_the_cards_console(machine: Machine) -> None:
    """`micemu status` names the slave: what is typed there reaches the card's shell, whose output comes back."""
    machine.boot("--disk", "none", "--net", "none")
    path = machine.device("console")["pty"]
    assert path in machine.micemu("status").stdout
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, b"echo $((6*7))answers\n")
        seen = b""
        while b"42answers" not in seen:
            assert select.select([fd], [], [], 30)[0], seen
            seen += os.read(fd, 4096)
    finally:
        os.close(fd)


def test_run_with_a_terminal_has_job_control(machine: Machine) -> None:
    """micemu run on a terminal: the program has one of its own, of the same size."""
    machine.boot("--disk", "none", "--net", "none")
    with terminal(machine, "run", "mic0", "--", "sh", "-c", "tty; stty size; exit 5") as t:
        t.expect("/dev/pts/")
        t.expect("30 100")
        assert t.end() == 5
