"""Signals from outside: the end of a session, `pkill`, a service manager that tells every process (KillMode=control-group)."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from mic_emu.card.os.program import descendants
from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system


def everybody(init: int) -> list[int]:
    """Process ids of the instance: init's, and all below it, the card's own programs included."""
    return [init, *descendants(init)]


def tell(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def connected(pid: int) -> bool:
    """Has a command a socket?"""
    with suppress(OSError):
        return any(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGTERM, "init"), (signal.SIGTERM, "host"), (signal.SIGTERM, "all"), (signal.SIGINT, "all")],
)
def test_an_ending_signal_ends_the_instance_in_order(machine: Machine, number: int, told: str) -> None:
    """To init, to the host process, or to all processes at once: boards and backends stay until their card is down and
    reset, nothing is left, and who waits is told that the emulator has stopped, not of a crash."""
    host = machine.boot("--net", "none")["host"]
    waiting = machine.popen("wait", "crashed", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    events = machine.popen("events", "--recent", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert events.stdout
    events.stdout.readline()
    eventually(lambda: connected(waiting.pid), 30, "the connection of wait")
    with (machine.run_dir / "log.jsonl").open(encoding="utf-8") as log:
        tell({"init": [host["init"]], "host": [host["pid"]]}.get(told) or everybody(host["init"]), number)
        _, said = waiting.communicate(timeout=30)
        assert (waiting.returncode, said) == (3, "micemu: the emulator has stopped (instance default)\n")
        _, said = events.communicate(timeout=30)
        assert (events.returncode, said) == (0, "")
        eventually(lambda: not machine.run_dir.exists(), 30, "the end of the run directory")
        text = log.read()
    assert '"message": "resetting -> ready"' in text
    for trouble in ("the board process died", "panic", "is started again", "Traceback"):
        assert trouble not in text
    assert not list((machine.home / "state").rglob("*crash*"))
    machine.check_clean()


def test_sighup_to_everybody_changes_nothing(machine: Machine) -> None:
    """A terminal that closes tells what it started: none of these processes is the terminal's."""
    before = machine.boot("--net", "none")
    tell(everybody(before["host"]["init"]), signal.SIGHUP)
    assert machine.on_card("echo", "there").stdout == "there\n"
    after = machine.status()
    assert after["host"] == before["host"]
    assert after["cards"][0]["pids"] == before["cards"][0]["pids"]
    assert [d["restarts"] for d in after["cards"][0]["devices"]] == [0, 0]


def test_a_board_killed_while_the_instance_stops_keeps_nobody_waiting(machine: Machine) -> None:
    """What sits behind a dead board neither answers nor drains: the host waits for nothing of it."""
    status = machine.boot("--disk", "none", "--net", "none")
    pids = status["cards"][0]["pids"]
    os.kill(pids["os"], signal.SIGSTOP)
    with (machine.run_dir / "log.jsonl").open(encoding="utf-8") as log:
        os.kill(status["host"]["pid"], signal.SIGTERM)
        seen = ""

        def stopping() -> bool:
            nonlocal seen
            seen += log.read()
            return '"message": "online -> resetting"' in seen

        eventually(stopping, 30, "the card's reset")
        os.kill(pids["board"], signal.SIGKILL)
        eventually(lambda: not machine.run_dir.exists(), 30, "the end of the run directory")
        seen += log.read()
    assert "the board process died; the card is being removed" in seen
    assert all("within 0 s" in line for line in seen.splitlines() if "not drained" in line)
    machine.check_clean()
