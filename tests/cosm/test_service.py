"""``micemu host`` as a service: notify, autoboot, reload, orderly end (issue: running as a service)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drill import Control

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
CONFIG = """
[[card]]
disk = "none"
net = "none"

[[card]]
disk = "none"
net = "none"
autoboot = false
"""


@contextlib.contextmanager
def running_service(machine: Machine, folder: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[Any]]]:
    """``micemu host --foreground`` with ``lab.toml`` of ``folder``: its manager's socket, once it is ready, and the
    process, which the caller ends; what it writes to the journal is in ``journal``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(30)
        machine.env |= {"NOTIFY_SOCKET": str(folder / "notify"), "JOURNAL_STREAM": "1:2"}
        command = ("host", "--foreground", "--config", str(folder / "lab.toml"))
        with (folder / "journal").open("w+") as errors, machine.popen(*command, stderr=errors) as service:
            try:
                assert manager.recv(4096).startswith(b"READY=1\n")
                yield manager, service
            finally:
                service.kill()


def test_cosm_51_service_boots_notifies_reloads_and_ends_in_order(machine: Machine, tmp_path: Path) -> None:
    """READY=1 when autoboot cards are online; SIGHUP takes a new file and survives a bad one; SIGTERM shuts down. The
    watchdog's switch (COSM-51) acts at once, also for a card that is up."""
    config = tmp_path / "lab.toml"
    config.write_text(CONFIG)
    with running_service(machine, tmp_path) as (manager, service):
        assert [c["state"] for c in machine.status()["cards"]] == ["online", "ready"]
        again = machine.micemu("host", check=False)
        assert (again.returncode, "runs already" in again.stderr) == (4, True)

        fresh = CONFIG.replace("autoboot = false", 'cmdline = "quiet"')
        config.write_text(fresh.replace('net = "none"', 'net = "none"\nheartbeat = false'))
        service.send_signal(signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1")
        assert manager.recv(4096) == b"READY=1"
        assert machine.json("config", "show")["card"][1]["cmdline"] == "quiet"
        for name in ("mic0", "mic1"):
            assert machine.micemu("sysfs", "cat", f"{name}/heartbeat_enable").stdout == "0\n"
        config.write_text("[[card]]\nnonsense = 1\n")
        service.send_signal(signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1")
        assert manager.recv(4096) == b"READY=1"
        assert [c["state"] for c in machine.status()["cards"]] == ["online", "ready"]

        service.send_signal(signal.SIGTERM)
        assert manager.recv(4096) == b"STOPPING=1"
        assert service.wait(timeout=30) == 0
    journal = (tmp_path / "journal").read_text()
    assert "<6>mic0: booting -> online" in journal
    assert "<6>mic0: shutdown status poweroff" in journal
    assert "<3>the configuration stays as it was" in journal
    machine.check_clean()


def test_watchdog_is_fed_while_events_pour_in(machine: Machine, tmp_path: Path) -> None:
    """WATCHDOG_USEC is 1 s: twice a second the manager hears of us, however busy the event stream is."""
    config = tmp_path / "lab.toml"
    config.write_text(CONFIG.replace("[[card]]", "[[card]]\nautoboot = false", 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        machine.env |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        command = ("host", "--foreground", "--config", str(config))
        with machine.popen(*command, stderr=subprocess.PIPE, text=True) as service:
            try:
                assert manager.recv(4096).startswith(b"READY=1\n")
                assert service.stderr
                manager.setblocking(False)
                lines = beats = 0
                while beats < 3 or lines <= 10:  # no pause of half a second between two events
                    Control(machine).ask("force_reset", cards=["mic0"])
                    lines += len(service.stderr.readline()) > 0
                    with contextlib.suppress(BlockingIOError):
                        beats += manager.recv(4096) == b"WATCHDOG=1"
            finally:
                service.kill()
    machine.micemu("stop", "--force")


@pytest.mark.parametrize("kind", ["user", "system"])
@pytest.mark.peer("systemd-analyze")
def test_unit_files_are_what_systemd_takes(machine: Machine, tmp_path: Path, kind: str) -> None:
    """`micemu host --unit`: systemd-analyze finds nothing to complain about."""
    text = machine.micemu("--instance", "lab", "host", "--unit", kind).stdout
    program = tmp_path / "micemu"
    program.symlink_to("/bin/true")
    file = tmp_path / "micemu-lab.service"
    assert f"ExecStart={sys.executable} -m mic_emu.cli --instance lab host --foreground" in text
    file.write_text(text.replace(sys.executable, str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "micemu-lab" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr
    assert ("MICEMU_RUNDIR=%t/micemu-lab" in text) == (kind == "system")
    assert machine.micemu("status", check=False).returncode == 3


def test_cosm_63_no_cards_is_exit_3_and_an_unusable_run_directory_exit_1(
    machine: Machine, tmp_path: Path
) -> None:
    """Nothing is started in either case."""
    config = tmp_path / "none.toml"
    config.write_text("card = []\n")
    done = machine.micemu("host", "--foreground", "--config", str(config), check=False)
    assert (done.returncode, "the list of cards is empty" in done.stderr) == (3, True)
    assert machine.processes() == []
    machine.run_dir.parent.touch()  # a file where the log's directory should be
    done = machine.micemu("host", "--foreground", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert machine.processes() == []
    machine.run_dir.parent.unlink()


def test_service_that_is_stopped_from_elsewhere_has_not_failed(machine: Machine, tmp_path: Path) -> None:
    """`micemu stop` by hand: exit status 0, so that the service manager does not start it again."""
    config = tmp_path / "lab.toml"
    config.write_text(CONFIG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        machine.env |= {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = ("host", "--foreground", "--config", str(config))
        with machine.popen(*command, stderr=subprocess.PIPE, text=True) as service:
            assert manager.recv(4096).startswith(b"READY=1\n")
            machine.micemu("stop")
            _, said = service.communicate(timeout=30)
    assert service.returncode == 0
    assert said.splitlines()[-1].endswith("info the emulator has stopped (instance default)")
    machine.check_clean()


def test_reload_names_what_has_to_wait(machine: Machine, tmp_path: Path) -> None:
    """The whole emulator's keys, hardware of a card that is up, a card that the file no longer has. When the card is down
    and the file is read once more, it has its new memory."""
    config = tmp_path / "lab.toml"
    config.write_text(
        'metrics_port = 0\n[[card]]\nmemory = "64M"\ndisk = "none"\nnet = "none"\n[[card]]\nautoboot = false\n'
    )
    with running_service(machine, tmp_path) as (manager, service):
        config.write_text(
            'timing = "test"\n[[card]]\nmemory = "128M"\ninterrupts = "msi"\ndisk = "none"\nnet = "none"\n'
        )
        for memory in (64, 128):
            service.send_signal(signal.SIGHUP)
            assert manager.recv(4096).startswith(b"RELOADING=1")
            assert manager.recv(4096) == b"READY=1"
            assert machine.card()["memory"] == memory << 20
            machine.micemu("shutdown")
        service.send_signal(signal.SIGTERM)
        assert manager.recv(4096) == b"STOPPING=1"
        assert service.wait(timeout=30) == 0
    warnings = [line for line in (tmp_path / "journal").read_text().splitlines() if line.startswith("<4>")]
    assert warnings == [
        "<4>timing: taken when the emulator starts again",
        "<4>mic0 keeps its memory, interrupts while it is up: micemu shutdown mic0, then SIGHUP again",
        "<4>mic1 is no longer in the file: it stays until the emulator ends",
        "<4>timing: taken when the emulator starts again",
    ]


def test_service_ends_when_the_host_process_dies(machine: Machine, tmp_path: Path) -> None:
    """kill -9 of the host process: the service fails, so that its manager starts it again; which works."""
    config = tmp_path / "lab.toml"
    config.write_text(CONFIG)
    for _ in range(2):
        with machine.popen(
            "host", "--foreground", "--config", str(config), stderr=subprocess.DEVNULL
        ) as service:
            try:
                eventually(
                    lambda: [c["state"] for c in machine.status()["cards"]] == ["online", "ready"],
                    40,
                    "the cards",
                )
                os.kill(machine.status()["host"]["pid"], signal.SIGKILL)
                assert service.wait(timeout=40) == 1
            finally:
                service.kill()


def test_vop_62_reload_swaps_the_disk_of_a_card_that_is_up(machine: Machine, tmp_path: Path) -> None:
    """VOP-62: another image in the file, SIGHUP: the card keeps running and has the other disk."""
    config = tmp_path / "lab.toml"
    config.write_text('[[card]]\nnet = "none"\ndisk = "one.img"\n')
    machine.micemu("host", "--config", str(config))
    before = machine.card()
    assert machine.device("block")["path"] == str(tmp_path / "one.img")
    config.write_text('[[card]]\nnet = "none"\ndisk = "two.img"\n')
    with machine.popen("host", "--foreground", "--config", str(config), stderr=subprocess.PIPE) as second:
        assert second.wait(timeout=20) == 4  # a second service of the same instance is refused
        assert second.stderr
        second.stderr.close()
    reload_by_request(machine, config)
    eventually(
        lambda: machine.device("block")["path"] == str(tmp_path / "two.img") and machine.device("block")["state"] == "running",
        30, "the other disk",
    )  # fmt: skip
    assert machine.card()["pids"] == before["pids"]


def reload_by_request(machine: Machine, config: Path) -> None:
    """What the service does on SIGHUP."""
    code = (
        "import dataclasses, sys; from pathlib import Path; from mic_emu.cli import client; from mic_emu.config import load\n"
        "client.ask('reload', cards=[dataclasses.asdict(c) for c in load(Path(sys.argv[1])).cards])"
    )
    subprocess.run([sys.executable, "-c", code, str(config)], env=machine.env, check=True, timeout=30)
