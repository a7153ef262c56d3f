"""What a node says when it refuses a window, and what the owner makes of it (SCIF 2.10, 3.3, docs/deviations.md)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

import pytest
from fabric import Card, Fabric, eventually, fabric

from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.records import MAX_SEGMENTS

PORT = 700


def run(body: Callable[[Fabric, Card, KernelEndpoint, KernelEndpoint], Awaitable[None]]) -> None:
    """``body`` with a card's endpoint connected to one of the host."""

    async def main() -> None:
        async with fabric(1) as fab:
            card = fab.cards[0]
            listener, ep = fab.host.open(), card.node.open()
            listener.bind(PORT)
            listener.listen()
            _, conn = await asyncio.gather(ep.connect((0, PORT)), listener.accept())
            await asyncio.wait_for(body(fab, card, ep, conn), 20)

    asyncio.run(main())


async def answer(card: Card, op: Op, msg: Msg) -> Msg:
    """What the host answers to ``msg``, which must be ``op``."""
    got: list[Msg] = []
    card.node.add_handler(op, lambda msg, link: got.append(msg))
    card.card_link.send(msg)
    await eventually(lambda: bool(got), f"{op.name}")
    return got[0]


def test_scif_3_3_alloc_rej_says_why() -> None:
    """p3 is ENOTCONN for an endpoint that is none, EINVAL for no pages, ENOMEM without room; p2 the request."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        ask = Msg(Op.ALLOC_REQ, (1, ep.port), (0, PORT), conn.id, 1, 4711)
        for why, msg in (
            (errno.ENOTCONN, ask._replace(p0=conn.id ^ 1)),
            (errno.EINVAL, ask._replace(p1=0)),
            (errno.EINVAL, ask._replace(p1=MAX_SEGMENTS + 1)),
        ):
            got = await answer(card, Op.ALLOC_REJ, msg)
            assert (got.p2, got.p3) == (4711, why)
        fab.host.allocator.alloc(fab.host.allocator.free_bytes)
        assert (await answer(card, Op.ALLOC_REJ, ask)).p3 == errno.ENOMEM

    run(body)


def test_scif_3_3_register_nack_says_why() -> None:
    """p3 is EINVAL for a record that is none, ENOTCONN for an endpoint that is none; p2 the window."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        ask = Msg(Op.REGISTER, (1, ep.port), (0, PORT), conn.id, 99, 4711)
        for why, msg in ((errno.EINVAL, ask), (errno.ENOTCONN, ask._replace(p0=conn.id ^ 1))):
            got = await answer(card, Op.REGISTER_NACK, msg)
            assert (got.p2, got.p3) == (4711, why)
        room = await answer(card, Op.ALLOC_GNT, Msg(Op.ALLOC_REQ, (1, ep.port), (0, PORT), conn.id, 1, 1))
        got = await answer(card, Op.REGISTER_NACK, ask._replace(p1=room.p0))  # nothing was written there
        assert (got.p2, got.p3) == (4711, errno.EINVAL)

    run(body)


