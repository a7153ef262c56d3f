"""Windows of a card that is lost: they fault in every process, and never reach the next card OS (SCIF-102)."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from scif_server import HERE, PACKAGE, Server

from mic_emu.bar import Bus
from mic_emu.testing.machine import MICEMU, Machine, eventually

PAGES = (16 << 20) // 4096
ALL_FAULT = f"{2 * PAGES} 0"  # a load and a store of each page
NONE_FAULTS = f"0 {2 * PAGES}"
OLD, NEW = 0x11, 0x77


class Program:
    """``lost`` in one of its roles; a context manager that ends it."""

    def __init__(self, command: list[str], env: Mapping[str, str], cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.line()


def compile_lost(where: Path) -> Path:
    """The program with the library beside it."""
    shutil.copy2(PACKAGE / "lib" / "libscif.so.0", where / "libscif.so.0")
    command = ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{PACKAGE / 'include'}"]
    command += [
        str(HERE / "programs" / "lost.c"),
        str(where / "libscif.so.0"),
        "-pthread",
        "-Wl,-rpath,$ORIGIN",
    ]
    subprocess.run([*command, "-o", str(where / "lost")], check=True)
    return where / "lost"


# --- node processes: the memory is cut off at a moment of the test's choice -------------------------


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, 2)
    yield server
    assert server.stop() == 0


def on_node(server: Server, node: int) -> dict[str, str]:
    return {**os.environ, "MICEMU_SCIF_SOCKET": str(server.where / f"node{node}.sock")}


@contextmanager
def owner_and_user(server: Server, program: Path, node: int, *args: str) -> Iterator[Program]:
    """An owner on card 1 and a user on ``node`` that has mapped its window."""
    with Program([str(program), "owner", "4000", str(OLD)], on_node(server, 1)) as owner:
        assert owner.line() == "up"
        with Program([str(program), "user", "1", "4000", *args], on_node(server, node)) as user:
            assert user.line() == "ready"
            assert user.ask("ask") == "y"
            yield user


@pytest.mark.parametrize("node", [0, 2])
def test_scif_102_copies_fail_and_the_programs_handler_sees_only_its_own_faults(
    fabric: Server, tmp_path: Path, node: int
) -> None:
    """The pages go before anybody has heard of the loss: copies and signals of ours give EIO (SCIF 3.7), the
    peer's node answers a signal with ENXIO and lives on, the mapping faults into the program's own handler."""
    with owner_and_user(fabric, compile_lost(tmp_path), node) as user:
        assert user.ask("copy") == "0 0 0 0 0"
        assert user.ask("look") == NONE_FAULTS
        fabric.ask("cut 1")
        eio = errno.EIO
        assert user.ask("copy") == f"{eio} {eio} {eio} {eio} {errno.ENXIO}"
        assert user.ask("look") == ALL_FAULT
        assert user.ask("copy") == f"{eio} {eio} {eio} {eio} {errno.ENXIO}"
        assert [n["online"] for n in fabric.ask("state")] == [[0, 1, 2]] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("node", [0, 2])
def test_scif_102_a_loss_ends_copies_and_mappings(fabric: Server, tmp_path: Path, node: int) -> None:
    """The node is lost under a program that does nothing but copy: the copy in progress fails, what comes
    later is ECONNRESET, and the mapping faults."""
    with owner_and_user(fabric, compile_lost(tmp_path), node) as user:
        assert user.ask("loop") == "began"
        fabric.ask("down 1")
        assert user.line() in (str(errno.EIO), str(errno.ECONNRESET))
        eventually(lambda: user.ask("look") == ALL_FAULT, 30, "the end of the mapping")
        assert user.ask("copy") == " ".join([str(errno.ECONNRESET)] * 5)


def test_scif_102_the_signal_is_sigbus(fabric: Server, tmp_path: Path) -> None:
    """Who does not catch SIGBUS ends by it, whatever the library has installed meanwhile."""
    with owner_and_user(fabric, compile_lost(tmp_path), 0, "plain") as user:
        fabric.ask("cut 1")
        assert user.ask("copy").split()[0] == str(errno.EIO)
        user.tell("touch")
        assert user.process.wait(20) == -signal.SIGBUS


# --- a booted machine: crash, reset, boot -------------------------------------------------------------


class Lab:
    """A machine with programs on it."""

    def __init__(self, machine: Machine, stack: ExitStack) -> None:
        self.machine = machine
        self.stack = stack
        self.where = machine.home / "programs"
        self.where.mkdir()
        compile_lost(self.where)

    def program(self, place: str, *args: str) -> Program:
        """On a card through ``micemu run``; on the host as the test's own child, which it can stop."""
        command = [str(self.where / "lost"), *args]
        if place != "host":
            command = [*MICEMU, "run", place, "--", *command]
        return self.stack.enter_context(Program(command, self.machine.env, self.where))

    def owner(self, place: str, port: int, byte: int) -> Program:
        program = self.program(place, "owner", str(port), str(byte))
        assert program.line() == "up"
        return program

    def user(self, place: str, node: int, port: int) -> Program:
        program = self.program(place, "user", str(node), str(port))
        assert program.line() == "ready"
        return program

    def crash(self, card: str) -> None:
        os.kill(self.machine.card(card)["pids"]["os"], signal.SIGKILL)
        eventually(
            lambda: self.machine.card(card)["shutdown_status"] == "crashed", 20, "the crash is noticed"
        )


