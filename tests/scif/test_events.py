"""What a node waits for: served in any order, by turns with the rest of the loop; and answers that it expects."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fabric import eventually, fabric

from mic_emu._native import lib
from mic_emu.scif.events import Events
from mic_emu.scif.proto import Msg, Op

ANSWER = Msg(Op.NODE_REMOVE_ACK, (1, 0), (0, 0))  # nothing follows from it


def test_scif_3_3_an_expected_answer_needs_no_doorbell() -> None:
    """What nobody expects waits for the doorbell."""

    async def main() -> None:
        async with fabric(1) as fab:
            card, link = fab.cards[0], fab.cards[0].host_link
            card.card_link.ports.ring = lambda: None
            before = link.received
            card.card_link.send(ANSWER)
            for _ in range(3):
                await asyncio.sleep(0)
            assert link.received == before
            fab.host.events.expect()
            await eventually(lambda: link.received == before + 1, "the answer")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_scif_3_3_a_doorbell_that_a_filter_holds_back_is_missed() -> None:
    """The look would hide the fault; when the doorbell rings at last, the message is there."""

    async def main() -> None:
        async with fabric(1) as fab:
            card, link = fab.cards[0], fab.cards[0].host_link
            card.card_link.ports.ring = lambda: None
            link.ports.disturbed = lambda: True
            before = link.received
            card.card_link.send(ANSWER)
            fab.host.events.expect()
            for _ in range(3):
                await asyncio.sleep(0)
            assert link.received == before
            card.bus.ring_host(0)
            await eventually(lambda: link.received == before + 1, "the answer")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_scif_3_3_a_lost_link_is_looked_at_no_more() -> None:
    """Neither when it goes nor when the node does."""

    async def main() -> None:
        async with fabric(2) as fab:
            fab.cards[0].host_link.down()
            fab.host.events.expect()
            link = fab.cards[1].host_link
            before = link.received
            fab.cards[1].card_link.ports.ring = lambda: None
            fab.cards[1].card_link.send(Msg(Op.NODE_REMOVE_ACK, (2, 0), (0, 0)))
            await eventually(lambda: link.received == before + 1, "the other's answer")
            fab.host.events.expect()

    asyncio.run(asyncio.wait_for(main(), 20))


@contextmanager
def raised(count: int) -> Iterator[list[int]]:
    """Eventfds that are readable."""
    fds = [lib.mic_eventfd(os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(count)]
    try:
        for fd in fds:
            os.eventfd_write(fd, 1)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def run(body: Callable[[Events], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        events = Events()
        try:
            await body(events)
        finally:
            events.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_descriptor_that_another_handler_has_removed_is_not_served() -> None:
    """Its number may already be somebody else's."""

    async def body(events: Events) -> None:
        served = []

        def serve(fd: int, other: int) -> None:
            served.append(fd)
            events.remove(fd)
            events.remove(other)

        with raised(2) as (a, b):
            events.add(a, lambda: serve(a, b))
            events.add(b, lambda: serve(b, a))
            await eventually(lambda: served, "a handler")
            await asyncio.sleep(0)
            assert len(served) == 1

    run(body)


def test_a_handler_that_fails_costs_nobody_else_an_event() -> None:
    """Its own error is reported by the loop."""

    async def body(events: Events) -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        served = set()

        def fail(fd: int) -> None:
            events.remove(fd)
            raise ValueError("a defect")

        def serve(fd: int) -> None:
            events.remove(fd)
            served.add(fd)

        with raised(4) as fds:
            for fd in fds:
                events.add(fd, lambda fd=fd: (fail if fd in fds[::2] else serve)(fd))  # type: ignore[misc]
            await eventually(lambda: served == set(fds[1::2]), "the others")
            await eventually(lambda: len(errors) == 2, "both errors")

    run(body)


def test_one_that_is_always_ready_does_not_stop_the_loop() -> None:
    """The loop's other callbacks have their turn, and so have other descriptors."""

    async def body(events: Events) -> None:
        served = {}
        with raised(2) as fds:
            for fd in fds:
                served[fd] = 0
                events.add(fd, lambda fd=fd: served.update({fd: served[fd] + 1}))  # type: ignore[misc]
            for _ in range(3):
                await asyncio.sleep(0)
            await eventually(lambda: min(served.values()) > 1000, "both")
            for fd in fds:
                events.remove(fd)

    run(body)
