"""The card's own power commands, without a card."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mic_emu.card.os.power import COMMANDS, own_command


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["", "/sbin/", "/usr/sbin/"])
def test_cosm_32_power_command_by_name_or_path_is_the_cards_own(name: str, where: str) -> None:
    """Whatever way it is named, the host's program is not what runs."""
    assert own_command([where + name, "-f"], "/x/bin") == ["/bin/sh", f"/x/bin/{name}", "-f"]


def test_cosm_32_other_programs_and_private_copies_are_left_alone() -> None:
    """Only the names, and only where a system has them."""
    for argv in (["ls"], ["./reboot"], ["/home/me/halt", "x"], ["rebooter"]):
        assert own_command(argv, "/x/bin") == argv


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("halt", 37),
        ("poweroff", 38),
        ("reboot", 39),
        ("shutdown -h now", 38),
        ("shutdown -r now", 39),
        ("halt -p", 38),
        ("reboot -f", 39),
    ],
)
def test_cosm_32_script_sends_the_signal(tmp_path: Path, command: str, number: int) -> None:
    """A stand-in for the card OS gets SIGRTMIN+3, +4 or +5; wrong words are refused with 2."""
    program = (
        "import os, signal, sys; from pathlib import Path; from mic_emu.card.os import power\n"
        "power.install(Path(sys.argv[1])); signal.pthread_sigmask(signal.SIG_BLOCK, power.SIGNALS)\n"
        "print('ready', flush=True); print(signal.sigwait(power.SIGNALS).real, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as kernel:
        assert kernel.stdout
        assert kernel.stdout.readline() == "ready\n"
        name, *args = command.split()
        assert (
            subprocess.run([tmp_path / name, "--nonsense"], capture_output=True, check=False).returncode == 2
        )
        assert subprocess.run([tmp_path / name, *args], check=False).returncode == 0
        assert int(kernel.stdout.readline()) - signal.SIGRTMIN + 34 == number
