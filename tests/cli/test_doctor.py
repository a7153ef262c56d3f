"""``micemu doctor``: what the machine refuses, by name and with the fix."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mic_emu._native import lib
from mic_emu.cli import doctor
from mic_emu.rundir import RunDir
from mic_emu.testing.machine import Machine


@pytest.mark.parametrize("named", ["/proc/x", "/proc"])
def test_run_directory_that_boot_refuses(named: str) -> None:
    """Doctor and boot say the same of a folder that is not there, and of one in which nothing can be made."""
    with Machine({"MICEMU_RUNDIR": named}) as machine:
        boot = machine.micemu("boot", check=False, timeout=20)
        done = machine.json("doctor", check=False)
    (found,) = [f for f in done if f["name"] == "run directory"]
    assert found["verdict"] == "broken"
    assert (boot.returncode, boot.stderr) == (1, f"micemu: {found['detail']}\n")
    assert found["fix"] == "set MICEMU_RUNDIR to a directory of your own"


def test_run_directory_of_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No number of an error: whose it is not, and the fix."""

    def refuse(*args: object, **kw: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setenv("MICEMU_RUNDIR", str(tmp_path))
    monkeypatch.setattr(os, "open", refuse)
    found = doctor.run_directory()
    assert (found.verdict, "is not yours to start" in found.detail) == ("broken", True)
    assert "MICEMU_RUNDIR" in found.fix


def test_run_directory_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The look makes and removes the lock file, and takes none from its holder."""
    monkeypatch.setenv("MICEMU_RUNDIR", str(tmp_path))
    assert doctor.run_directory().verdict == "ok"
    assert not list(tmp_path.iterdir())
    where = RunDir()
    with where.locked():
        assert doctor.run_directory().verdict == "ok"
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_refused_devices_and_calls_are_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/fuse and userfaultfd: everything works without them, with less."""

    def refuse() -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    class NoUserfaultfd:
        @staticmethod
        def mic_proc_userfaultfd() -> int:
            return -errno.EPERM

    monkeypatch.setattr("mic_emu.cosm.mounting.open_device", refuse)
    monkeypatch.setattr("mic_emu._native.lib", NoUserfaultfd)
    for found, name in ((doctor.fuse(), "/dev/fuse"), (doctor.userfaultfd(), "mprotect")):
        assert (found.verdict, "Operation not permitted" in found.detail) == ("degraded", True)
        assert name in found.detail + found.fix


def test_mount_of_an_ordinary_user_needs_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may open /dev/fuse may not mount yet; programs in a mount namespace of their own do without."""
    monkeypatch.setattr("mic_emu.cosm.mounting.open_device", lambda: os.open(os.devnull, os.O_RDWR))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for helper, verdict in ((None, "degraded"), ("/usr/bin/fusermount3", "ok")):
        monkeypatch.setattr("mic_emu.cosm.mounting.mount_helper", lambda helper=helper: helper)
        found = doctor.fuse()
        assert (found.verdict, "install fuse3" in found.fix) == (verdict, helper is None)


def test_userfaultfd_is_asked_of_the_kernel() -> None:
    """Zero or an error number, and no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))
    assert lib.mic_proc_userfaultfd() <= 0
    assert len(os.listdir("/proc/self/fd")) <= before  # less: garbage of another test has gone
