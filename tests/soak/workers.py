"""Everything that works during the integrity soak: the C programs of c/, hot-plug, and a DMA channel."""

from __future__ import annotations

import mmap
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drill import PACKAGE, Control
from nbdwire import FLUSH, READ, WRITE, NbdClient

from mic_emu._native import lib
from mic_emu.bar import FD_COUNT, Bus
from mic_emu.dma import INTERRUPT, DmaChannel, DmaError, DmaMemory
from mic_emu.memory import PageAllocator
from mic_emu.testing.machine import Machine
from mic_emu.wire import Channel, connect_unix

HEAD = struct.Struct("<QQ")  # stop, disk_may (c/soak.h)
ROW = struct.Struct("<24sQQQQQ")
ROWS = 32
DISKS = ("disk 0", "disk 1", "disk 2")
STREAMS = ("messages", "tcp")
NAMES = (
    *DISKS, "console", "rma by host", "rma by card",
    *(f"{s} {way} {side}" for s in STREAMS for way in ("from", "at") for side in ("host", "card")),
)  # fmt: skip
MAY_FAIL, MAY_TEAR = 1, 2
PLUG_S = 0.1
COPY = 1 << 20


@dataclass
class Progress:
    """One worker's counters."""

    rounds: int = 0
    bytes: int = 0
    errors: int = 0
    torn: int = 0
    wrong: int = 0


