"""An instance that a group shares: its members use it, everybody else does not (design.md 2, 11)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cardlab
import pytest

from mic_emu.testing.leftovers import Leftovers
from mic_emu.testing.machine import Machine

OWNER, MEMBER, STRANGER, GROUP = 12345, 12346, 12347, 23456
MAIN = "from mic_emu.cli import main; main()"
CONFIG = f'group = "{GROUP}"\n[[card]]\nnet = "none"\n'

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.peer("setpriv"),
    pytest.mark.contained,
]


class Person:
    """Runs commands as user ``uid``, in GROUP or in no group of interest."""

    def __init__(self, shared: Path, uid: int, group: int | None) -> None:
        exe, env = cardlab.userland()
        self.home = shared / f"home-{uid}"
        self.home.mkdir(mode=0o700)
        os.chown(self.home, uid, uid)
        groups = ["--groups", str(group)] if group else ["--clear-groups"]
        self.prefix = ["setpriv", "--reuid", str(uid), "--regid", str(uid), *groups, "--"]
        self.argv = [*self.prefix, exe, "-c", MAIN]
        self.env = {**env, "HOME": str(self.home), "MICEMU_RUNDIR": str(shared / "run"), "TERM": "xterm"}

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            input=stdin,
            check=False,
        )

    def micemu(self, *args: str, status: int = 0, stdin: str = "") -> str:
        done = self.run(*self.argv, *args, stdin=stdin)
        assert done.returncode == status, f"{args}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


class People:
    """The three of them, and the directory with the run directory of all."""

    def __init__(self, shared: Path) -> None:
        (shared / "run").mkdir(mode=0o755)
        os.chown(shared / "run", OWNER, OWNER)
        self.owner = Person(shared, OWNER, GROUP)
        self.member = Person(shared, MEMBER, GROUP)
        self.stranger = Person(shared, STRANGER, None)
        self.run_dir = shared / "run" / "default"

    def boot(self, text: str = CONFIG) -> None:
        config = self.owner.home / "lab.toml"
        config.write_text(text)
        config.chmod(0o644)
        self.owner.micemu("boot", "--config", str(config))


@pytest.fixture
def people() -> Iterator[People]:
    shared = Path(tempfile.mkdtemp(prefix="mg-", dir="/tmp"))
    shared.chmod(0o755)
    before = Leftovers.now()
    them = People(shared)
    try:
        yield them
        them.owner.micemu("stop", "--force")
        assert os.listdir(shared / "run") == []
    finally:
        them.owner.run(*them.owner.argv, "stop", "--force")
        shutil.rmtree(shared)
        cardlab.forget_userland()
    cardlab.nothing_stays(before)


def test_members_use_everything_and_strangers_nothing(people: People) -> None:
    """Every socket is 0660 and of the group, every folder 2750; a member runs the whole show, a stranger is refused."""
    people.boot()
    found = {p: p.stat() for p in [people.run_dir, *people.run_dir.rglob("*")]}
    assert {s.st_gid for s in found.values()} == {GROUP}
    for path, st in found.items():
        if stat.S_ISSOCK(st.st_mode):
            assert stat.S_IMODE(st.st_mode) == 0o660, path
        elif stat.S_ISDIR(st.st_mode):
            assert st.st_mode & 0o007 == 0, path
        elif stat.S_ISREG(st.st_mode):
            assert st.st_mode & 0o022 == 0, path  # members do not say whom the owner kills or boots
    sockets = {str(p.relative_to(people.run_dir)) for p, st in found.items() if stat.S_ISSOCK(st.st_mode)}
    cards = {
        f"mic0/{name}" for name in ("console.sock", "run.sock", "os.sock", "scif.sock", "vop.sock", "vda.nbd")
    }
    assert sockets == {"control.sock", "scif.sock", "metrics.sock", *cards}

    member = people.member
    assert json.loads(member.micemu("status", "--json"))["cards"][0]["state"] == "online"
    assert "hello" in member.micemu("run", "mic0", "--", "cat", stdin="hello\n")
    assert "on the host" in member.micemu("run", "host", "--", "echo", "on the host")
    assert "mic0" in member.micemu("scif", "nodes")
    assert member.micemu("sysfs", "cat", "mic0/state") == "online\n"
    cardlab.eventually(lambda: "card is up" in member.micemu("dump", "log"), 20, "the card's last line")
    assert "card is up" in member.micemu("log")
    assert "micemu_info" in member.micemu("metrics")
    assert "Status: OK" in member.micemu("check")
    member.micemu("reboot", "mic0")
    member.micemu("shutdown", "mic0")
    member.micemu("boot", "mic0")
    assert "not yours" in member.micemu("clean", status=1)
    assert "another user" in member.micemu("stop", "--force", status=1)

    stranger = people.stranger
    for command in (
        ["status"],
        ["run", "mic0", "--", "true"],
        ["stop"],
        ["console", "mic0"],
        ["sysfs", "ls"],
    ):
        assert "belongs to another user" in stranger.micemu(*command, status=1)
    assert "not yours to start" in stranger.micemu("boot", status=1)
    for path in sockets:
        with pytest.raises(PermissionError):
            connect_as(stranger, people.run_dir / path)
        connect_as(member, people.run_dir / path)

    assert "stopped" in member.micemu("stop", "--json")
    assert list(people.run_dir.parent.iterdir()) == []


def connect_as(person: Person, path: Path) -> None:
    """A plain connect, of the kind that the socket takes. Raises OSError of the person's connect."""
    kind = socket.SOCK_SEQPACKET if path.name == "scif.sock" else socket.SOCK_STREAM
    code = (
        "import socket, sys\n"
        f"s = socket.socket(socket.AF_UNIX, {int(kind)})\n"
        "try: s.connect(sys.argv[1])\n"
        "except OSError as e: sys.exit(e.errno)\n"
    )
    done = person.run(*person.argv[:-1], code, str(path))
    if done.returncode:
        raise OSError(done.returncode, done.stderr)