@pytest.mark.parametrize("request_op", [Op.ALLOC_REQ, Op.REGISTER])
@pytest.mark.parametrize(
    ("why", "code"),
    [(0, errno.ENOMEM), (errno.EADDRINUSE, errno.ENOMEM), (errno.ENOTCONN, errno.ENOTCONN)],
)
def test_scif_3_3_what_the_owner_makes_of_it(request_op: Op, why: int, code: int) -> None:
    """Row 12 of 2.10 for ENOTCONN, row 11 for anything else: also for 0, of a peer that leaves p3 unused."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        refusal = Op.ALLOC_REJ if request_op == Op.ALLOC_REQ else Op.REGISTER_NACK

        def refuse(msg: Msg, link: object) -> None:
            fab.host.members.online[1].send(msg.answer(refusal)._replace(p3=why))

        fab.host.add_handler(request_op, refuse)
        ended: list[ScifError | None] = []
        window = ep.windows.reserve(0, 4096, 3, False)
        ep.windows.announce(window, [(card.node.window_allocator.alloc(4096), 4096)], ended.append)
        await eventually(lambda: bool(ended), "the end of the registration")
        assert ended[0] is not None
        assert ended[0].errno == code

    run(body)


def test_scif_84_a_registration_ends_when_the_peers_node_knows_the_window() -> None:
    """Not before: its program may use the window as soon as it is told of it."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        handle, held = fab.host._handlers[Op.REGISTER], list[Msg]()
        fab.host.add_handler(Op.REGISTER, lambda msg, link: held.append(msg))
        ended: list[ScifError | None] = []
        window = ep.windows.reserve(0, 4096, 3, False)
        ep.windows.announce(window, [(card.node.window_allocator.alloc(4096), 4096)], ended.append)
        await eventually(lambda: held, "the announcement")
        assert not ended
        handle(held[0], card.host_link)
        await eventually(lambda: ended == [None], "the end of the registration")
        conn.windows.map(window.offset, 4096, 3)

    run(body)


def test_scif_3_3_other_refusals_have_no_errno() -> None:
    """MARK_NACK and SIG_NACK leave p3 what it was: for signals it is the request."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        wrong = conn.id ^ 1
        mark = await answer(card, Op.MARK_NACK, Msg(Op.MARK, (1, ep.port), (0, PORT), wrong, 4711))
        assert (mark.p1, mark.p3) == (4711, 0)
        signal = Msg(Op.SIG_LOCAL, (1, ep.port), (0, PORT), conn.id, 0, 1, 4711)
        assert (await answer(card, Op.SIG_NACK, signal)).p3 == 4711
        refused = await answer(card, Op.CNCT_REJ, Msg(Op.CNCT_REQ, (1, ep.port), (0, PORT + 1), 4711, 4096))
        assert (refused.p0, refused.p1, refused.p3) == (4711, 4096, 0)

    run(body)


def test_scif_98_a_message_about_the_last_mapping_is_not_overtaken() -> None:
    """A peer that has unmapped may say so through the ring before its node's MUNMAP has come: the fixed range is
    free all the same, and taken while it is mapped."""

    async def body(fab: Fabric, card: Card, ep: KernelEndpoint, conn: KernelEndpoint) -> None:
        ended: list[ScifError | None] = []

        async def did(what: str) -> None:
            await eventually(lambda: bool(ended), what)
            assert ended.pop() is None

        run_of_pages = fab.host.pages.allocate(os.getpid(), 4096)
        held = fab.host.pages.hold(os.getpid(), [(run_of_pages, 4096)])
        conn.windows.announce(conn.windows.reserve(0, 4096, 3, True), held, ended.append)
        await did("the registration")
        ep.windows.map(0, 4096, 3)
        conn.windows.unregister(0, 4096, ended.append)
        await did("the unregistration")
        assert conn.windows.settle(0, 4096, ended.append)
        await did("the answer that it is mapped")
        with pytest.raises(ScifError) as taken:
            conn.windows.reserve(0, 4096, 3, True)
        assert taken.value.errno == errno.EADDRINUSE

        late: list[Msg] = []
        send = card.card_link.send

        def slow(msg: Msg) -> None:  # in order, but MUNMAP not before the next message
            if msg.op == Op.MUNMAP:
                late.append(msg)
                return
            while late:
                send(late.pop(0))
            send(msg)

        monkey = pytest.MonkeyPatch()
        monkey.setattr(card.card_link, "send", slow)
        try:
            ep.windows.unmap(0, 4096)
            assert late
            assert conn.windows.settle(0, 4096, ended.append)
            await did("the answer that it is free")
        finally:
            monkey.undo()
        conn.windows.abandon(conn.windows.reserve(0, 4096, 3, True))
        assert not conn.windows.settle(0, 4096, ended.append)

    run(body)
