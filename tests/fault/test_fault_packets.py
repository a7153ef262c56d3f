"""Frames that are lost, doubled, late or out of order: both native loops between packet sockets."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator

import pytest
from netwire import Wire, eventually, frames

from mic_emu.faults import FaultTable, parse
from mic_emu.testing.rings import EVENT_IDX, INDIRECT_DESC
from mic_emu.virtio import net

MODERN = net.MODERN_FEATURES | EVENT_IDX | INDIRECT_DESC
OTHER = {"host": "card", "card": "host"}
DIRECTION = {"host": "to-card", "card": "to-host"}  # of what this side sends


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire(MODERN) as w:
        yield w


def add(wire: Wire, kind: str, **words: object) -> tuple[FaultTable, int]:
    table = FaultTable(wire.rig.rig.bus.faults)
    return table, table.install(parse({"kind": kind, **words}))


def arrived(wire: Wire, side: str, want: int) -> list[bytes]:
    """The ``want`` frames that are still to come, and those behind them that nobody expects."""
    sock = wire.host if side == "host" else wire.card
    got = []
    while select.select([sock], [], [], 0.1 if len(got) >= want else 20)[0]:
        got.append(wire.recv(side))
    return got


def send_all(wire: Wire, side: str, sent: list[bytes], want: Callable[[], int] | None = None) -> list[bytes]:
    """Send frames one after the other while taking what arrives at the other side, ``want`` in all."""
    got = []
    for frame in sent:
        wire.send(side, frame)
        other = wire.host if side == "card" else wire.card
        while select.select([other], [], [], 0)[0]:
            got.append(wire.recv(OTHER[side]))
    return got + arrived(wire, OTHER[side], (want() if want else len(sent)) - len(got))


def left_over(table: FaultTable, number: int, sent: int) -> int:
    """How many of ``sent`` frames a filter has let pass, once it has seen all."""
    eventually(lambda: table.counts(number).seen == sent, "the filter to see every frame")
    return sent - table.counts(number).hits


@pytest.mark.parametrize("side", ["host", "card"])
def test_loss_takes_its_share_and_spoils_nothing(wire: Wire, side: str) -> None:
    """What arrives is byte exact and in order; what is missing are the hits; the other way is well."""
    table, number = add(wire, "packet-loss", rate=0.3, seed=5, direction=DIRECTION[side])
    sent = list(frames([60 + n for n in range(200)]))
    got = send_all(wire, side, sent, lambda: left_over(table, number, 200))
    counts = table.counts(number)
    assert got == [f for f in sent if f in set(got)]
    assert (counts.seen, counts.hits) == (200, 200 - len(got))
    assert 30 < counts.hits < 90
    back = list(frames([100] * 5, seed=2))
    assert send_all(wire, OTHER[side], back) == back


def test_the_same_seed_loses_the_same_frames() -> None:
    """Which of 100 frames arrive depends on the seed alone."""
    runs = []
    for seed in (7, 7, 8):
        with Wire(MODERN) as wire:
            table, number = add(wire, "packet-loss", rate=0.5, seed=seed, direction="to-card")
            sent = list(frames([80 + n for n in range(100)]))
            got = send_all(wire, "host", sent, lambda t=table, n=number: left_over(t, n, 100))  # type: ignore[misc]
            runs.append([sent.index(f) for f in got])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("side", ["host", "card"])
def test_duplicate(wire: Wire, side: str) -> None:
    """The frames that are meant arrive twice."""
    add(wire, "packet-duplicate", after=1, count=2, direction=DIRECTION[side])
    a, b, c, d = frames([100] * 4)
    assert sorted(send_all(wire, side, [a, b, c, d], lambda: 6)) == sorted([a, b, b, c, c, d])


@pytest.mark.parametrize("side", ["host", "card"])
def test_delay_is_latency_not_throughput(wire: Wire, side: str) -> None:
    """Twenty frames sent at once arrive in order, all of them, 50 ms later, not one after the other."""
    add(wire, "packet-delay", delay="50ms", direction=DIRECTION[side])
    sent = list(frames([200] * 20))
    begin = time.monotonic()
    for frame in sent:
        wire.send(side, frame)
    assert wire.recv(OTHER[side]) == sent[0]
    assert time.monotonic() - begin >= 0.05
    assert arrived(wire, OTHER[side], 19) == sent[1:]


@pytest.mark.parametrize("side", ["host", "card"])
def test_reorder_lets_others_by(wire: Wire, side: str) -> None:
    """The second frame arrives after the two that follow it; one that nobody follows arrives all the same."""
    table, number = add(wire, "packet-reorder", after=1, count=1, gap=2, direction=DIRECTION[side])
    a, b, c, d = frames([100] * 4)
    assert send_all(wire, side, [a, b, c, d]) == [a, c, d, b]
    table.remove(number)
    add(wire, "packet-reorder", gap=2, direction=DIRECTION[side])
    assert send_all(wire, side, [a]) == [a]


@pytest.mark.parametrize("side", ["host", "card"])
def test_slow_link_is_slow_and_loses_nothing(wire: Wire, side: str) -> None:
    """400 KB at 2 MB/s take 0.2 s; every frame arrives, in order, however fast they are sent."""
    add(wire, "link", bandwidth="2M", latency="1ms")
    sent = list(frames([1000] * 400))
    begin = time.monotonic()
    got = send_all(wire, side, sent)
    assert time.monotonic() - begin >= 0.2
    assert got == sent


def test_frames_in_waiting_go_on_when_the_filter_is_removed(wire: Wire) -> None:
    """Removing a delay loses none of the frames that it holds."""
    table, number = add(wire, "packet-delay", delay="200ms", direction="to-host")
    sent = list(frames([100] * 10))
    for frame in sent:
        wire.send("card", frame)
    deadline = time.monotonic() + 20
    while table.counts(number).hits < 10:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.001)
    table.remove(number)
    assert arrived(wire, "host", 10) == sent


def test_filters_come_and_go_under_load(wire: Wire) -> None:
    """Delays and duplicates added and removed between frames: every frame arrives, and none is mixed up."""
    sent = list(frames([64 + n % 1400 for n in range(600)]))
    got: list[bytes] = []
    table = FaultTable(wire.rig.rig.bus.faults)
    number = 0
    for n, frame in enumerate(sent):
        if n % 5 == 0:
            if number:
                table.remove(number)
            kind = ("packet-delay", "packet-duplicate", "packet-reorder")[n % 3]
            extra = {"delay": "300us"} if kind == "packet-delay" else {}
            number = table.install(parse({"kind": kind, "rate": 0.5, "seed": n, **extra}))
        wire.send("host", frame)
        while select.select([wire.card], [], [], 0)[0]:
            got.append(wire.recv("card"))
    got += arrived(wire, "card", len(set(sent) - set(got)))
    assert set(got) == set(sent)