def test_peers_are_checked_by_user_or_group_beside_the_permissions(people: People) -> None:
    """Even where the files let everybody in, who accepts lets nobody but members in."""
    people.boot()
    people.run_dir.chmod(0o755)
    for path in ("control.sock", "mic0/console.sock"):
        (people.run_dir / path).parent.chmod(0o755)
        (people.run_dir / path).chmod(0o666)
    assert "not shared with you" in people.stranger.micemu("status", status=1)
    assert answered(people.member, people.run_dir / "mic0" / "console.sock")
    assert not answered(people.stranger, people.run_dir / "mic0" / "console.sock")


def answered(person: Person, path: Path) -> bool:
    """Does the console show its history, or hang up without a byte?"""
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n"
        "s.settimeout(10)\n"
        "s.connect(sys.argv[1])\n"
        "sys.exit(0 if s.recv(1) else 3)\n"
    )
    done = person.run(*person.argv[:-1], code, str(path))
    assert done.returncode in (0, 3), done.stderr
    return done.returncode == 0


def test_bad_groups_and_directories_are_named_with_the_fix(people: People, machine: Machine) -> None:
    """Unknown group, one of which the owner is no member, no MICEMU_RUNDIR, one that is not there, one that the
    members cannot reach."""

    def boot(text: str) -> str:
        config = people.owner.home / "lab.toml"
        config.write_text(text)
        config.chmod(0o644)
        return people.owner.micemu("boot", "--config", str(config), status=status)

    status = 2
    assert "there is no group 'nobody-has-this'" in boot('group = "nobody-has-this"\n')
    status = 1
    assert "Operation not permitted" in boot('group = "0"\n')
    people.run_dir.parent.chmod(0o700)
    assert f"chgrp {GROUP}" in boot(CONFIG)
    people.run_dir.parent.chmod(0o1777)
    assert "anybody can write" in boot(CONFIG)
    assert "anybody can write" in people.member.micemu("status", status=1)
    people.run_dir.parent.chmod(0o755)
    done = machine.micemu("host", "--group", str(GROUP), check=False)
    assert (done.returncode, "set MICEMU_RUNDIR" in done.stderr) == (2, True)
    machine.env["MICEMU_RUNDIR"] = str(machine.home / "absent")
    done = machine.micemu("boot", check=False)
    assert (done.returncode, "make that directory first" in done.stderr) == (1, True)
    del machine.env["MICEMU_RUNDIR"]


def test_without_a_group_nothing_is_shared(people: People) -> None:
    """The same place without ``group``: 0700 and 0600, also for members of anything."""
    people.boot('[[card]]\nnet = "none"\n')
    files = [p for p in people.run_dir.rglob("*") if "bin" not in p.parts]  # commands of the card
    assert {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in [people.run_dir, *files]} == {0}
    assert "belongs to another user" in people.member.micemu("status", status=1)
