"""What a test needs of the machine. A program that CI installs must be there in CI; what nobody can install is named.

Where micemu itself says that the machine refuses something, a program that is not ours is asked, too: a mistake
of micemu must not look like a machine that cannot.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mic_emu import namespaces, netns
from mic_emu.testing.machine import Machine

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
CARD = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork"]


def programs(*names: str) -> None:
    """Skip when one is missing, fail where CI promises them (``.ci/run``)."""
    missing = ", ".join(n for n in names if shutil.which(n, path=PATH) is None)
    if missing and os.environ.get("MICEMU_REQUIRE_PEERS") == "1":
        pytest.fail(f"peer programs are missing and MICEMU_REQUIRE_PEERS=1: {missing}")
    if missing:
        pytest.skip(f"peer programs are missing: {missing}")


def root() -> None:
    """Skip for an ordinary user."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


def _refused(why: str, command: list[str]) -> None:
    """Skip with ``why``, unless ``command`` works."""
    env = {**os.environ, "PATH": PATH}
    if (
        shutil.which(command[0], path=PATH)
        and not subprocess.run(command, env=env, capture_output=True).returncode
    ):
        pytest.fail(f"micemu says {why!r}, but {' '.join(command)!r} works")
    pytest.skip(why)


def contained_cards() -> None:
    """Skip where the machine refuses cards namespaces of their own."""
    if refusals := namespaces.refusals():
        _refused("; ".join(refusals), [*CARD, "true"])


def tap() -> None:
    """Skip where the machine refuses a TAP in namespaces of our own."""
    found = netns.probe()
    if found.mode != "ns":
        _refused(
            f"no TAP: {found.reason}", [*CARD[:3], "--net", "ip", "tuntap", "add", "probe0", "mode", "tap"]
        )


def fuse_mount(machine: Machine, target: Path) -> None:
    """``micemu sysfs mount``; skip where there is no FUSE, or nothing may be mounted."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as e:
        pytest.skip(f"/dev/fuse: {e.strerror}")
    target.mkdir()
    done = machine.micemu("sysfs", "mount", str(target), check=False)
    if done.returncode and os.strerror(errno.EPERM) in done.stderr:
        machine.micemu("stop")
        pytest.skip(f"nothing may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
