"""``micemu clean`` and ``doctor``: machines of test runs that were killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from mic_emu.cli import clean
from mic_emu.rundir import ProcessId, RunDir
from mic_emu.testing import homes
from mic_emu.testing.machine import Machine

pytestmark = pytest.mark.system
RUN = """
import sys
from mic_emu.testing.machine import Machine
machine = Machine()
machine.boot("--disk", "none", "--net", "none")
print(machine.home, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def killed_run() -> Iterator[Path]:
    """The folder of a machine with a card that is online, whose test run was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        home = Path(run.stdout.readline().strip())
        run.kill()
    yield home
    homes.remove(home)


def leftovers(machine: Machine) -> dict[str, str]:
    """What doctor says of them."""
    return next(f for f in machine.json("doctor", check=False) if f["name"] == "leftovers")  # type: ignore[no-any-return]


def test_doctor_names_and_clean_removes_machines_of_a_killed_run(machine: Machine, killed_run: Path) -> None:
    """Processes and folder of the dead run go; this run's own machine, which lives, is neither named nor touched."""
    machine.boot("--disk", "none", "--net", "none")
    assert homes.processes(killed_run)
    found = leftovers(machine)
    assert (found["verdict"], found["fix"]) == ("degraded", "micemu clean")
    assert str(killed_run) in found["detail"]
    assert str(machine.home) not in found["detail"]
    done = machine.json("clean")["done"]
    assert f"removed {killed_run}" in done
    assert not killed_run.exists()
    assert not homes.processes(killed_run)
    assert str(killed_run) not in leftovers(machine)["detail"]
    assert machine.card()["state"] == "online"


def test_folders_that_may_be_somebodys_stay() -> None:
    """No note yet, a note that makes no sense, an owner that lives, another user's, a link: none of them counts."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    me = ProcessId.of(os.getpid())
    assert me
    gone = json.dumps({**asdict(me), "pid": dead.pid})
    notes = {"none": None, "rubbish": "[1", "alive": json.dumps(asdict(me)), "foreign": gone, "gone": gone}
    made = {name: Path(f"{homes.PLACE}/{homes.PREFIX}note-{name}-{os.getpid()}") for name in [*notes, "link"]}
    try:
        for name, note in notes.items():
            made[name].mkdir(mode=0o700)
            if note:
                (made[name] / homes.OWNER).write_text(note)
        made["link"].symlink_to(made["gone"])
        if os.geteuid() == 0:
            os.chown(made["foreign"], 12345, 12345)
        else:
            shutil.rmtree(made["foreign"])
        found = set(homes.abandoned())
        assert {name for name, path in made.items() if path in found} == {"gone"}
    finally:
        made["link"].unlink(missing_ok=True)
        for name in notes:
            shutil.rmtree(made[name], ignore_errors=True)


def test_a_process_of_the_same_number_is_not_the_owner() -> None:
    """The note has the start time, too: a number that was used again does not make a dead run live."""
    home = homes.make("note-")
    try:
        assert home not in homes.abandoned()
        note = json.loads((home / homes.OWNER).read_text())
        (home / homes.OWNER).write_text(json.dumps({**note, "start": note["start"] - 1}))
        assert home in homes.abandoned()
        with subprocess.Popen(["sleep", "60"], env={"XDG_RUNTIME_DIR": str(homes.runtime_dir(home))}) as left:
            assert f"killed process {left.pid}" in homes.remove(home)
            assert left.wait(10) == -signal.SIGKILL
        assert not home.exists()
    finally:
        shutil.rmtree(home, ignore_errors=True)


NAMED = """
import sys
open("/proc/self/comm", "w").write(sys.argv[1])
f = open(sys.argv[2], sys.argv[3])
print(flush=True)
input()
"""


@pytest.mark.parametrize(
    ("name", "mode", "ours"),
    [
        ("micro", "r", False),  # an editor
        ("micro", "a", False),
        ("mic-shell", "a", False),
        ("mic0-net", "r", False),  # a program of the user's with our name that looks at the log
        ("mic0-net", "a", True),  # as init opens it
        ("micemu-spare", "a", True),
    ],
)
def test_only_what_init_has_forked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, ours: bool
) -> None:
    """A shell or an editor that happens to be called mic... and has a file of the run directory open is somebody's work."""
    monkeypatch.setenv("MICEMU_RUNDIR", str(tmp_path))
    where = RunDir("dead")
    where.create()
    where.log.touch()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", NAMED, name, str(where.log), mode], stdin=pipe, stdout=pipe
    ) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == b"\n"
            with where.locked():
                done = clean.sweep(where)
            assert done == [f"killed process {child.pid}"] * ours + [f"removed {where.path}"]
            assert child.stdin
            child.stdin.close()
            assert child.wait(20) == (-signal.SIGKILL if ours else 1)  # end of file
        finally:
            child.kill()
