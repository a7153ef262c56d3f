"""`poweroff` and its kin on the card: what the program that asked sees (COSM-32)."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from card.os import power
from mic_emu.testing.machine import eventually


def ignores(pid: int, sig: int) -> bool:
    """Whether the process ignores ``sig`` now."""
    text = Path(f"/proc/{pid}/status").read_text()
    mask = next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("SigIgn:"))
    return bool(mask >> (sig - 1) & 1)


@pytest.mark.parametrize(
    ("command", "word"),
    [("poweroff", "poweroff"), ("halt", "halt"), ("reboot", "restart"), ("shutdown -r now", "restart")],
)
def test_cosm_32_who_asks_succeeds_however_fast_the_card_goes_down(
    tmp_path: Path, command: str, word: str
) -> None:
    """The SIGTERM that its own request causes does not reach the script between asking and its end."""
    power.install(str(tmp_path))
    name, *args = command.split()
    script = subprocess.Popen([str(tmp_path / "bin" / name), *args])  # waits for a reader of the pipe
    try:
        eventually(lambda: ignores(script.pid, signal.SIGTERM), 30, "the script's own signal mask")
        script.send_signal(signal.SIGTERM)
        pipe = power.open_pipe(str(tmp_path / power.PIPE))
        assert script.wait(10) == 0
        assert list(power.requests(pipe)) == [word]
        os.close(pipe)
    finally:
        script.kill()
        script.wait()
