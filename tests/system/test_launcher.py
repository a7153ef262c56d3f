"""Init and the host process, one of which is killed or stopped at the worst moment."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from mic_emu.host.launcher import Launcher
from mic_emu.log import Log
from mic_emu.rundir import RunDir
from mic_emu.wire import Channel


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Init's loop, which forks nothing."""
    monkeypatch.setenv("MICEMU_RUNDIR", str(tmp_path))
    monkeypatch.setattr(Launcher, "start", lambda *_: 7)
    monkeypatch.setattr(Launcher, "have_a_spare", lambda _: None)
    return Launcher(RunDir("x"), Log.open(tmp_path / "log.jsonl"))


def test_a_host_process_that_is_killed_while_it_asks_is_no_end_of_init(launcher: Launcher) -> None:
    """Init has to clean up after it."""
    ours, its = map(Channel, socket.socketpair())
    with ours, its:
        its.send({"id": 1, "kind": "net", "name": "mic0-net", "args": {}})
        its.close()
        assert not launcher.serve(ours)


def test_a_request_that_comes_in_pieces_is_served(launcher: Launcher) -> None:
    """The host process was stopped in the middle of it, or waits for its turn."""
    ours, its = socket.socketpair()
    with Channel(ours) as init:
        its.send(b'{"id": 1, "kind": "net", ')
        rest = threading.Timer(1.2, its.send, [b'"name": "mic0-net", "args": {}}\n'])  # so long is it stopped
        rest.start()
        assert launcher.serve(init)
        assert Channel(its).recv(20, "the answer")[0] == {"spawned": 7, "id": 1}
        rest.join()
    its.close()
