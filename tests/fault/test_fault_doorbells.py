"""Doorbells that are lost, late or doubled; the filters' memory itself."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest
from hwcard import new_card, rang

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import Bus
from mic_emu.faults import FaultTable, parse
from mic_emu.memory import View

C = L.CONSTANTS
NET, DISK = 24, 200  # targets: offsets in the device page


@pytest.fixture
def bus() -> Iterator[Bus]:
    with new_card(host=1 << 20) as b:
        b.write("mxar", 1 << C["SRC_DOORBELL"], 0)
        b.write("sice0", 1 << C["SRC_DOORBELL"])
        yield b


@pytest.fixture
def clock(bus: Bus) -> Iterator[None]:
    """The board's thread that rings late doorbells."""
    ptr = lib.mic_fault_clock_start(bus.ptr)
    assert ptr != ffi.NULL
    yield
    lib.mic_fault_clock_stop(ptr)


def add(bus: Bus, target: int = C["FAULT_ANY"], **words: object) -> tuple[FaultTable, int]:
    table = FaultTable(bus.faults)
    return table, table.install(parse(words), target)


def rings_within(fd: int, seconds: float) -> float | None:
    """Seconds until the line rings (taken), None: it does not."""
    begin = time.monotonic()
    if not select.select([fd], [], [], seconds)[0]:
        return None
    assert rang(fd) == 1
    return time.monotonic() - begin


@pytest.mark.parametrize("direction", ["to-card", "to-host", "both"])
def test_drop_acts_in_its_direction(bus: Bus, direction: str) -> None:
    """A dropped doorbell is not there; the next one is: a consumer misses nothing but the time."""
    table, number = add(bus, kind="doorbell-drop", direction=direction, count=2)
    heard = []
    for _ in range(3):
        bus.ring_card(3)
        bus.ring_host(0)
        heard.append((rang(bus.irq_fd(3)), rang(bus.vector_fd(0))))
    lost = {
        "to-card": [(0, 1), (0, 1), (1, 1)],
        "to-host": [(1, 0), (1, 0), (1, 1)],
        "both": [(0, 0), (1, 1), (1, 1)],
    }
    assert heard == lost[direction]
    assert table.counts(number).hits == 2


def test_a_device_s_filter_leaves_the_others_alone(bus: Bus) -> None:
    """Only doorbells of the device that is meant, hand-shakes and SCIF not; an absent device: nobody's."""
    table, number = add(bus, target=NET, kind="doorbell-drop")
    for source, there in ((NET, 0), (DISK, 1), (C["FAULT_TARGET_SCIF"], 1), (0, 1)):
        bus.ring_card(3, source)
        assert rang(bus.irq_fd(3)) == there
    table.aim(number, 0)
    bus.ring_card(3, NET)
    assert rang(bus.irq_fd(3)) == 1


def test_delay_is_late_and_holds_nobody_up(bus: Bus, clock: None) -> None:
    """The ringer goes on at once; the doorbell arrives after the delay, in both directions."""
    table, number = add(bus, kind="doorbell-delay", delay="3600s")
    bus.ring_card(4)
    bus.ring_host(0)
    assert (rang(bus.irq_fd(4)), rang(bus.vector_fd(0))) == (0, 0)
    bus.hw_reset()
    table.remove(number)
    add(bus, kind="doorbell-delay", delay="300ms")
    bus.write("mxar", 1 << C["SRC_DOORBELL"], 0)
    bus.write("sice0", 1 << C["SRC_DOORBELL"])
    begin = time.monotonic()
    bus.ring_card(3)
    bus.ring_host(0)
    for fd in (bus.irq_fd(3), bus.vector_fd(0)):
        assert rings_within(fd, 20) is not None
        assert time.monotonic() - begin >= 0.3


def test_duplicate_rings_now_and_again(bus: Bus, clock: None) -> None:
    """One ring at once, a second one after the delay, no third."""
    add(bus, kind="doorbell-duplicate", delay="20ms")
    bus.ring_card(9)
    assert rang(bus.irq_fd(9)) == 1
    assert rings_within(bus.irq_fd(9), 20) is not None
    assert rings_within(bus.irq_fd(9), 0.1) is None


def test_hw_52_a_reset_forgets_late_doorbells_and_keeps_filters(
    bus: Bus, request: pytest.FixtureRequest
) -> None:
    """HW-52: doorbells on their way die with a reset; the filter is no part of the card."""
    table, number = add(bus, kind="doorbell-delay", delay="50ms", direction="to-card")
    bus.ring_card(3)
    bus.hw_reset()
    request.getfixturevalue("clock")  # only now could anybody ring it
    assert rings_within(bus.irq_fd(3), 0.15) is None
    bus.ring_card(3)
    assert rings_within(bus.irq_fd(3), 20) is not None
    assert table.counts(number).hits == 2


def test_more_late_doorbells_than_places_ring_at_once(bus: Bus) -> None:
    """Nobody rings late ones here: after 256 the rest is not lost but early."""
    add(bus, kind="doorbell-delay", delay="1s")
    for _ in range(C["FAULT_LATE_SLOTS"]):
        bus.ring_card(3)
    assert rang(bus.irq_fd(3)) == 0
    bus.ring_card(3)
    assert rang(bus.irq_fd(3)) == 1


