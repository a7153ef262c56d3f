"""Crash drills: kill or hang the card OS under full load, look at everybody who used it, bring it back.

The load is a C program on both sides (c/load.c): SCIF streams, echoes, copies both ways, fences, mappings, a
blocked recv and poll, disk and TCP. MICEMU_DRILL_ROUNDS sets the length of the long run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mic_emu
from mic_emu.testing.machine import Machine, eventually
from mic_emu.wire import Channel, connect_unix

pytestmark = pytest.mark.system
PACKAGE = Path(mic_emu.__file__).parent
ROUNDS = int(os.environ.get("MICEMU_DRILL_ROUNDS", "1000"))
GROWTH = 16 << 20  # bytes that host and init may grow over a long run: the events kept, fragmentation
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def build(machine: Machine) -> Path:
    """The load beside its library, in the machine's own folder, which the card sees too."""
    where = machine.home / "load"
    where.mkdir()
    shutil.copy2(PACKAGE / "lib" / "libscif.so.0", where)
    source = str(Path(__file__).parent / "c" / "load.c")
    flags = ["-O2", "-pthread", "-Wall", f"-I{PACKAGE / 'include'}", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(["cc", source, *flags, str(where / "libscif.so.0"), "-o", str(where / "load")], check=True)
    return where


class Load:
    """Both ends under full steam from the return of the constructor on."""

    def __init__(self, machine: Machine, where: Path) -> None:
        self.card = machine.popen("run", "mic0", "--", "./load", "card", "4000", cwd=where, **QUIET)
        disk = str(machine.run_dir / "mic0" / "vda.nbd")
        self.host = machine.popen(
            "run", "host", "--", "./load", "host", "1", "4000", disk, cwd=where, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.host.stdout
        line = self.host.stdout.readline()
        assert line == "loaded\n", line + self.host.communicate()[1]

    def ends(self, limit_s: float) -> dict[str, str]:
        """Every call has returned with an errno of the specification: thread -> errno."""
        out, err = self.host.communicate(timeout=limit_s)
        assert self.host.returncode == 0, out + err
        assert self.card.wait(timeout=limit_s) != 0  # its program died with the card
        return {line.split()[0]: line.split()[1] for line in out.splitlines()}

    def kill(self) -> None:
        for process in (self.host, self.card):
            process.kill()
            process.wait()


@contextmanager
def load(machine: Machine, where: Path) -> Iterator[Load]:
    running = Load(machine, where)
    try:
        yield running
    finally:
        running.kill()


class Control:
    """The control socket, without the start of a command per question."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        with Channel(connect_unix(str(self.machine.run_dir / "control.sock"))) as channel:
            channel.send({"op": op, **fields})
            while True:
                msg, _ = channel.recv(60, f"the answer to {op}")
                assert "error" not in msg, msg["error"]
                if msg.get("done"):
                    return msg

    def card(self) -> dict[str, Any]:
        return self.ask("status")["status"]["cards"][0]  # type: ignore[no-any-return]


def signal_tree(pid: int, number: int) -> None:
    """Signal a process and its descendants: all stopped is what a hung kernel looks like."""
    try:
        os.kill(pid, number)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            signal_tree(int(child), number)
    except (ProcessLookupError, FileNotFoundError):
        pass  # a program ended meanwhile


class Holdings:
    """What an instance holds, looked at in the same situation: the card online and idle."""

    def __init__(self, machine: Machine, status: dict[str, Any]) -> None:
        pids = {"host": status["host"]["pid"], "init": status["host"]["init"], **status["cards"][0]["pids"]}
        del pids["os"]
        self.descriptors = {who: len(os.listdir(f"/proc/{pid}/fd")) for who, pid in pids.items()}
        self.resident = {who: self._resident(pid) for who, pid in pids.items()}
        self.processes = len(machine.processes())
        self.tasks = len(os.listdir(f"/proc/{pids['host']}/task"))
        # Backends and board share the host's objects: GDDR, registers, configuration space, host memory.
        self.shared = self._shared(pids["host"])

    @staticmethod
    def _resident(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))

    @staticmethod
    def _shared(pid: int) -> int:
        """Bytes in use of all shared memory objects that the process holds."""
        objects = {}
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(fd).startswith("/dev/shm/"):
                found = fd.stat()
                objects[found.st_ino] = found.st_blocks * 512
        return sum(objects.values())

    def check(self, before: Holdings) -> None:
        assert self.descriptors == before.descriptors
        assert (self.processes, self.tasks) == (before.processes, before.tasks)
        assert self.shared <= before.shared + (4 << 20), (self.shared, before.shared)
        for who, size in self.resident.items():
            assert size <= before.resident[who] + GROWTH, f"{who} grew from {before.resident[who]} to {size}"


def drill(machine: Machine, rounds: int) -> None:
    """Kill under load: ``crashed`` within a second, every call ended, the log readable, reset, boot, nothing lost."""
    where = build(machine)
    machine.boot()
    control = Control(machine)
    boot = {"cards": control.ask("config")["config"]["card"], "names": ["mic0"]}
    before: Holdings | None = None
    for n in range(rounds):
        with load(machine, where) as running:
            victim = control.card()["pids"]["os"]
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            control.ask("wait", states=["crashed"], cards=["mic0"], timeout=5.0)
            assert time.monotonic() - killed < 1.0
            assert control.card()["state"] == "shutting_down"
            ends = running.ends(20)
            assert len(ends) == 10, ends
            assert (ends["stream"], ends["recv"], ends["poll"]) == ("ECONNRESET",) * 3
        log = control.ask("sysfs_read", path="kernel/debug/mic_cosm/mic0/log_buf")["data"]
        assert "card is up" in log
        if n % 2:  # by hand, or by the boot itself
            control.ask("reset", cards=["mic0"])
            assert control.card()["state"] == "ready"
        assert control.ask("boot", **boot)["status"]["cards"][0]["state"] == "online"
        if n in (1, 20) or n % 50 == 49 or n == rounds - 1:
            print(f"round {n + 1} at {time.strftime('%H:%M:%S')}", flush=True)
            now = settled(machine, control, before)
            before = now if n in (1, 20) else before


def settled(machine: Machine, control: Control, before: Holdings | None) -> Holdings:
    """Holdings that are no more than before; the ends of closed connections take a moment."""
    deadline = time.monotonic() + 15
    while True:
        now = Holdings(machine, control.ask("status")["status"])
        try:
            if before:
                now.check(before)
            return now
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            control.ask("status")


@pytest.mark.timeout(180)
def test_cosm_54_55_62_crash_drill_four_rounds(machine: Machine) -> None:
    """Four crashes in a row under full load."""
    drill(machine, 4)


@pytest.mark.soak
@pytest.mark.timeout(24 * 3600)
def test_cosm_54_55_62_crash_drill_a_thousand_rounds(machine: Machine) -> None:
    """A thousand crashes in a row without a leak or a hang."""
    drill(machine, ROUNDS)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_cosm_50_44_hung_card_is_found_by_its_silence_alone(machine: Machine) -> None:
    """Real times: no process ends, so only 40 s without a message tell. The last one came up to one heartbeat
    (30 s) before the hang. Every call returns at the reset, which needs no help of the card."""
    where = build(machine)
    machine.boot("--timing", "x100")
    control = Control(machine)
    with load(machine, where) as running:
        pid = control.card()["pids"]["os"]
        hung = time.monotonic()
        signal_tree(pid, signal.SIGSTOP)
        control.ask("wait", states=["crashed"], cards=["mic0"], timeout=50.0)
        assert 10 - 1 <= time.monotonic() - hung <= 40 + 1
        assert Path(f"/proc/{pid}").exists()
        assert control.card()["state"] == "shutting_down"
        assert "card is up" in machine.micemu("dump", "log", "mic0").stdout
        control.ask("reset", cards=["mic0"])
        assert running.ends(30)["stream"] == "ECONNRESET"
    assert machine.boot()["cards"][0]["state"] == "online"
