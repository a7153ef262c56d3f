"""Shell scripts that know nothing but the sysfs tree: boot, watch, crash, reset, reboot (COSM 6)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from cardlab import USER, as_user
from test_ordinary_user import Person, at_home, person  # noqa: F401  the fixture

from mic_emu.testing.machine import MICEMU, Machine, eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
HERE = Path(__file__).parent / "sh"
QUICK = ("--disk", "none", "--net", "none")
NOBODY = 65534  # fusermount3 serves only users that have a name
HELPER = """import os, socket, subprocess, sys
ours, theirs = socket.socketpair()
os.environ["_FUSE_COMMFD"] = str(theirs.fileno())
sys.exit(subprocess.run(["fusermount3", "-o", "fsname=probe", "--", sys.argv[1]], pass_fds=[theirs.fileno()]).returncode)
"""
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


def may_mount(person: Person, place: Path) -> None:  # noqa: F811
    """Skip where fusermount3 itself cannot mount for this user, with its own words."""
    user = person.argv[: person.argv.index("-c") - 1]
    probe = [*user, person.argv[len(user)], "-c", HELPER, str(place)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    subprocess.run([*user, "fusermount3", "-u", "-q", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount for an ordinary user here: {done.stderr.strip()}")


@pytest.mark.peer("fusermount3")
@pytest.mark.contained
def test_cosm_11_mount_of_an_ordinary_user_with_fusermount3() -> None:
    """`micemu sysfs mount` by who may not mount: the script's day in it, both ways to take it away, kill -9 of the host."""
    with at_home(NOBODY) as person:  # noqa: F811
        target = person.home / "sys"
        subprocess.run([*as_user(NOBODY), "mkdir", str(target)], check=True)
        may_mount(person, target)
        host = json.loads(person.micemu("boot", "--json", *QUICK).stdout)["host"]["pid"]
        person.micemu("shutdown")
        person.micemu("sysfs", "mount", str(target))
        user, python = as_user(NOBODY), person.argv[len(as_user()) :][0]
        (person.home / "micemu.py").write_text("from mic_emu.cli import main\nmain()\n")
        script, watch, crash = tools(person.home, python, f"{python} {person.home}/micemu.py", "poll")
        ran = subprocess.run(
            [*user, "sh", script, str(target), watch, crash], env=person.env, capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")
        person.micemu("sysfs", "umount", str(target))
        assert not os.path.ismount(target)
        refused = person.micemu("sysfs", "mount", "/tmp", check=False)
        assert (
            refused.returncode,
            "/tmp: fusermount3: " in refused.stderr,
            "need no mount" in refused.stderr,
        ) == (1, True, True)
        person.micemu("sysfs", "mount", str(target))
        assert subprocess.run([*user, "fusermount3", "-u", str(target)], check=False).returncode == 0
        person.micemu("sysfs", "mount", str(target))
        os.kill(host, signal.SIGKILL)
        eventually(
            lambda: str(target) not in Path("/proc/self/mountinfo").read_text(), 30, "the end of the mount"
        )