def sequence(seed: int, rate: float = 0.3) -> str:
    """Which of 400 doorbells get through."""
    with new_card(host=4096) as bus:
        add(bus, kind="doorbell-drop", rate=rate, seed=seed)
        heard = []
        for _ in range(400):
            bus.ring_card(3)
            heard.append(str(rang(bus.irq_fd(3))))
        return "".join(heard)


def test_the_seed_decides_and_the_rate_holds() -> None:
    """The same seed drops the same doorbells, another one others; the rate is about what was asked for."""
    assert sequence(1) == sequence(1) != sequence(2)
    assert 80 < sequence(3).count("0") < 160
    assert "0" not in sequence(1, 0.0)
    assert "1" not in sequence(1, 1.0)


def test_filters_of_one_point_stack(bus: Bus) -> None:
    """The first one drops, so the second one does not see the event."""
    table, first = add(bus, kind="doorbell-drop", after=1, count=1)
    second = table.install(parse({"kind": "doorbell-drop", "direction": "both", "rate": 0}))
    for _ in range(3):
        bus.ring_card(1)
    assert (table.counts(first).seen, table.counts(second).seen) == (3, 2)


def test_a_hit_tells_the_host_once_until_it_listens_again(bus: Bus) -> None:
    """However many hits there are, the line rings once per look."""
    table, number = add(bus, kind="doorbell-drop")
    line = bus.fds[lib.MIC_FD_FAULT_HIT]
    for _ in range(100):
        bus.ring_card(1)
    assert (rang(line), table.counts(number).hits) == (1, 100)
    bus.ring_card(1)
    assert rang(line) == 0
    table.listen_again(number)
    bus.ring_card(1)
    assert rang(line) == 1


def test_garbage_in_the_filters_memory_harms_nobody(bus: Bus, clock: None) -> None:
    """Whatever a card writes there: every point answers, in bounded time."""
    effects = [e for e in range(C["FAULT_LINK"] + 2) if e not in (C["FAULT_HANG"], C["FAULT_KILL"])]
    for n in range(50):
        bus.faults.write(0, os.urandom(bus.faults.size))
        for slot in range(C["FAULT_SLOTS"]):  # but nobody is to kill this process
            at = C["FAULT_FIRST"] + slot * L.FAULT_FILTER.size
            L.FAULT_FILTER.put(bus.faults, at, "effect", effects[(n // 2 + slot) % len(effects)])
            L.FAULT_FILTER.put(bus.faults, at, "ways", 0xFFFFFFFF)
            L.FAULT_FILTER.put(bus.faults, at, "target", C["FAULT_ANY"])
            if n % 2:  # the ends of the ranges, where arithmetic breaks
                L.FAULT_FILTER.put(bus.faults, at, "param0", (0, 1, 2**64 - 1)[slot % 3])
                L.FAULT_FILTER.put(bus.faults, at, "param1", (0, 1, 2**64 - 1)[slot // 3 % 3])
                for name, value in (("chance", 1 << 32), ("after", 0), ("count", 0)):
                    L.FAULT_FILTER.put(bus.faults, at, name, value)
        bus.faults.store(0, 4, 0xFFFFFFFF)
        verdict = ffi.new("struct mic_fault_verdict *")
        for point in range(C["FAULT_POINTS"]):
            event = ffi.new(
                "struct mic_fault_event *", {"point": point, "target": 1, "way": 1, "toward": 1, "bytes": 64}
            )
            lib.mic_fault_judge(bus.ptr, event, verdict)
        begin = time.monotonic()
        bus.ring_card(3)
        bus.ring_host(0)
        lib.mic_fault_drops_heartbeat(bus.ptr)
        assert time.monotonic() - begin < 20
    bus.faults.write(0, bytes(bus.faults.size))
    rang(bus.irq_fd(3))
    bus.ring_card(3)
    assert rings_within(bus.irq_fd(3), 20) is not None


def test_a_card_without_filters_works(bus: Bus) -> None:
    """Descriptor -1: a bus of somebody who knows nothing of faults."""
    fds = [-1 if i == lib.MIC_FD_FAULTS else os.dup(fd) for i, fd in enumerate(bus.fds)]
    ptr = lib.mic_bus_attach(ffi.new("int[]", fds))
    assert ptr != ffi.NULL
    lib.mic_ring_card(ptr, 2, 0)
    assert rang(bus.irq_fd(2)) == 1
    assert View(lib.mic_bus_faults(ptr), 8).load(0, 4) == 0
    lib.mic_bus_detach(ptr)
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def test_removal_rings_what_was_lost_once(bus: Bus) -> None:
    """Each doorbell that was dropped rings once when the host says so; a reset forgets them."""
    table, number = add(bus, kind="doorbell-drop")
    for _ in range(3):
        bus.ring_card(3)
        bus.ring_card(9)
        bus.ring_host(0)
    table.remove(number)
    assert [rang(fd) for fd in (bus.irq_fd(3), bus.irq_fd(9), bus.vector_fd(0))] == [0, 0, 0]
    lib.mic_fault_ring_lost(bus.ptr)
    assert [rang(fd) for fd in (bus.irq_fd(3), bus.irq_fd(9), bus.irq_fd(4), bus.vector_fd(0))] == [
        1,
        1,
        0,
        1,
    ]
    lib.mic_fault_ring_lost(bus.ptr)
    assert rang(bus.irq_fd(3)) == 0
    table, number = add(bus, kind="doorbell-drop")
    bus.ring_card(3)
    bus.hw_reset()
    table.remove(number)
    lib.mic_fault_ring_lost(bus.ptr)
    assert rang(bus.irq_fd(3)) == 0
