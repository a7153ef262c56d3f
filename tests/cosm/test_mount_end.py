"""How a mount of the sysfs tree ends: taken away, replaced, its server killed or hung."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from test_mount import QUICK, mounted, read, tree  # noqa: F401  the fixture

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system


def servers(tree: Path) -> list[int]:  # noqa: F811
    """Process ids of guardian and server, in this order; none when they have ended."""
    found = [
        int(p.name) for p in Path("/proc").iterdir()
        if p.name.isdigit() and str(tree).encode() in _cmdline(p) and b"mount" in _cmdline(p)
    ]  # fmt: skip
    return sorted(found, key=lambda pid: _parent(pid) in found)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_mount_goes_when_its_server_is_killed(machine: Machine, tree: Path) -> None:  # noqa: F811
    """kill -9 of the serving process: its guardian unmounts."""
    _, server = servers(tree)
    kill(server)
    eventually(lambda: not mounted(tree), 30, "the guardian's work")


def test_mount_goes_when_its_folder_has_moved(machine: Machine, tree: Path, tmp_path: Path) -> None:  # noqa: F811
    """The guardian finds it where it is now."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/sys").mkdir()
    machine.micemu("sysfs", "mount", str(tmp_path / "a/sys"))
    _, server = servers(tmp_path / "a/sys")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b/sys/class/mic/mic0/state").read_text() == "ready\n"
    kill(server)
    eventually(lambda: not mounted(tmp_path / "b/sys"), 30, "the guardian's work")


def test_server_ends_with_umount_though_a_card_keeps_the_mount(machine: Machine, tree: Path) -> None:  # noqa: F811
    """A card that boots copies the mounts of its host, and holds them for as long as it is up."""
    machine.boot(*QUICK)
    machine.micemu("sysfs", "umount", str(tree))
    eventually(lambda: not servers(tree), 30, "the end of the server")
    assert machine.card()["state"] == "online"


def test_what_is_open_outlives_umount_and_the_next_mount_outlives_both(machine: Machine, tree: Path) -> None:  # noqa: F811
    """As with every file system; the guardian of the old mount leaves the new one at the same place alone."""
    old = servers(tree)
    fd = os.open(tree / "class/mic/mic0/state", os.O_RDONLY)
    try:
        machine.micemu("sysfs", "umount", str(tree))
        assert read(fd) == "ready\n"
        machine.micemu("sysfs", "mount", str(tree))
        new = set(servers(tree)) - set(old)
    finally:
        os.close(fd)
    eventually(lambda: set(servers(tree)) == new, 30, "the end of the old server")
    assert (tree / "class/mic/mic0/state").read_text() == "ready\n"


def abandon(machine: Machine, tree: Path) -> None:  # noqa: F811
    """kill -9 of server and guardian: the kernel keeps a mount at which even stat fails."""
    if not mounted(tree):
        machine.micemu("sysfs", "mount", str(tree))
    kill(*servers(tree))

    def dead() -> bool:
        try:
            tree.stat()
        except OSError as e:
            return e.errno == errno.ENOTCONN
        return not mounted(tree)

    eventually(dead, 30, "the end of the server")


def test_what_kill_9_of_both_left_is_named_and_taken_away(machine: Machine, tree: Path) -> None:  # noqa: F811
    """Doctor names it, and both take it away. So does a clean of another test that runs beside this one: then once more."""

    def named() -> bool:
        (found,) = [f for f in machine.json("doctor", check=False) if f["name"] == "leftovers"]
        return (found["fix"], str(tree) in found["detail"]) == ("micemu clean", True)

    def cleaned() -> bool:
        return f"unmounted {tree}\n" in machine.micemu("clean", check=False).stdout

    abandon(machine, tree)
    assert machine.micemu("sysfs", "mount", str(tree)).stderr == ""
    assert (tree / "class/mic/mic0/state").read_text() == "ready\n"
    for look in (named, cleaned):
        for _ in range(9):
            abandon(machine, tree)
            if look():
                break
            assert not mounted(tree), f"{look.__name__} does not see it"
        else:
            pytest.fail(f"never {look.__name__}")
    assert os.listdir(tree) == []


def test_a_server_that_hangs_keeps_nobody_from_taking_its_mount_away(machine: Machine, tree: Path) -> None:  # noqa: F811
    """Neither mount, umount nor doctor waits for an answer of it."""
    _, server = servers(tree)
    os.kill(server, signal.SIGSTOP)
    try:
        again = machine.micemu("sysfs", "mount", str(tree), check=False)
        assert (again.returncode, "is mounted there already" in again.stderr) == (1, True)
        machine.micemu("doctor", check=False)
        assert machine.micemu("sysfs", "umount", str(tree)).stderr == ""
        assert not mounted(tree)
    finally:
        os.kill(server, signal.SIGCONT)
    eventually(lambda: not servers(tree), 30, "the end of the server")
