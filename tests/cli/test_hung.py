"""An emulator that answers nobody: a command says so and ends, however long its request may take otherwise."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

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
