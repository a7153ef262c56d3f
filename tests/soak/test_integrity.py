"""Everything at full load with verification, a device that comes and goes, one fault at a time.

Zero wrong bytes, zero leaks, zero hangs. A failure names the seed and the phase; MICEMU_SOAK_SEED repeats it,
MICEMU_SOAK_SECONDS sets the length of the long run.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import pytest
from drill import Control, Holdings
from phases import LAST, PHASES, Contract, Phase, shuffled
from workers import MAY_FAIL, MAY_TEAR, NAMES, STREAMS, Dma, HotPlug, Load, Progress, Worker, describe, pace

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
SECONDS = float(os.environ.get("MICEMU_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("MICEMU_SOAK_SEED", "1"))
CARDS = 4  # mic0 and mic1 have the load; each card with its three devices has room for one more
KEPT = 0.95  # of the hot-plugs that were due, in the long run
STUCK_S = 60.0  # without a single round of a worker: it hangs
FIRST_USE = [p for p in PHASES if p.kind == "disk-delay"]  # a backend keeps the timer that it makes then
DISK_MAY = {Contract.DISK_FAILS: MAY_FAIL, Contract.DISK_TEARS: MAY_TEAR}


class Soak:
    """The machine, its load, and the phase of the moment."""

    def __init__(self, machine: Machine, seed: int, plugged: int) -> None:
        """``plugged``: how many cards take turns at the hot-plug."""
        self.machine, self.seed = machine, seed
        self.control = Control(machine)
        self.phase: object = "no fault yet"
        self.number = 0
        self.hits: dict[str, int] = {}
        self.kept = 0.0  # share of the due hot-plugs, known at the end
        self.load = Load(machine, seed)
        self.plugs = [HotPlug(machine, seed, i, plugged, lambda: self.phase) for i in range(plugged)]
        self.dma = Dma(machine, seed)
        self.threads: tuple[Worker, ...] = (*self.plugs, self.dma)
        for thread in self.threads:
            thread.start()

    # --- looking ----------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Progress]:
        return self.load.progress() | {t.name: Progress(**vars(t.row)) for t in self.threads}

    def where(self) -> str:
        return f"seed {self.seed}, phase {self.number} ({self.phase})"

    def check(self) -> dict[str, Progress]:
        """Nobody died, nothing is wrong."""
        rows = self.rows()
        wrong = [name for name, row in rows.items() if row.wrong]
        failed = [f"{t.name}: {t.failure!r}" for t in self.threads if t.failure and not self.dma.halted]
        if wrong or failed or not self.load.alive:
            raise AssertionError(
                f"{self.where()}: wrong bytes: {wrong or 'none'}; failed: {failed or 'none'}; the programs "
                f"{'live' if self.load.alive else 'ended'} and said:\n{self.load.said()}\n{describe(rows)}"
            )
        return rows

    def everybody_moves(self, names: tuple[str, ...] = (*NAMES, "dma")) -> None:
        """Each worker ends two rounds from now on: what it began before is behind it. Of the hot-plugs, which pause, one."""
        before = self.check()
        rounds = dict.fromkeys(names, 2) | {plug.name: 1 for plug in self.plugs}

        def waiting() -> list[str]:
            now = self.check()
            return [name for name, n in rounds.items() if now[name].rounds < before[name].rounds + n]

        deadline = time.monotonic() + STUCK_S
        while stuck := waiting():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{self.where()}: no progress within {STUCK_S:g} s: {', '.join(stuck)}\n{describe(self.rows())}"
                )
            # The soak's own pace: counters of other processes, where no descriptor tells of a change.
            time.sleep(0.02)

    # --- phases -----------------------------------------------------------------------------------------

    def run(self, phase: Phase, seconds: float) -> None:
        """The fault comes, works for a while, and goes; its contract holds all the time."""
        self.number, self.phase = self.number + 1, phase
        before = self.check()
        self.load.allow(DISK_MAY.get(phase.contract, 0))
        self.dma.may_change = phase.contract in (Contract.DMA_CHANGES, Contract.DMA_SKIPS)
        seed = {} if phase.kind == "link" else {"seed": self.seed * 1000 + self.number}
        words = {"kind": phase.kind, **phase.words, **seed}
        number = self.control.ask("fault_add", card=phase.card, words=words)["id"]
        end = time.monotonic() + seconds
        if phase.contract is not Contract.STALL:
            self.everybody_moves()
        while time.monotonic() < end:
            self.check()
            time.sleep(0.05)  # the soak's own pace: how long a fault lasts
        removed = self.control.ask("fault_remove", card=phase.card, ids=[number])["removed"]
        hits = int(removed[str(number)])
        self.hits[str(phase)] = self.hits.get(str(phase), 0) + hits
        self.everybody_moves()
        self._contract(phase, hits, before)
        self.load.allow(0)
        self.dma.may_change = False

    def _contract(self, phase: Phase, hits: int, before: dict[str, Progress]) -> None:
        now = self.check()

        def grown(what: Callable[[Progress], int], names: tuple[str, ...]) -> int:
            return sum(what(now[n]) - what(before[n]) for n in names)

        disks = tuple(n for n in NAMES if n.startswith("disk"))
        seen = {
            Contract.DISK_FAILS: grown(lambda r: r.errors, disks),
            Contract.DISK_TEARS: grown(lambda r: r.torn, disks),
            Contract.DMA_CHANGES: grown(lambda r: r.errors, ("dma",)),
            Contract.DMA_SKIPS: grown(lambda r: r.torn, ("dma",)),
        }.get(phase.contract)
        if seen is None:
            return
        # The disk's requests are ours alone, so each hit is seen once. Of a channel's descriptors some only
        # report, and two may hit one copy.
        exact = phase.contract in DISK_MAY
        assert seen == hits if exact else seen <= hits, f"{self.where()}: {hits} hits were seen {seen} times"

    def halt_the_channel(self) -> None:
        """dma-fail: EIO for its owner, nothing for anybody else; a reset of the card mends the channel."""
        self.number, self.phase = self.number + 1, LAST
        words = {"kind": LAST.kind, **LAST.words}
        self.control.ask("fault_add", card=LAST.card, words=words)
        eventually(lambda: not self.dma.is_alive(), STUCK_S, f"{self.where()}: the halt of the channel")
        assert self.dma.halted, f"{self.where()}: {self.dma.failure!r}"
        assert self.dma.channel.halted
        self.everybody_moves(NAMES)

    # --- the end ----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everybody ends well; what was sent has arrived; the image has what the disk was told."""
        self.phase = "the end"
        for plug in self.plugs:
            plug.done.set()
        for plug in self.plugs:
            plug.stop(STUCK_S)
        self.load.stop(2 * STUCK_S)
        self.dma.close()
        rows = self.rows()
        self.kept, said = pace(self.plugs)
        print(describe(rows), said, sep="\n")
        assert [n for n, r in rows.items() if r.wrong] == [], f"{self.where()}\n{self.load.said()}"
        for stream, (one, other) in itertools.product(STREAMS, (("host", "card"), ("card", "host"))):
            sent, got = rows[f"{stream} from {one}"].bytes, rows[f"{stream} at {other}"].bytes
            assert sent == got, f"{self.where()}: {stream}: {sent} bytes sent by the {one}, {got} arrived"

    def abandon(self) -> None:
        """A failed run: nothing of it is left behind."""
        for thread in self.threads:
            thread.done.set()
        self.load.kill()


