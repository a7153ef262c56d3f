"""An emulator that answers nobody: a command says so and ends, however long its request may take otherwise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mic_emu import rundir
from mic_emu.cli import client, stop
from mic_emu.errors import WaitTimeout
from mic_emu.rundir import RunDir
from mic_emu.testing.machine import Machine
from mic_emu.wire import connect_unix


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The machine's instance is this process's, which has little patience. The host process's id; it goes on afterwards."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", machine.env["XDG_RUNTIME_DIR"])
    for name in ("MICEMU_RUNDIR", "MICEMU_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    host = machine.boot("--disk", "none", "--net", "none")["host"]["pid"]
    monkeypatch.setattr(client, "QUIET_S", 0.1)
    yield host
    os.kill(host, signal.SIGCONT)


@pytest.mark.parametrize(
    "request_",
    [
        lambda: client.ask("status"),
        lambda: client.ask("wait", states=["resetting"], cards=[], timeout=3600.0),
        lambda: stop.stop_instance(client.rundir(), orderly=True, limit_s=3600.0),
    ],
    ids=["status", "wait", "stop"],
)
def test_a_stopped_host_process_is_named_with_what_to_do(
    here: int, request_: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 5, as for every time-out."""
    monkeypatch.setattr(client, "ALIVE_S", 0.5)
    os.kill(here, signal.SIGSTOP)
    with pytest.raises(
        WaitTimeout, match=rf"instance default, host process {here}\).*kill -CONT {here}.*stop --force"
    ):
        request_()


def test_a_stopped_host_process_with_a_full_queue_is_named_too(
    here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody who gave up has left his place taken."""
    monkeypatch.setattr(client, "ALIVE_S", 0.5)
    os.kill(here, signal.SIGSTOP)
    waiting: list[socket.socket] = []
    try:
        with suppress(BlockingIOError):
            while True:
                waiting.append(connect_unix(str(RunDir().control), wait=False))
        with pytest.raises(WaitTimeout, match=f"host process {here}"):
            client.ask("status")
    finally:
        for sock in waiting:
            sock.close()


def test_a_request_that_takes_long_is_waited_for(here: int) -> None:
    """The host process lives, and says so as often as it is asked."""
    began = time.monotonic()
    with pytest.raises(WaitTimeout, match="mic0: waiting for resetting"):
        client.ask("wait", states=["resetting"], cards=[], timeout=1.0)
    assert time.monotonic() - began >= 1.0


def start(machine: Machine, how: str, *args: str) -> subprocess.CompletedProcess[str]:
    """``micemu``, after the Python statements ``how``."""
    code = f"import sys\n{how}\nfrom mic_emu.cli import main\nsys.argv[0] = 'micemu'\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=machine.env, cwd=machine.home, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_a_host_process_that_hangs_at_its_start_is_ended(machine: Machine) -> None:
    """By whoever started it, with everything that it made."""
    hang = (
        "import signal, mic_emu.host.daemon as d, mic_emu.cli.boot as b\n"
        "d.main = lambda *a: signal.pause()\nb.READY_LIMIT_S = 0.5"
    )
    done = start(machine, hang, "boot")
    assert done.returncode == 5, done.stderr
    assert "the host process (instance default) did not start within 0.5 s, and was ended" in done.stderr
    machine.check_clean()
    machine.boot("--disk", "none", "--net", "none")


def test_who_starts_or_cleans_for_too_long_is_named(machine: Machine) -> None:
    """A command that is stopped while it has the lock holds nobody up for ever, and nothing is touched meanwhile."""
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("stop")
    hold = (
        f"import os, sys; os.environ['XDG_RUNTIME_DIR'] = {machine.env['XDG_RUNTIME_DIR']!r}\n"
        "from mic_emu.rundir import RunDir\nwith RunDir('default').locked(): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=machine.env
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        for words in (["boot"], ["clean"], ["stop"]):
            done = start(machine, "import mic_emu.rundir as r; r.LOCK_LIMIT_S = 0.5", *words)
            assert "Traceback" not in done.stderr
            if words != ["stop"]:  # nothing runs: that is all there is to say
                assert done.returncode == 5, done.stderr
                assert (
                    f"process {holder.pid} has been starting or cleaning the instance default" in done.stderr
                )
        assert holder.stdin
        holder.stdin.close()
    machine.boot("--disk", "none", "--net", "none")


def test_a_lock_that_nobody_waits_for_any_more_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gave up takes it from nobody later."""
    monkeypatch.setenv("MICEMU_RUNDIR", str(tmp_path))
    monkeypatch.setattr(rundir, "LOCK_LIMIT_S", 0.05)
    where = RunDir("x")
    with where.locked(), pytest.raises(WaitTimeout, match=f"process {os.getpid()}"), where.locked():
        pass
    monkeypatch.setattr(rundir, "LOCK_LIMIT_S", 30.0)
    with where.locked():
        assert os.listdir(tmp_path) == [".x.lock"]
    assert os.listdir(tmp_path) == []
