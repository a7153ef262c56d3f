"""Processes below us: found whatever they are called, ended whatever they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mic_emu import proc
from mic_emu.card.os import program
from mic_emu.cli import clean
from mic_emu.rundir import ProcessId, RunDir


def test_a_name_may_be_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any process of the machine may call itself what it likes: whoever looks for his own does not fall over it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    where = RunDir("none")
    where.create()
    script = r"printf 'a) \377\376' > /proc/$$/comm; echo; read x"
    pipe = subprocess.PIPE
    with (
        open(where.path / "held", "wb") as held,
        subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe, stderr=held) as child,
    ):
        assert child.stdout
        assert child.stdout.readline() == b"\n"
        try:
            assert child.pid in proc.children()
            assert child.pid in program.descendants(os.getpid())
            assert not program.ends(child.pid)
            assert (found := ProcessId.of(child.pid))
            assert found.alive()
            assert clean.leftovers(where) == []
        finally:
            child.kill()


# In a process of its own: it becomes the parent of everything below it.
KILLS = """
import os, subprocess, sys, time
from mic_emu import proc
spared, real = {}, os.kill
def kill(pid, number):
    if pid == spared["pid"]:
        raise PermissionError(1, "not ours")
    real(pid, number)
spared["pid"] = subprocess.Popen(["sleep", "60"]).pid
other = subprocess.Popen(["sleep", "60"]).pid
os.kill = kill
began = time.monotonic()
ended = proc.kill_descendants(0.5)
assert time.monotonic() - began < 20, "it waited for who cannot be killed"
assert ended == [(other, 9)], ended
os.kill = real
assert proc.kill_descendants() == [(spared["pid"], 9)]
"""


def test_who_cannot_be_killed_is_not_waited_for() -> None:
    """A descendant that is stuck in the kernel, or is another user's, does not keep init from cleaning up."""
    subprocess.run([sys.executable, "-c", KILLS], check=True, timeout=50)


def test_a_program_of_another_user_is_left_to_him(monkeypatch: pytest.MonkeyPatch) -> None:
    """``sudo`` on a card without a user namespace: its init may not signal that, and goes on with the others."""
    reached: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        if pid == 1:
            raise PermissionError(1, "Operation not permitted")
        reached.append((pid, number))

    monkeypatch.setattr(os, "kill", kill)
    program.kill_all([1, 2], signal.SIGHUP, signal.SIGCONT)
    assert reached == [(2, signal.SIGHUP), (2, signal.SIGCONT)]
