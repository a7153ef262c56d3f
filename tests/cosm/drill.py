"""A booted machine under full load, for drills: the C program c/load.c on both sides, and the control socket."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import mic_emu
from mic_emu.testing.machine import Machine
from mic_emu.wire import Channel, PeerClosed, connect_unix

PACKAGE = Path(mic_emu.__file__).parent
GROWTH = 16 << 20  # bytes that a process may grow over a long run: the events kept, fragmentation
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


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
        assert self.host.returncode == 0, f"status {self.host.returncode}: {out}{err}"
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
                    break
            # The host has closed its end: a look at the host's descriptors does not find it.
            with pytest.raises(PeerClosed):
                channel.recv(60, f"the end of {op}")
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

    def __init__(self, machine: Machine, status: dict[str, Any], *, everybody: bool = False) -> None:
        """``everybody``: also card OSs and backends, when none of them may have been replaced meanwhile."""
        pids = {"host": status["host"]["pid"], "init": status["host"]["init"]}
        for card in status["cards"]:
            found = (
                {**card["pids"], **{d["type"]: d["pid"] for d in card["devices"]}}
                if everybody
                else card["pids"]
            )
            pids |= {f"{card['name']} {who}": pid for who, pid in found.items() if everybody or who != "os"}
        self.descriptors = {who: self._descriptors(pid) for who, pid in pids.items()}
        self.resident = {who: self._resident(pid) for who, pid in pids.items()}
        self.processes = sorted(machine.processes())
        self.tasks = len(os.listdir(f"/proc/{pids['host']}/task"))
        # Backends and board share the host's objects: GDDR, registers, configuration space, host memory.
        self.shared = self._shared(pids["host"])

    @staticmethod
    def _descriptors(pid: int) -> Counter[str]:
        """How many of each sort: file names, or what stands before the number of a socket or pipe."""
        found: Counter[str] = Counter()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                found[os.readlink(fd).partition(":[")[0]] += 1
        return found

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
        for who, found in self.descriptors.items():
            more, less = found - before.descriptors[who], before.descriptors[who] - found
            assert found.total() <= before.descriptors[who].total(), f"{who}: more: {more}, less: {less}"
        assert len(self.processes) <= len(before.processes), "\n".join(self.processes)
        assert self.tasks <= before.tasks
        assert self.shared <= before.shared + (4 << 20), (self.shared, before.shared)
        for who, size in self.resident.items():
            assert size <= before.resident[who] + GROWTH, f"{who} grew from {before.resident[who]} to {size}"