@pytest.fixture
def lab(machine: Machine) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(machine, stack)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_scif_102_a_stale_mapping_never_reaches_the_next_card_os(lab: Lab) -> None:
    """The mapping faults from the crash on, before any reset; after the next boot stores through it, from the
    host and from another card, change nothing of the windows that the new card OS has in their place."""
    lab.machine.boot("-n", "2", "--disk", "none", "--net", "none")
    lab.owner("mic0", 4000, OLD)
    stale = [lab.user("host", 1, 4000), lab.user("mic1", 1, 4000)]
    assert [s.ask("look") for s in stale] == [NONE_FAULTS] * 2
    lab.crash("mic0")
    for s in stale:
        eventually(lambda s=s: s.ask("look") == ALL_FAULT, 30, "the end of the mapping")
    for port in (4001, 4002):  # twice: a first boot could have had other pages by chance
        lab.machine.boot("mic0")
        lab.owner("mic0", port, NEW)
        fresh = lab.user("host", 1, port)
        for s in stale:
            s.tell("hammer 500")
        for _ in range(5):
            assert fresh.ask("ask") == "y"
        assert [s.line().split()[1] for s in stale] == ["0", "0"], "a store went somewhere"
        assert fresh.ask("ask") == "y"
        lab.machine.micemu("reset", "mic0")
    assert all(s.ask("copy") == " ".join([str(errno.ECONNRESET)] * 5) for s in stale)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_scif_102_a_stopped_program_holds_nothing_up(lab: Lab) -> None:
    """A program that is stopped inside a copy: the card crashes, is reset and boots meanwhile; when the
    program goes on, its copy has failed and the new card OS has every byte of its own."""
    lab.machine.boot("--disk", "none", "--net", "none")
    lab.owner("mic0", 4000, OLD)
    stopped = lab.user("host", 1, 4000)
    assert stopped.ask("loop") == "began"
    stopped.process.send_signal(signal.SIGSTOP)
    lab.crash("mic0")
    lab.machine.boot("mic0")
    lab.owner("mic0", 4001, NEW)
    fresh = lab.user("host", 1, 4001)
    stopped.process.send_signal(signal.SIGCONT)
    assert stopped.line() in (str(errno.EIO), str(errno.ECONNRESET))
    assert stopped.ask("look") == ALL_FAULT
    assert fresh.ask("ask") == "y"


def memory_of(pid: int) -> tuple[int, int, int]:
    """Mappings and descriptors of card memory in a process, and descriptors in all."""
    fds = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()]
    maps = Path(f"/proc/{pid}/maps").read_text().count("-gddr-")
    return maps, sum("-gddr-" in f for f in fds), len(fds)


def open_memory(pid: int) -> BinaryIO:
    """The card memory that a process has now, as a file of our own."""
    links = Path(f"/proc/{pid}/fd")
    return next(p for p in links.iterdir() if "-gddr-" in os.readlink(p)).open("rb")


def blocks(memory: BinaryIO) -> int:
    """Bytes that a memory object takes up."""
    return os.fstat(memory.fileno()).st_blocks * 512


def card_bus(pid: int) -> Bus:
    """The bus of the card OS ``pid``, by copies of its descriptors."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    fds = json.loads(next(a for a in argv if a.startswith(b"{")))["fds"]
    process = os.pidfd_open(pid)
    try:
        return Bus([copy_of(process, fd) if fd >= 0 else -1 for fd in fds])
    finally:
        os.close(process)


def copy_of(process: int, fd: int) -> int:
    """Descriptor ``fd`` of a process, here (pidfd_getfd)."""
    copy = ctypes.CDLL(None, use_errno=True).syscall(438, process, fd, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), f"descriptor {fd} of another process")
    return int(copy)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_scif_102_hw_52_a_reset_that_the_driver_knows_nothing_of(lab: Lab) -> None:
    """Somebody stores to RGCR: the windows fault at once; host process and backends live on over a card
    that is silent, until the driver resets and boots it."""
    status = lab.machine.boot()
    card = status["cards"][0]
    lab.owner("mic0", 4000, OLD)
    stale = lab.user("host", 1, 4000)
    with card_bus(card["pids"]["os"]) as bus:
        bus.write("rgcr", 1)
    eventually(lambda: lab.machine.card()["post_code"] == "12", 30, "the reset")
    assert stale.ask("look") == ALL_FAULT
    after = lab.machine.status()
    assert after["host"]["pid"] == status["host"]["pid"]
    assert [d["pid"] for d in after["cards"][0]["devices"]] == [d["pid"] for d in card["devices"]]
    lab.machine.micemu("reset", "mic0")
    lab.machine.boot("mic0")
    lab.owner("mic0", 4001, NEW)
    assert lab.user("host", 1, 4001).ask("ask") == "y"
    assert stale.ask("look") == ALL_FAULT


@pytest.mark.system
@pytest.mark.timeout(300)
def test_scif_102_resets_leave_no_memory_behind(lab: Lab) -> None:
    """Each reset gives the card another memory object: the old one is gone from every process that lives on,
    and has no page any more, although a program still maps it."""
    lab.machine.boot("--disk", "none", "--net", "none")
    status = lab.machine.status()
    pids = [status["host"]["pid"], status["cards"][0]["pids"]["board"]]
    lab.owner("mic0", 4000, OLD)
    stale = lab.user("host", 1, 4000)
    with open_memory(pids[1]) as old:
        assert blocks(old) > 16 << 20
        lab.machine.micemu("reset", "mic0")
        assert blocks(old) == 0
    before = [memory_of(pid) for pid in pids]
    assert [b[:2] for b in before] == [(1, 1), (2, 1)]  # the board's DMA engine has the window bank, too
    for _ in range(5):
        lab.machine.boot("mic0")
        lab.machine.micemu("reset", "mic0")
    # The last command's connection may be open for a moment more.
    eventually(
        lambda: [memory_of(pid) for pid in pids] == before, 20, f"memory and descriptors as before: {before}"
    )
    assert stale.ask("look") == ALL_FAULT
