"""Processes below us: found whatever they are called, ended whatever they are."""

from __future__ import annotations

import os
import subprocess
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
