"""Fault filters of the DMA engine: what stands above must survive a sick card."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest
from hwcard import MiB, RawChannel, memcpy_desc, new_card, rang, status_desc, wait_for

from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine, Fault, FaultKind
from mic_emu.layout import CONSTANTS as C


@pytest.fixture
def engine(bus: Bus) -> Iterator[DmaEngine]:
    with DmaEngine(bus) as e:
        yield e


def channel(bus: Bus, c: int = 4) -> RawChannel:
    ch = RawChannel(bus, c, 32 * MiB + c * 65536, 1024)
    ch.setup()
    return ch


def test_fault_corrupt_changes_one_byte(bus: Bus, engine: DmaEngine) -> None:
    """A corrupting filter flips bits of exactly one byte of what the descriptor wrote."""
    engine.add_fault(Fault(FaultKind.CORRUPT, count=1))
    data = os.urandom(4096)
    bus.gddr.write(0, data)
    ch = channel(bus)
    ch.go(memcpy_desc(0, MiB, 4096), memcpy_desc(0, 2 * MiB, 4096))
    ch.done()
    wrong = [i for i in range(4096) if bus.gddr.read(MiB + i, 1) != data[i : i + 1]]
    assert len(wrong) == 1
    assert bus.gddr.read(2 * MiB, 4096) == data  # the filter is spent
    assert [f.hits for f in engine.faults().values()] == [1]


def test_fault_fail_halts_only_its_channel(bus: Bus, engine: DmaEngine) -> None:
    """A failing filter halts the named channel with the given DCHERR bits."""
    engine.add_fault(Fault(FaultKind.FAIL, channels=(5,), param=C["DMA_ERR_MEMORY"]))
    bad, good = channel(bus, 5), channel(bus, 6)
    bad.go(status_desc(0x1000, 1))
    good.go(status_desc(0x1008, 2))
    assert bad.halted() == C["DMA_ERR_MEMORY"]
    good.done()
    assert (bus.gddr.load(0x1000, 8), bus.gddr.load(0x1008, 8)) == (0, 2)


def test_fault_skip_and_lost_interrupt(bus: Bus, engine: DmaEngine) -> None:
    """A skipped descriptor retires without effect; a lost interrupt leaves the count to be polled."""
    skip = engine.add_fault(Fault(FaultKind.SKIP, count=1))
    engine.add_fault(Fault(FaultKind.NO_INTERRUPT, count=2))
    ch = channel(bus)
    line = bus.irq_fd(C["CARD_IRQ_DMA"])
    ch.go(status_desc(0x1000, 1), status_desc(0x1008, 2, interrupt=True))
    ch.done()
    assert (bus.gddr.load(0x1000, 8), bus.gddr.load(0x1008, 8), rang(line)) == (0, 2, 0)
    engine.remove_fault(skip)
    ch.go(status_desc(0x1000, 3, interrupt=True))
    wait_for("interrupt", lambda: rang(line) == 1)


def test_fault_delay_slows_and_a_reset_cuts_it_short(bus: Bus, engine: DmaEngine) -> None:
    """A delay holds the channel; a card reset does not wait for it."""
    number = engine.add_fault(Fault(FaultKind.DELAY, count=1, param=50_000_000))
    ch = channel(bus)
    start = time.monotonic()
    ch.go(status_desc(0x1000, 1))
    ch.done()
    assert time.monotonic() - start >= 0.05
    engine.remove_fault(number)
    engine.add_fault(Fault(FaultKind.DELAY, param=3600 * 10**9))
    ch.go(status_desc(0x1000, 2))
    wait_for("the delay began", lambda: ch.active)
    start = time.monotonic()
    engine.reset()
    assert time.monotonic() - start < 5
    assert bus.gddr.load(0x1000, 8) == 1


def hits_of(seed: int) -> list[int]:
    with new_card(host=4096) as bus, DmaEngine(bus) as engine:
        engine.add_fault(Fault(FaultKind.SKIP, chance=0.25, seed=seed))
        ch = channel(bus)
        ch.go(*[status_desc(8 * n, 1) for n in range(400)])
        ch.done()
        return [n for n in range(400) if bus.gddr.load(8 * n, 8) == 0]


def test_fault_seed_decides(bus: Bus) -> None:
    """The same seed hits the same descriptors; the chance is about what was asked for."""
    assert hits_of(1) == hits_of(1) != hits_of(2)
    assert 50 < len(hits_of(3)) < 150


def test_fault_limits(bus: Bus, engine: DmaEngine) -> None:
    """Eight filters at most; nonsense is refused."""
    numbers = [engine.add_fault(Fault(FaultKind.SKIP, channels=())) for _ in range(8)]
    with pytest.raises(OSError, match="filter") as e:
        engine.add_fault(Fault(FaultKind.SKIP))
    assert e.value.errno == errno.ENOSPC
    for n in numbers:
        engine.remove_fault(n)
    with pytest.raises(OSError, match="filter") as e:
        engine.add_fault(Fault(FaultKind.FAIL))
    assert e.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="no such"):
        engine.add_fault(Fault(FaultKind.SKIP, channels=(8,)))
    with pytest.raises(KeyError):
        engine.remove_fault(0)
