"""The card OS's containment: namespaces, ids, the shim, and what happens without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import cardlab
import pytest
from cardlab import board, eventually

from mic_emu import namespaces


@pytest.fixture(autouse=True, scope="module")
def _clean() -> Iterator[None]:
    yield
    cardlab.forget_userland()


SHOW = "hostname; id -u; echo $$; ls -d /proc/[0-9]* | wc -l; cat /sys/class/net/lo/flags"


@pytest.mark.contained
@pytest.mark.parametrize("user", [False, True])
def test_card_has_its_own_names(user: bool) -> None:
    """Host name mic0, pid 1, uid 0, its own process list and loopback, for root and ordinary users."""
    with board(["sh", "-c", SHOW], user=user) as b:
        assert b.report["namespaces"] == list(namespaces.CARD)
        assert b.report["refused"] == []
        out, status = b.finish()
    lines = out.split()
    assert lines[:3] == ["mic0", "0", "1"]
    assert int(lines[3]) < 8
    assert status == 0


@pytest.mark.contained
def test_host_keeps_its_names() -> None:
    """Nothing that the card does to its names is seen on the host."""
    before = os.uname().nodename
    with board(["sh", "-c", "hostname other; mount -t tmpfs x /tmp; hostname; exec sleep 100"]) as b:
        eventually(lambda: b.process.stdout and b.process.stdout.readline(), 20, "the card's output")
        assert os.uname().nodename == before


@pytest.mark.parametrize("status", [0, 1, 2, 77, 126, 127, 128, 137, 254, 255])
def test_exit_status_comes_through(status: int) -> None:
    """The shim ends with the status of the card OS."""
    with board(["sh", "-c", f"exit {status}"]) as b:
        assert b.finish()[1] == status


def test_death_by_signal_comes_through() -> None:
    """When the card OS is killed, so is the shim (pid 1 of a namespace dies by SIGKILL only)."""
    with board(["sleep", "100"]) as b:
        os.kill(b.os_pid, signal.SIGKILL)
        assert b.finish()[1] == -signal.SIGKILL


@pytest.mark.contained
def test_signals_are_passed_on() -> None:
    """A SIGTERM for the shim reaches the card OS, which may handle it."""
    script = 'trap "echo got; exit 3" TERM; echo ready; while :; do sleep 0.01; done'
    with board(["sh", "-c", script]) as b:
        assert b.process.stdout
        assert b.process.stdout.readline() == "ready\n"
        os.kill(b.shim, signal.SIGTERM)
        out, status = b.finish()
    assert (out, status) == ("got\n", 3)


BUSY = (
    "sleep 1000 & (sleep 1000 & sleep 1000 &) ; setsid sh -c 'sleep 1000 & sleep 1000' & "
    "echo ready; exec sleep 1000"
)


@pytest.mark.contained
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("victim", ["board", "shim", "os"])
def test_kill_9_of_any_level_leaves_nothing(victim: str, user: bool) -> None:
    """Whatever is killed, everything below it dies, daemons and other sessions included."""
    with board(["sh", "-c", BUSY], user=user) as b:
        assert b.process.stdout
        assert b.process.stdout.readline() == "ready\n"
        pid = {"board": b.process.pid, "shim": b.shim, "os": b.os_pid}[victim]
        os.kill(pid, signal.SIGKILL)
        # the check that nothing is left is in board()


@pytest.mark.root
def test_without_user_namespaces_the_card_runs_as_plain_processes() -> None:
    """A machine that refuses them is named with its reason, and the card OS runs nevertheless."""
    script = "echo $$; hostname; ps -o sid= -p $$; exit 5"
    with board(["sh", "-c", script], prefix=cardlab.without_userns()) as b:
        assert b.report["namespaces"] == []
        assert b.report["refused"] == [
            "user: No space left on device (the limit /proc/sys/user/max_user_namespaces is reached or 0)"
        ]
        out, status = b.finish()
    pid, host, sid = out.split()
    assert int(pid) == b.os_pid == int(sid)
    assert host == os.uname().nodename
    assert status == 5


@pytest.mark.root
def test_plain_card_os_dies_with_the_board() -> None:
    """Without namespaces too, the card OS does not survive its board."""
    with board(["sleep", "1000"], prefix=cardlab.without_userns()) as b:
        b.process.kill()
        eventually(lambda: not Path(f"/proc/{b.os_pid}").exists(), 20, "the card OS gone")


@pytest.mark.root
def test_root_keeps_all_ids_and_users_only_their_own() -> None:
    """Root's namespace maps every id to itself; a user's maps only the user, to root."""
    with board(["cat", "/proc/self/uid_map"]) as b:
        full = b.finish()[0].split()
    assert full == Path("/proc/self/uid_map").read_text().split()
    with board(["cat", "/proc/self/uid_map", "/proc/self/setgroups"], user=True) as b:
        assert b.finish()[0].split() == ["0", str(cardlab.USER), "1", "deny"]
