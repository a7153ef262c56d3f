"""Fault filters of the DMA engine: what stands above must survive a sick card."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest
from hwcard import MiB, RawChannel, memcpy_desc, new_card, rang, status_desc, wait_for

from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.faults import FaultTable, parse
from mic_emu.layout import CONSTANTS as C


@pytest.fixture
def engine(bus: Bus) -> Iterator[DmaEngine]:
    with DmaEngine(bus) as e:
        yield e


@pytest.fixture
def faults(bus: Bus) -> FaultTable:
    return FaultTable(bus.faults)


def add(faults: FaultTable, kind: str, **words: object) -> int:
    """A filter by its words; its number."""
    return faults.install(parse({"kind": kind, **words}))


def channel(bus: Bus, c: int = 4) -> RawChannel:
    ch = RawChannel(bus, c, 32 * MiB + c * 65536, 1024)
    ch.setup()
    return ch


def test_fault_corrupt_changes_one_byte(bus: Bus, engine: DmaEngine, faults: FaultTable) -> None:
    """A corrupting filter flips bits of exactly one byte of what the descriptor wrote."""
    number = add(faults, "dma-corrupt", count=1)
    data = os.urandom(4096)
    bus.gddr.write(0, data)
    ch = channel(bus)
    ch.go(memcpy_desc(0, MiB, 4096), memcpy_desc(0, 2 * MiB, 4096))
    ch.done()
    wrong = [i for i in range(4096) if bus.gddr.read(MiB + i, 1) != data[i : i + 1]]
    assert len(wrong) == 1
    assert bus.gddr.read(2 * MiB, 4096) == data  # the filter is spent
    assert faults.counts(number).hits == 1


def test_fault_fail_halts_only_its_channel(bus: Bus, engine: DmaEngine, faults: FaultTable) -> None:
    """A failing filter halts the named channel with the given DCHERR bits."""
    add(faults, "dma-fail", channel=5, error="memory")
    bad, good = channel(bus, 5), channel(bus, 6)
    bad.go(status_desc(0x1000, 1))
    good.go(status_desc(0x1008, 2))
    assert bad.halted() == C["DMA_ERR_MEMORY"]
    good.done()
    assert (bus.gddr.load(0x1000, 8), bus.gddr.load(0x1008, 8)) == (0, 2)


def test_fault_skip_and_lost_interrupt(bus: Bus, engine: DmaEngine, faults: FaultTable) -> None:
    """A skipped descriptor retires without effect; a lost interrupt leaves the count to be polled."""
    skip = add(faults, "dma-skip", count=1)
    add(faults, "dma-lose-interrupt", count=2)
    ch = channel(bus)
    line = bus.irq_fd(C["CARD_IRQ_DMA"])
    ch.go(status_desc(0x1000, 1), status_desc(0x1008, 2, interrupt=True))
    ch.done()
    assert (bus.gddr.load(0x1000, 8), bus.gddr.load(0x1008, 8), rang(line)) == (0, 2, 0)
    faults.remove(skip)
    ch.go(status_desc(0x1000, 3, interrupt=True))
    wait_for("interrupt", lambda: rang(line) == 1)


def test_fault_delay_slows_and_a_reset_cuts_it_short(bus: Bus, engine: DmaEngine, faults: FaultTable) -> None:
    """A delay holds the channel; a card reset does not wait for it."""
    number = add(faults, "dma-delay", count=1, delay="50ms")
    ch = channel(bus)
    start = time.monotonic()
    ch.go(status_desc(0x1000, 1))
    ch.done()
    assert time.monotonic() - start >= 0.05
    faults.remove(number)
    add(faults, "dma-delay", delay="3600s")
    ch.go(status_desc(0x1000, 2))
    wait_for("the delay began", lambda: ch.active)
    start = time.monotonic()
    engine.reset()
    assert time.monotonic() - start < 60
    assert bus.gddr.load(0x1000, 8) == 1


def hits_of(seed: int) -> list[int]:
    with new_card(host=4096) as bus, DmaEngine(bus):
        add(FaultTable(bus.faults), "dma-skip", rate=0.25, seed=seed)
        ch = channel(bus)
        ch.go(*[status_desc(8 * n, 1) for n in range(400)])
        ch.done()
        return [n for n in range(400) if bus.gddr.load(8 * n, 8) == 0]


def test_fault_seed_decides(bus: Bus) -> None:
    """The same seed hits the same descriptors; the chance is about what was asked for."""
    assert hits_of(1) == hits_of(1) != hits_of(2)
    assert 50 < len(hits_of(3)) < 150


def test_fault_after_and_count_select_exactly(bus: Bus, engine: DmaEngine, faults: FaultTable) -> None:
    """after and count pick descriptors by number; what is spent acts no more."""
    number = add(faults, "dma-skip", channel=4, after=3, count=2)
    ch, other = channel(bus), channel(bus, 5)
    ch.go(*[status_desc(8 * n, 1) for n in range(10)])
    other.go(*[status_desc(0x1000 + 8 * n, 1) for n in range(10)])
    ch.done()
    other.done()
    assert [bus.gddr.load(8 * n, 8) for n in range(10)] == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    assert [bus.gddr.load(0x1000 + 8 * n, 8) for n in range(10)] == [1] * 10
    assert (faults.counts(number).seen, faults.counts(number).hits) == (10, 2)


def test_filters_act_in_the_order_in_which_they_were_added(
    bus: Bus, engine: DmaEngine, faults: FaultTable
) -> None:
    """Also after slots were reused: the number of a filter, not its place, decides."""
    gone = add(faults, "dma-skip", channel=7)
    first = add(faults, "dma-lose-interrupt", channel=4)
    faults.remove(gone)
    last = add(faults, "dma-skip", channel=4)  # lies in front of `first`
    assert gone < first < last
    assert list(faults.faults) == [first, last]
    ch = channel(bus)
    ch.go(status_desc(0x1000, 1, interrupt=True))
    ch.done()
    assert (faults.counts(first).hits, faults.counts(last).hits) == (1, 1)


def test_slow_link_takes_its_time_and_leaves_local_copies_alone(
    bus: Bus, engine: DmaEngine, faults: FaultTable
) -> None:
    """link: 1 MiB between host and card at 20 MB/s takes 50 ms; within GDDR it takes none of that."""
    for i in range(C["SMPT_ENTRIES"]):
        bus.write("smpt", i << 2, i)
    number = add(faults, "link", bandwidth="20M")
    ch = channel(bus)
    begin = time.monotonic()
    ch.go(*[memcpy_desc(C["SMPT_BASE"] + MiB, 8 * MiB, 256 << 10) for _ in range(4)])
    ch.done()
    assert time.monotonic() - begin >= 0.052
    assert faults.counts(number).hits == 4
    ch.go(memcpy_desc(MiB, 8 * MiB, 256 << 10))
    ch.done()
    assert faults.counts(number).hits == 4


def test_fault_limits(bus: Bus, faults: FaultTable) -> None:
    """31 filters at most; a removed one makes room."""
    numbers = [add(faults, "dma-skip", channel=0) for _ in range(C["FAULT_SLOTS"])]
    with pytest.raises(OSError, match="filters already") as e:
        add(faults, "dma-skip")
    assert e.value.errno == errno.ENOSPC
    faults.remove(numbers.pop())
    numbers.append(add(faults, "dma-skip"))
    for n in numbers:
        faults.remove(n)
    assert bus.faults.load(0, 4) == 0
    with pytest.raises(KeyError):
        faults.remove(numbers[0])
