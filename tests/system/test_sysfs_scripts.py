"""Shell scripts that know nothing but the sysfs tree: boot, watch, crash, reset, reboot (COSM 6)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from cardlab import USER, as_user
from test_ordinary_user import Person, person  # noqa: F401  the fixture

from mic_emu.testing.machine import MICEMU, Machine

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
HERE = Path(__file__).parent / "sh"
QUICK = ("--disk", "none", "--net", "none")
KILL = "kill -9 $(%s status --json | sed 's/.*\"os\": \\([0-9]*\\).*/\\1/')\n"


def tools(where: Path, python: str, micemu: str, how: str) -> tuple[str, str, str]:
    """Copies of the script and its two commands in a folder that everybody can read: script, watch, crash."""
    for name in ("cards_day.sh", "watch.py"):
        shutil.copy2(HERE / name, where)
    (where / "crash.sh").write_text(KILL % micemu)
    return str(where / "cards_day.sh"), f"{python} {where}/watch.py {how}", f"sh {where}/crash.sh"


@pytest.mark.parametrize("how", ["select", "poll"])
def test_cosm_9_17_18_35_50_56_script_with_a_mounted_tree(machine: Machine, how: str) -> None:
    """`micemu sysfs mount DIR`, then cat and echo in DIR."""
    machine.boot(*QUICK)
    machine.micemu("shutdown")
    target = machine.home / "sys"
    needs.fuse_mount(machine, target)
    script, watch, crash = tools(machine.home, sys.executable, " ".join(MICEMU), how)
    ran = subprocess.run(
        ["sh", script, str(target), watch, crash], env=machine.env, capture_output=True, text=True, timeout=200, check=False
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")


def test_cosm_9_17_18_35_50_56_script_with_the_tree_at_its_real_place(machine: Machine) -> None:
    """`micemu run host --sysfs`: the same script in /sys."""
    machine.boot(*QUICK)
    machine.micemu("shutdown")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    script, watch, crash = tools(machine.home, sys.executable, " ".join(MICEMU), "poll")
    ran = machine.micemu("run", "host", "--sysfs", "--", "sh", script, "/sys", watch, crash)
    assert (ran.stdout, ran.stderr) == ("done\n", "")
    where = "readlink -f /sys/class/mic/mic0/device; cat /sys/class/mic/mic0/device/vendor; LC_ALL=C ls /sys/devices"
    seen = machine.micemu("run", "host", "--sysfs", "--", "sh", "-c", where).stdout.split()
    assert seen == [
        "/sys/devices/micemu/0000:01:00.0",
        "0x8086",
        *sorted([*os.listdir("/sys/devices"), "micemu"]),
    ]
    wrong = machine.micemu("run", "mic0", "--sysfs", "--", "true", check=False)
    assert (wrong.returncode, "host side" in wrong.stderr) == (2, True)
    assert machine.micemu("run", "host", "--sysfs", "--", "no-such-program", check=False).returncode == 127


@pytest.mark.contained
def test_cosm_11_script_of_an_ordinary_user(person: Person) -> None:  # noqa: F811
    """The same without root, where /dev/fuse may be opened."""
    probe = [*as_user(), "sh", "-c", "exec 3<>/dev/fuse"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"user {USER} may not open /dev/fuse")
    person.micemu("boot", *QUICK)
    person.micemu("shutdown")
    micemu = " ".join(person.argv[len(as_user()) :][:1]) + f" {person.home}/micemu.py"
    (person.home / "micemu.py").write_text("from mic_emu.cli import main\nmain()\n")
    script, watch, crash = tools(person.home, person.argv[len(as_user())], micemu, "select")
    ran = person.micemu("run", "host", "--sysfs", "--", "sh", script, "/sys", watch, crash, check=False)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
