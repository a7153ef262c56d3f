"""A stand-in for the board: contains a child and executes something in it, as root or as a user."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import needs
import pytest

import mic_emu
import mic_emu.card
from mic_emu import _native
from mic_emu.testing.leftovers import Leftovers

USER = 12345  # an id that owns nothing on this machine


def eventually(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Wait until ``condition`` is true; its value."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.005)  # between two looks at a condition, bounded by the deadline
    return value


def marked(marker: str) -> list[int]:
    """Processes whose environment holds ``marker`` (zombies have none)."""
    found = []
    for p in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in p.read_bytes():
                found.append(int(p.parent.name))
        except OSError:
            continue
    return found


def nothing_stays(before: Leftovers) -> None:
    """No mount, interface or shared memory is there for good that was not before."""
    assert not (left := before.stay()), ", ".join(left)


@functools.lru_cache(maxsize=1)
def userland() -> tuple[str, dict[str, str]]:
    """(interpreter, environment) with which an ordinary user can import this package."""
    import _cffi_backend
    import click
    import posix_ipc

    root = Path("/tmp") / f"micemu-test-userland-{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    atexit.register(forget_userland)
    shared, card = Path(mic_emu.__path__[0]), Path(mic_emu.card.__path__[0])
    skip = shutil.ignore_patterns("__pycache__", "*.c")
    shutil.copytree(shared, root / "mic_emu", ignore=skip)
    shutil.copytree(card, root / "mic_emu/card", ignore=skip, dirs_exist_ok=True)
    shutil.copytree(card.parent / "host", root / "mic_emu/host", ignore=skip, dirs_exist_ok=True)
    if not (root / "mic_emu/_native.abi3.so").exists():
        shutil.copy(str(_native.__file__), root / "mic_emu")
    for module in (_cffi_backend, posix_ipc):
        shutil.copy(str(module.__file__), root)
    shutil.copytree(click.__path__[0], root / "click", ignore=skip)
    for p in [root, *root.rglob("*")]:
        p.chmod(0o755)
    tag = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for exe in (sys.executable, f"/usr/bin/{tag}", f"/usr/local/bin/{tag}"):
        # Through a shell: setpriv itself may still execute what only root can reach.
        argv = [*as_user(), "sh", "-c", 'exec "$0" -c "import mic_emu._native, mic_emu.memory"', exe]
        env = {"PYTHONPATH": str(root), "PATH": os.environ["PATH"]}
        if (
            os.path.exists(exe)
            and subprocess.run(argv, env=env, capture_output=True, cwd="/").returncode == 0
        ):
            return exe, env
    shutil.rmtree(root)
    pytest.skip(f"no {tag} that an ordinary user can start")


def forget_userland() -> None:
    """Remove what ``userland`` copied."""
    userland.cache_clear()
    shutil.rmtree(Path("/tmp") / f"micemu-test-userland-{os.getpid()}", ignore_errors=True)


def as_user(user: int = USER) -> list[str]:
    """Command prefix that gives up root, empty when this is no root."""
    if os.geteuid():
        return []
    needs.programs("setpriv")
    return ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "--"]


def without_userns() -> list[str]:
    """Command prefix in which no further user namespace can be made."""
    needs.programs("unshare")
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--", "sh", "-c", script, "sh"]


BOARD = """
import os, sys
from mic_emu._native import lib
from mic_emu.card.os import ns
from mic_emu.proc import kill_descendants
lib.mic_proc_adopt_orphans()
report = int(sys.argv[1])
pid = os.fork()
if pid == 0:
    ns.enter("mic0", report, parent=os.getppid())
    os.execvp(sys.argv[2], sys.argv[2:])
os.close(report)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
kill_descendants()
print("status", status, flush=True)
"""


class Board:
    """A running stand-in. ``report`` is what the board was told, ``shim`` the forked child's pid."""

    def __init__(self, process: subprocess.Popen[str], report: dict[str, Any]) -> None:
        self.process = process
        self.report = report
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self.shim = int(children[0]) if children else 0

    @property
    def os_pid(self) -> int:
        """The card OS's pid as we see it."""
        pid: int = self.report["pid"]
        return pid

    def finish(self) -> tuple[str, int]:
        """(what was printed, how the card OS ended)."""
        out, err = self.process.communicate(timeout=20)
        text, _, status = out.rpartition("status ")
        assert status, err
        return text, int(status)


@contextmanager
def board(
    argv: Sequence[str],
    prefix: Sequence[str] = (),
    user: bool = False,
    keep: Sequence[int] = (),
    stdin: bool = False,
) -> Iterator[Board]:
    """Start ``argv`` as the card OS, with descriptors ``keep``; afterwards nothing of it is left."""
    exe, env = userland() if user else (sys.executable, dict(os.environ))
    marker = f"MICEMU_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = marker.partition("=")
    before = Leftovers.now()
    r, w = os.pipe()
    process = subprocess.Popen(
        [*prefix, *(as_user() if user else []), exe, "-c", BOARD, str(w), *argv],
        env={**env, name: value},
        pass_fds=[w, *keep],
        stdin=subprocess.PIPE if stdin else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    os.close(w)
    try:
        with os.fdopen(r) as f:
            line = f.readline()
        if not line:
            pytest.fail(f"the board said nothing: {process.communicate()[1]}")
        yield Board(process, json.loads(line))
    finally:
        process.kill()
        process.communicate()
        eventually(lambda: not marked(marker), 20, "every process of the card gone")
        nothing_stays(before)
