"""The end of everything on a card: shutdown, and kill -9 of the card OS or its init."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cardlab import eventually
from cardrun import booted, outer, possible, running, seconds

PIDFD_GETFD = 438  # system call


@pytest.mark.parametrize("plain", [False, True])
def test_shutdown_waits_for_who_ends_in_order(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shutdown sends SIGTERM; nobody is killed who ends within the limit, and the limit is not sat out."""
    possible(plain)
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # the console's shell: what its start-up files fork late is not asked
    with booted(plain=plain) as c:
        polite = c.client(["sh", "-c", "trap 'echo bye; exit 4' TERM; echo go; while :; do sleep 0.02; done"],
                          stdout=subprocess.PIPE)  # fmt: skip
        assert polite.stdout
        assert polite.stdout.readline() == b"go\n"
        begin = time.monotonic()
        c.say("shutdown 60")
        programs, killed = c.answer()
        assert time.monotonic() - begin < 60
        assert (programs >= 2, killed) == (True, 0)  # with the console's shell
        assert polite.communicate(timeout=20)[0] == b"bye\n"
        assert polite.returncode == 4


@pytest.mark.parametrize("plain", [False, True])
def test_shutdown_ends_everything(plain: bool) -> None:
    """Shutdown kills who ignores SIGTERM, daemons included, and says how many."""
    possible(plain)
    with booted(plain=plain) as c:
        daemon, other = seconds(5), seconds(6)
        stubborn = c.client(["sh", "-c", f"trap '' TERM HUP; setsid sleep {daemon} & sleep {other}"])
        for each in (daemon, other):
            eventually(lambda each=each: running("sleep", each), 20, "the stubborn programs")
        c.say("shutdown 0.3")
        programs, killed = c.answer()
        assert programs >= 3
        assert killed >= 3
        stubborn.communicate(timeout=20)
        # The shell may see its child's death before its own.
        assert stubborn.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert not running("sleep", daemon)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("victim", ["os", "init"])
def test_kill_9_of_card_os_or_init(plain: bool, victim: str) -> None:
    """When card OS or init are killed, every program goes with them and the caller is told."""
    possible(plain)
    with booted(plain=plain) as c:
        # exec: a shell that waits may see its child's death before its own, and says so.
        p = c.client(
            ["sh", "-c", f"echo go; exec sleep {seconds(7)}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert p.stdout
        assert p.stdout.readline() == b"go\n"
        inner = c.hello["init"]
        pid = c.board.os_pid if victim == "os" else outer(c.board.os_pid, inner)
        os.kill(pid, signal.SIGKILL)
        _, err = p.communicate(timeout=10)
        assert p.returncode == 1
        assert err == b"mic0 went down while sh was running\n"
        eventually(lambda: not running("sleep", seconds(7)), 20, "the program gone")


@pytest.mark.root
def test_program_that_sees_the_loss_before_init_does() -> None:
    """The card OS is dead, but its connection to init not closed yet, when a program ends: the caller hears of the card."""
    with booted(plain=True) as c:
        p = c.client(["sh", "-c", "echo go; read x; exit 3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)  # fmt: skip
        assert p.stdin
        assert p.stdout
        assert p.stdout.readline() == b"go\n"
        held = _sockets_of(c.board.os_pid)
        parent = int(_fields(c.board.os_pid)[1])
        os.kill(parent, signal.SIGSTOP)  # it would end everything itself
        eventually(lambda: _letter(parent) == "T", 20, "it stopped")
        try:
            os.kill(c.board.os_pid, signal.SIGKILL)
            eventually(lambda: _letter(c.board.os_pid) == "Z", 20, "the card OS dead")
            p.stdin.close()
            assert p.wait(20) == 1
            assert p.stderr
            assert p.stderr.read() == b"mic0 went down while sh was running\n"
        finally:
            os.kill(parent, signal.SIGCONT)
            for fd in held:
                os.close(fd)


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _letter(pid: int) -> str:
    """State of a process, as ps shows it."""
    return _fields(pid)[0]


def _sockets_of(pid: int) -> list[int]:
    """Our duplicates of its sockets: they do not close with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        numbers = [int(p.name) for p in Path(f"/proc/{pid}/fd").iterdir() if "socket" in os.readlink(p)]
        found = [libc.syscall(PIDFD_GETFD, pidfd, n, 0) for n in numbers]
    finally:
        os.close(pidfd)
    assert found
    assert min(found) >= 0, os.strerror(ctypes.get_errno())
    return found