class Load:
    """The C programs of both sides, from the moment when all of them work to ``stop``."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.where = machine.home / "soak"
        self.where.mkdir(exist_ok=True)
        self._build()
        self._file = (self.where / "page").open("w+b")
        self._file.truncate(HEAD.size + ROWS * ROW.size)
        self._map = mmap.mmap(self._file.fileno(), 0)
        for i, name in enumerate(NAMES):
            ROW.pack_into(self._map, HEAD.size + i * ROW.size, name.encode(), 0, 0, 0, 0, 0)
        # The console's shell sees nothing of /tmp: it gets the program in the card's own /run.
        machine.shell("mkdir -p /run/soak && cp -f soak libscif.so.0 /run/soak", cwd=self.where)
        run_dir = machine.run_dir / "mic0"
        said = (self.where / "said").open("w")
        port = "4000"
        self.card = machine.popen(
            "run", "mic0", "--", "./soak", "card", "page", str(seed), port, cwd=self.where, stdout=said, stderr=said
        )  # fmt: skip
        self.host = machine.popen(
            "run", "host", "--", "./soak", "host", "page", str(seed), port, str(run_dir / "vda.nbd"),
            str(run_dir / "console.sock"), f"exec /run/soak/soak console {seed}",
            cwd=self.where, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        said.close()
        assert self.host.stdout
        assert self.host.stdout.readline() == "loaded\n", self.said()

    def _build(self) -> None:
        if (self.where / "soak").exists():
            return
        shutil.copy2(PACKAGE / "lib" / "libscif.so.0", self.where)
        sources = sorted(str(p) for p in (Path(__file__).parent / "c").glob("*.c"))
        flags = [
            "-O2",
            "-g",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{PACKAGE / 'include'}",
            "-Wl,-rpath,$ORIGIN",
        ]
        library = str(self.where / "libscif.so.0")
        subprocess.run(["cc", *sources, *flags, library, "-o", str(self.where / "soak")], check=True)

    def said(self) -> str:
        """What the programs complained about."""
        return (self.where / "said").read_text()

    def progress(self) -> dict[str, Progress]:
        """Every row of the page."""
        found = {}
        for i, name in enumerate(NAMES):
            found[name] = Progress(*ROW.unpack_from(self._map, HEAD.size + i * ROW.size)[1:])
        return found

    def allow(self, what: int) -> None:
        """What may happen to disk requests from now on."""
        struct.pack_into("<Q", self._map, 8, what)

    @property
    def alive(self) -> bool:
        """Neither side has ended."""
        return self.card.poll() is None and self.host.poll() is None

    def stop(self, limit_s: float) -> None:
        """Orderly: every stream ends with its last record, the disk is read once more. AssertionError."""
        struct.pack_into("<Q", self._map, 0, 1)
        for process in (self.host, self.card):
            assert process.wait(limit_s) == 0, self.said()

    def kill(self) -> None:
        """Whatever is left, for a failed test."""
        for process in (self.host, self.card):
            process.kill()
            process.wait()
        assert self.host.stdout
        self.host.stdout.close()
        self._map.close()
        self._file.close()


class Worker(threading.Thread):
    """A thread of the test with a row like the C programs'. ``step`` is one round; what it raises fails the soak."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.row = Progress()
        self.random = random.Random(f"{name} {seed}")
        self.done = threading.Event()
        self.failure: BaseException | None = None

    def step(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.done.is_set():
                self.step()
                self.row.rounds += 1
        except BaseException as e:
            self.failure = e

    def stop(self, limit_s: float) -> None:
        """The round that runs is the last one."""
        self.done.set()
        self.join(limit_s)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure:
            raise AssertionError(f"{self.name}: {self.failure!r}") from self.failure


class HotPlug(Worker):
    """A fourth device that comes and goes, a disk or a source of entropy: on every card in turn, one each ``PLUG_S``.

    A card with three devices has one interrupt vector left, so each card has a thread of its own and the next one
    begins while the last one is still leaving its card. When a start is due is fixed by the beginning alone: a round
    that takes longer delays the next start on its card, never the due times behind it.
    """

    def __init__(
        self, machine: Machine, seed: int, card: int, cards: int, where: Callable[[], object]
    ) -> None:
        super().__init__(f"hot-plug mic{card}", seed)
        self.control = Control(machine)
        self.card = f"mic{card}"
        self.folder = machine.run_dir / self.card
        self.image = machine.home / f"hot{card}.img"
        self.image.write_bytes(bytes(1 << 20))
        self.every = cards * PLUG_S
        self.begin = self.due = time.monotonic() + card * PLUG_S
        self.end = 0.0
        self.count = 0
        self.where = where  # the phase, for the report
        self.slowest = (0.0, "", "")  # seconds, operation, phase
        self.late: list[float] = []  # seconds behind the due time, of starts that missed it by a whole PLUG_S

    def step(self) -> None:
        # The soak's own pace: one device per tenth of a second.
        if self.done.wait(max(0.0, self.due - time.monotonic())):
            return
        if (behind := time.monotonic() - self.due) > PLUG_S:
            self.late.append(behind)
        self.due += self.every
        if self.random.random() < 0.5:
            self._timed("vop_add", kind="rng", options={})
            self._timed("vop_remove", device="rng")
        else:
            self._timed("vop_add", kind="block", options={"path": str(self.image), "name": "hot"})
            self._use()
            self._timed("vop_remove", device="hot")
            self._look()
        self.count += 1

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.end = time.monotonic()

    def _timed(self, op: str, **words: Any) -> None:
        phase, begin = str(self.where()), time.monotonic()
        self.control.ask(op, card=self.card, **words)
        self.slowest = max(self.slowest, (time.monotonic() - begin, f"{op} {self.card}", phase))

    def _use(self) -> None:
        self.at, self.data = self.random.randrange(256) * 4096, self.random.randbytes(4096)
        with NbdClient(str(self.folder / "vdb.nbd")) as nbd:
            nbd.sock.settimeout(30)
            nbd.go(b"vdb")
            assert nbd.call(WRITE, self.at, data=self.data)[0] == 0
            assert nbd.call(FLUSH)[0] == 0
            if nbd.call(READ, self.at, 4096) != (0, self.data):
                self.row.wrong += 1

    def _look(self) -> None:
        with self.image.open("rb") as f:
            f.seek(self.at)
            if f.read(4096) != self.data:
                self.row.wrong += 1
        self.row.bytes += 4096


class Dma(Worker):
    """Copies with verification over one channel of mic1, whose own software leaves it alone.

    In the part of its memory where the image was downloaded, which nobody uses after the boot (ARCHITECTURE.md).
    """

    AREA = range(0x0700_0000, 0x0800_0000)
    CHANNEL = 7

    def __init__(self, machine: Machine, seed: int) -> None:
        super().__init__("dma", seed)
        with Channel(connect_unix(str(machine.run_dir / "mic1" / "vop.sock"))) as channel:
            _, fds = channel.recv(10.0, "the card's descriptors")
        self.bus = Bus(fds[:FD_COUNT])
        self.pages = PageAllocator(self.bus.fds[lib.MIC_FD_GDDR], self.AREA.start, self.AREA.stop)
        self.channel = DmaChannel(self.bus, self.CHANNEL, DmaMemory(self.pages), ring_size=4096)
        self.src, self.dst = self.pages.alloc(COPY), self.pages.alloc(COPY)
        self.may_change = (
            False  # by a fault; row.torn counts the copies that are not right, row.errors the bytes
        )
        self.halted = False

    def step(self) -> None:
        data = self.random.randbytes(4096) * (COPY // 4096)
        self.bus.gddr.write(self.src, data)
        for _ in range(8):
            n = self.random.randrange(1, COPY // 64) * 64
            off = self.random.randrange(0, (COPY - n) // 64 + 1) * 64
            self._copy(off, n, data)

    def _copy(self, off: int, n: int, data: bytes) -> None:
        self.bus.gddr.write(self.dst + off, bytes(n))
        tx = self.channel.prep_memcpy(self.dst + off, self.src + off, n, INTERRUPT)
        assert tx
        cookie = tx.submit()
        self.channel.issue_pending()
        self.channel.sync_wait(cookie, 30.0)
        got = self.bus.gddr.read(self.dst + off, n)
        if got != data[off : off + n]:
            self.row.torn += 1
            self.row.errors += sum(a != b for a, b in zip(got, data[off : off + n], strict=True))
            if not self.may_change:
                self.row.wrong += 1
        self.row.bytes += n

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.halted = isinstance(self.failure, DmaError)

    def close(self) -> None:
        """Give the memory back."""
        self.channel.free(1.0)
        for at, _ in self.pages.used_areas():
            self.pages.free(at)
        self.bus.close()


def pace(plugs: Sequence[HotPlug]) -> tuple[float, str]:
    """Share of the due hot-plugs that were done, and the sentence about it."""
    rounds, late = sum(p.count for p in plugs), [s for p in plugs for s in p.late]
    due = sum(int((p.end - p.begin) / p.every) for p in plugs)
    seconds = max(p.end for p in plugs) - min(p.begin for p in plugs)
    return rounds / max(due, 1), (
        f"hot-plug: {rounds} devices in {seconds:.1f} s, one each {1e3 * seconds / max(rounds, 1):.1f} ms; {due} were due, "
        f"{len(late)} began more than {1e3 * PLUG_S:g} ms late (the worst {1e3 * max(late, default=0):.0f} ms); "
        + ", ".join(f"slowest {op} {s:.2f} s ({phase})" for s, op, phase in (p.slowest for p in plugs))
    )


def describe(rows: dict[str, Any]) -> str:
    """A table of all counters, for the report of a run."""
    return "\n".join(
        f"{name:<20} rounds {r.rounds:>8}  MiB {r.bytes / 2**20:>9.1f}  errors {r.errors:>6}  torn {r.torn:>6}  wrong {r.wrong}"
        for name, r in rows.items()
    )