def idle(machine: Machine, control: Control, before: Holdings | None = None) -> Holdings:
    """What the instance holds without load; the ends of programs and devices take a moment."""
    deadline = time.monotonic() + STUCK_S
    last: Holdings | None = None
    calm = 0
    while True:
        why: object = "the instance does not come to rest"
        try:
            status = control.ask("status")["status"]
            now = Holdings(machine, status, everybody=True)
            shells = sum(p.rstrip().endswith("sh -i") for p in now.processes)
            assert shells == len(status["cards"]), (
                f"{shells} shells on the consoles"
            )  # the load took one's place
            if before:
                now.check(before)
                return now
            same = last and (now.processes, now.descriptors) == (last.processes, last.descriptors)
            calm = calm + 1 if same else 0
            if calm == 10:
                return now
            last = now
        except (AssertionError, FileNotFoundError) as e:  # a descriptor may go while we look at it
            why = e
        assert time.monotonic() < deadline, f"within {STUCK_S:g} s: {why}"
        # The soak's own pace: ten equal looks in a row, one second.
        time.sleep(0.1)


def integrity(machine: Machine, seed: int, seconds: float, each_s: float, cards: int, plugged: int) -> float:
    """The whole run; returns the share of the due hot-plugs that were done."""
    machine.env["HOME"] = str(machine.home)  # the console's shell has nothing to do but start
    status = machine.boot("-n", str(cards))
    if status["cards"][0]["net"] not in ("ns", "tap"):
        pytest.skip(
            "the cards have no network of their own here: no TCP, and no host side to run programs in"
        )
    control = Control(machine)
    warm = Soak(machine, seed, plugged)  # what is made once, at the first use, is no leak
    try:
        warm.everybody_moves()
        for phase in FIRST_USE:
            warm.run(phase, 0.1)
        warm.dma.stop(STUCK_S)
        warm.finish()
    except BaseException:
        warm.abandon()
        raise
    files = sorted(p.name for p in machine.run_dir.rglob("*"))
    before = idle(machine, control)
    soak = Soak(machine, seed, plugged)
    try:
        soak.everybody_moves()
        begin = time.monotonic()
        for n, phase in enumerate(shuffled(seed)):
            if time.monotonic() - begin > seconds and n >= len(PHASES):
                break
            soak.run(phase, each_s)
        soak.halt_the_channel()
        soak.finish()
    except BaseException:
        soak.abandon()
        raise
    print(
        f"{soak.number} phases; hits:",
        *(f"  {hits:>8} {phase}" for phase, hits in soak.hits.items()),
        sep="\n",
    )
    idle(machine, control, before)
    assert seconds == 0 or all(soak.hits.values()), "a fault that never acted proves nothing"
    assert sorted(p.name for p in machine.run_dir.rglob("*")) == files
    machine.micemu("reset", "mic1")
    machine.micemu("boot", "mic1")
    after = Soak(machine, seed + 1, plugged)  # the channel that halted works again
    try:
        after.everybody_moves()
        after.dma.stop(STUCK_S)
        after.finish()
    except BaseException:
        after.abandon()
        raise
    return soak.kept


@pytest.mark.timeout(300)
def test_integrity_under_load_hot_plug_and_faults(machine: Machine) -> None:
    """Every fault once, for a moment."""
    integrity(machine, SEED, 0, 0.2, cards=2, plugged=2)


@pytest.mark.soak
@pytest.mark.timeout(24 * 3600)
def test_integrity_for_ten_minutes(machine: Machine) -> None:
    """Every fault many times, in random order."""
    kept = integrity(machine, SEED, SECONDS, 3.0, cards=CARDS, plugged=CARDS)
    assert kept >= KEPT, (
        f"all bytes were right, but only {kept:.0%} of the hot-plugs were done that were due, one each 100 ms: this machine "
        "is too slow for the load, or too busy with others"
    )
