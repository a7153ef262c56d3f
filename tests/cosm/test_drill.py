"""Crash drills: kill or hang the card OS under load, read its log, bring it back (issue: crash drill)."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
SOAK = os.environ.get("MICEMU_SOAK") == "1"
LOAD = "while :; do head -c 1M /dev/urandom | md5sum >/dev/null; done"


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def drill(machine: Machine, rounds: int) -> None:
    """Kill under load, `crashed` within a second, log readable, boot; no descriptor is lost in the host process."""
    host = machine.boot()["host"]["pid"]
    before = 0
    for n in range(rounds):
        load = machine.popen("run", "mic0", "--", "sh", "-c", LOAD, stdout=-3, stderr=-3)
        try:
            eventually(lambda: machine.card()["pids"]["os"], 5, "the card OS")
            killed = time.monotonic()
            os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
            machine.micemu("wait", "crashed", "--timeout", "2")
            assert time.monotonic() - killed < 2.5  # two commands start in between; the limit is theirs
            assert load.wait(timeout=10) != 0
        finally:
            load.kill()
            load.wait()
        assert "card is up" in machine.micemu("sysfs", "cat", "kernel/debug/mic_cosm/mic0/log_buf").stdout
        assert machine.boot()["cards"][0]["state"] == "online"
        if n == 1:
            before = descriptors(host)
    if rounds > 2:
        eventually(
            lambda: descriptors(host) <= before + 1, 5, f"{before} descriptors in the host process again"
        )


def test_cosm_54_55_62_crash_drill_three_rounds(machine: Machine) -> None:
    """Three crashes in a row under load."""
    drill(machine, 3)


@pytest.mark.soak
def test_crash_drill_a_thousand_rounds(machine: Machine) -> None:
    """A thousand crashes in a row without a leak or a hang."""
    drill(machine, 1000)
