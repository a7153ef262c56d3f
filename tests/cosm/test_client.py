"""The card's COSM client (COSM 5.4) against a fake node."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest

from mic_emu.card.os.cosm import CosmClient
from mic_emu.clock import ManualClock
from mic_emu.cosm.states import Status
from mic_emu.scif.errors import ScifError
from mic_emu.testing.cosm import FakeConnection, Records, message, settle

HEARTBEAT, SHUTDOWN_STATUS = 2, 3


class Endpoint(FakeConnection):
    """The client's endpoint; the test plays the host."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.clock)
        self.node = node

    async def connect(self, dst: tuple[int, int]) -> int:
        self.node.tried.append((self.clock.monotonic(), dst))
        if len(self.node.tried) <= self.node.refusals:
            raise ScifError(errno.ECONNREFUSED, "nobody listens")
        return 1088


class Node:
    def __init__(self, clock: ManualClock, refusals: int = 0) -> None:
        self.clock = clock
        self.refusals = refusals
        self.tried: list[tuple[float, tuple[int, int]]] = []
        self.made: list[Endpoint] = []

    def open(self) -> Endpoint:
        self.made.append(Endpoint(self))
        return self.made[-1]


class Card:
    def __init__(self, refusals: int = 0) -> None:
        self.clock = ManualClock()
        self.node = Node(self.clock, refusals)
        self.records = Records()
        self.powered_off = 0
        self.client = CosmClient(self.node, self.clock, self.records.log, self._power_off)  # type: ignore[arg-type]
        self.task = asyncio.ensure_future(self.client.run())

    def _power_off(self) -> None:
        self.powered_off += 1

    @property
    def sent(self) -> list[int]:
        return [m["id"] for m in self.node.made[-1].sent]


async def test_cosm_43_ten_attempts_one_second_apart_then_it_gives_up() -> None:
    """To node 0 port 201; the endpoints of failed attempts are closed."""
    card = Card(refusals=99)
    await card.clock.advance(60)
    assert [t for t, _ in card.node.tried] == pytest.approx(list(range(10)))
    assert {dst for _, dst in card.node.tried} == {(0, 201)}
    assert all(ep.closed for ep in card.node.made)
    assert card.task.done()


async def test_cosm_43_late_host_is_found_by_a_later_attempt() -> None:
    """The third attempt succeeds."""
    card = Card(refusals=2)
    await card.clock.advance(3)
    assert (len(card.node.tried), card.client.connected.is_set()) == (3, True)


async def test_cosm_44_heartbeat_every_30_s_when_idle() -> None:
    """One at 30, 60, 90 s."""
    card = Card()
    for n in range(1, 4):
        await card.clock.advance(29.8)
        assert card.sent == [HEARTBEAT] * (n - 1)
        await card.clock.advance(0.2)
        assert card.sent == [HEARTBEAT] * n


async def test_cosm_42_sync_time_is_answered_with_a_heartbeat_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the offset is kept, to the nanosecond; nobody's clock is changed."""
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000_100)
    card = Card()
    await settle()
    card.node.made[-1].say(message("SYNC_TIME", 7, 500))
    await settle()
    assert card.sent == [HEARTBEAT]
    assert card.client.clock_offset_ns == 2_000_000_400


async def test_cosm_28_shutdown_message_powers_off_in_order() -> None:
    """Id 0 reaches the kernel once per message."""
    card = Card()
    await settle()
    card.node.made[-1].say(message("SHUTDOWN"))
    await settle()
    assert card.powered_off == 1


async def test_cosm_31_32_status_leaves_before_the_endpoint_closes() -> None:
    """The reboot notifier's order."""
    card = Card()
    await settle()
    await card.client.report(Status.RESTART)
    ep = card.node.made[-1]
    assert (ep.sent[-1]["id"], ep.sent[-1]["value"], ep.closed) == (SHUTDOWN_STATUS, 4, False)
    await card.client.close()
    assert ep.closed


async def test_cosm_45_49_pieces_and_unknown_ids_from_the_host() -> None:
    """A message in two pieces with an unknown one before it."""
    card = Card()
    await settle()
    ep = card.node.made[-1]
    stream = message("HEARTBEAT").replace(b"\2", b"\x4d", 1) + message("SHUTDOWN")
    ep.say(stream[:30])
    await settle()
    assert card.powered_off == 0
    ep.say(stream[30:])
    await settle()
    assert card.powered_off == 1
    assert card.records.texts("warning") == ["unknown COSM message"]


async def test_cosm_48_host_that_closes_ends_the_client_quietly() -> None:
    """No heartbeat into a dead connection, no error."""
    card = Card()
    await settle()
    card.node.made[-1].hang_up()
    await settle()
    assert card.task.done()
    assert card.task.exception() is None
