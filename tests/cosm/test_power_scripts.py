"""`poweroff` and its kin on the card: what the program that asked sees (COSM-32)."""

from __future__ import annotations

import os
import signal
import struct
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
    [("poweroff", "poweroff"), ("halt", "halt"), ("reboot", "restart"), ("shutdown -r now", "restart"),
     ("shutdown -h now", "poweroff"), ("shutdown -H now", "halt")],
)  # fmt: skip
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


def test_cosm_32_shutdown_that_is_cancelled_asks_for_nothing(tmp_path: Path) -> None:
    """`shutdown -c` ends with 0, and the card stays up."""
    power.install(str(tmp_path))
    pipe = power.open_pipe(str(tmp_path / power.PIPE))
    assert subprocess.run([str(tmp_path / "bin" / "shutdown"), "-c"], timeout=30, check=False).returncode == 0
    assert list(power.requests(pipe)) == []
    os.close(pipe)


def initctl(command: int, level: str, magic: int = 0x03091969) -> bytes:
    """A request of telinit's: 384 bytes in the machine's order."""
    return struct.pack("=4i368x", magic, command, ord(level), 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (initctl(1, "0"), ["poweroff"]),
        (initctl(1, "6"), ["restart"]),
        (initctl(1, "6") + initctl(1, "0"), ["restart", "poweroff"]),
        (initctl(1, "1") + initctl(1, "S"), []),  # other run levels
        (initctl(2, "0"), []),  # no run level, but a power failure
        (initctl(1, "0", magic=1), []),
        (initctl(1, "0")[:100], []),
        (b"halt\nrestart\n", ["halt", "restart"]),
        (b"shutdown HALT \xff\0", []),
    ],
)
def test_cosm_32_what_the_pipe_understands(tmp_path: Path, data: bytes, words: list[str]) -> None:
    """Run levels 0 and 6 of /run/initctl, and the scripts' own words; whatever else somebody writes is ignored."""
    path = str(tmp_path / "pipe")
    power.make_pipe(path)
    pipe = power.open_pipe(path)
    os.write(pipe, data)
    assert list(power.requests(pipe)) == words
    assert list(power.requests(pipe)) == []
    os.close(pipe)


@pytest.mark.parametrize("name", ["a 'b' \"$(touch x)\" `y` \\", "\udcff"])
def test_a_run_directory_of_any_name(tmp_path: Path, name: str) -> None:
    """The scripts reach their pipe, and run nothing else."""
    folder = tmp_path / name
    power.install(str(folder))
    pipe = power.open_pipe(str(folder / power.PIPE))
    for command in ("poweroff", "shutdown"):
        subprocess.run([str(folder / "bin" / command)], cwd=tmp_path, check=True, timeout=30)
        assert list(power.requests(pipe)) == ["poweroff"]
    os.close(pipe)
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]
