"""The whole machine for somebody who is not root, and what becomes of programs when levels are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cardlab
import needs
import pytest
from cardlab import eventually
from cardrun import running, seconds

from mic_emu.testing.leftovers import Leftovers
from mic_emu.testing.machine import Machine

MAIN = "from mic_emu.cli import main; main()"


class Person:
    """Somebody without root, at home."""

    def __init__(self, home: Path, user: int = cardlab.USER) -> None:
        self.home = home
        exe, env = cardlab.userland()
        self.argv = [*cardlab.as_user(user), exe, "-c", MAIN]
        self.env = {**env, "HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), "TERM": "xterm"}

    def micemu(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.argv, *args], env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
        return done


@contextmanager
def at_home(user: int = cardlab.USER) -> Iterator[Person]:
    """A person, ``user`` where this is root. At the end nothing of them is left."""
    home = Path(tempfile.mkdtemp(prefix="mu-", dir="/tmp"))
    (home / "run").mkdir()
    if os.geteuid() == 0:
        for p in (home, home / "run"):
            os.chown(p, user, user)
    (home / "run").chmod(0o700)
    before = Leftovers.now()
    p = Person(home, user)
    try:
        yield p
    finally:
        p.micemu("stop", "--force", check=False)
        shutil.rmtree(home)
        cardlab.forget_userland()
    cardlab.nothing_stays(before)


@pytest.fixture
def person() -> Iterator[Person]:
    with at_home() as p:
        yield p


@pytest.mark.contained
def test_an_ordinary_user_boots_runs_and_leaves_nothing(person: Person) -> None:
    """Boot, a program with its own names and writable folder, shutdown, stop: all without root."""
    status = json.loads(person.micemu("boot", "--json").stdout)
    assert status["cards"][0]["state"] == "online"
    script = "hostname; id -u; echo $$; pwd; echo mine > file; touch /usr/x 2>&1; exit 9"
    done = person.micemu("run", "mic0", "--", "sh", "-c", script, check=False)
    assert done.returncode == 9, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[1], lines[3]) == ("mic0", "0", str(person.home))
    assert int(lines[2]) < 1000
    assert lines[4].endswith("Read-only file system")
    assert (person.home / "file").stat().st_uid == person.home.stat().st_uid
    locked = person.home / "locked"  # root's, where root runs the tests: the person cannot search it
    locked.mkdir(0o700)
    person.env["PATH"] = f"{locked}:/usr/bin:/bin"
    done = person.micemu("run", "mic0", "--", "no-such-program", check=False)
    assert (done.returncode, done.stderr) == (127, "micemu: mic0: no-such-program: not found on the card\n")
    assert person.micemu("run", "mic0", "--", "true").returncode == 0
    assert person.micemu("run", "host", "--", "id", "-u").returncode == 0
    person.micemu("shutdown")
    person.micemu("stop")
    eventually(lambda: not cardlab.marked(str(person.home / "run")), 20, "all processes gone")
    assert not (person.home / "run/micemu/default").exists()


@pytest.mark.parametrize("victim", ["shim", "os", "init"])
def test_programs_end_with_the_level_that_is_killed(machine: Machine, victim: str) -> None:
    """kill -9 of shim, card OS or the card's init: programs and their daemons go, the card is crashed."""
    machine.boot("--disk", "none", "--net", "none")
    script = f"setsid sleep {seconds(11)} & echo go; sleep {seconds(12)}"
    program = machine.popen("run", "mic0", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert program.stdout
    assert program.stdout.readline() == b"go\n"
    for n in (11, 12):
        eventually(lambda n=n: running("sleep", seconds(n)), 20, "the programs")
    os_pid = machine.card()["pids"]["os"]
    above = int(Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[1])
    if victim == "shim":
        needs.contained_cards()
        assert _name(above).startswith("micos-shim")
    pid = {"shim": above, "os": os_pid, "init": next(p for p in _children(os_pid) if _name(p) == "init")}[
        victim
    ]
    os.kill(pid, signal.SIGKILL)
    program.stdout.close()
    assert program.wait(20) == 1
    for n in (11, 12):
        eventually(lambda n=n: not running("sleep", seconds(n)), 20, "the end of the programs")
    eventually(lambda: machine.card()["shutdown_status"] == "crashed", 20, "the card crashed")


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


INITCTL = (
    'python3 -c "import struct; '
    "open('/run/initctl', 'wb').write(struct.pack('=4i368x', 0x03091969, 1, 48, 0))\""
)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("poweroff", "poweroff"),
        ("halt", "halted"),
        ("shutdown -h now", "poweroff"),
        ("shutdown -H", "halted"),
        (INITCTL, "poweroff"),
    ],
)
def test_cosm_32_programs_take_the_card_down(machine: Machine, command: str, status: str) -> None:
    """COSM-32: poweroff, halt, shutdown on the card end it in order, with their own shutdown status."""
    if "initctl" in command:
        needs.contained_cards()
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("run", "mic0", "--", "sh", "-c", f"{command}; sleep 20", check=False)
    eventually(lambda: machine.card()["state"] == "ready", 30, "the card is down")
    # The policy has reset the card since; the log keeps what was.
    assert f"shutdown status {status}" in machine.micemu("log").stdout


def test_cosm_32_reboot_on_the_card_boots_it_again(machine: Machine) -> None:
    """COSM-32: reboot on the card gives restart, and the policy boots the card again."""
    machine.boot("--disk", "none", "--net", "none")
    before = machine.card()["pids"]["os"]
    machine.micemu("run", "mic0", "--", "sh", "-c", "reboot; sleep 20", check=False)
    eventually(
        lambda: machine.card()["state"] == "online" and machine.card()["pids"]["os"] != before, 30, "again"
    )


@pytest.mark.contained
def test_status_names_the_card_os_itself(machine: Machine) -> None:
    """``pids.os`` is pid 1 of the card, so that SIGSTOP hangs the card and kill -9 crashes it."""
    machine.boot("--disk", "none", "--net", "none")
    status = Path(f"/proc/{machine.card()['pids']['os']}/status").read_text()
    assert next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1] == "1"
