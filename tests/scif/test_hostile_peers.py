"""A hostile card: what it says in the name of others, or describes wrongly, harms nobody but itself (SCIF 3.3)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

import pytest
from fabric import Card, Fabric, eventually, fabric

from mic_emu.scif import ScifError
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import Window
from mic_emu.scif.records import HEAD, MAGIC, SEGMENT
from mic_emu.scif.state import State

PORT, PAGE = 700, 4096
LIAR = (1, 9)


def run(body: Callable[[Fabric, Card, KernelEndpoint, KernelEndpoint], Awaitable[None]]) -> None:
    """``body`` with card 1, which lies, and a connection between the host and card 2: its two ends."""

    async def main() -> None:
        async with fabric(2) as fab:
            listener, theirs = fab.host.open(), fab.nodes[2].open()
            listener.bind(PORT)
            listener.listen()
            _, ours = await asyncio.gather(theirs.connect((0, PORT)), listener.accept())
            await listener.close()
            await asyncio.wait_for(body(fab, fab.cards[0], ours, theirs), 20)

    asyncio.run(main())


async def say(card: Card, *lies: Msg) -> None:
    """The host has read them all."""
    for lie in lies:
        card.card_link.send(lie)
    want = card.card_link.sent
    await eventually(lambda: card.host_link.received >= want, "the last message")


async def answer(card: Card, op: Op, msg: Msg) -> Msg:
    """What the host answers to ``msg``, which must be ``op``."""
    got: list[Msg] = []
    card.node.add_handler(op, lambda msg, link: got.append(msg))
    card.card_link.send(msg)
    await eventually(lambda: got, op.name)
    return got[0]


async def registered(ep: KernelEndpoint, offset: int) -> Window:
    """A window of one page, which the peer knows."""
    node, ended, pid = ep.node, list[ScifError | None](), os.getpid()
    held = node.pages.hold(pid, [(node.pages.allocate(pid, PAGE), PAGE)])
    window = ep.windows.reserve(offset, PAGE, 3, True)
    ep.windows.announce(window, held, ended.append)
    await eventually(lambda: ended, "the registration")
    assert ended == [None]
    return window


def test_scif_3_3_a_stranger_ends_no_connection_and_no_node() -> None:
    """DISCNCT for a connection of others, in its own name and in theirs; NODE_REMOVE, which is the host's to say."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        lie = Msg(Op.DISCNCT, LIAR, (0, PORT), theirs.id, ours.id)
        await say(liar, lie, lie._replace(src=(2, theirs.port)), Msg(Op.NODE_REMOVE, LIAR, (0, 0), 2))
        assert ours.state is State.CONNECTED
        assert fab.host.node_ids() == [0, 1, 2]
        await theirs.send(b"still here")
        assert await ours.recv(10) == b"still here"
        assert ours.qp is not None
        pages = ours.qp.offset
        await ours.close()
        await say(liar, lie)  # the peer may write there until it has closed, too
        fab.host.queue_pairs.free_retired()
        assert pages in dict(fab.host.allocator.used_areas())

    run(body)


def test_scif_3_3_a_stranger_decides_no_connect() -> None:
    """CNCT_GNT and CNCT_REJ for a request to another card."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        listener, client = fab.nodes[2].open(), fab.host.open()
        listener.bind(800)
        listener.listen()
        connecting = asyncio.ensure_future(client.connect((2, 800)))
        await eventually(lambda: listener.pending, "the request")
        for op in (Op.CNCT_REJ, Op.CNCT_GNT):
            await say(liar, Msg(op, LIAR, (0, client.port), client.id, PAGE, 4711))
            assert client.state is State.CONNECTING
        server = await listener.accept()
        assert await connecting == server.peer[1]

    run(body)


def test_scif_3_3_a_stranger_ends_no_close() -> None:
    """DISCNCT_ACK for another card's connection: close still waits until the peer has let go."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        with fab.cards[1].asleep():
            closing = asyncio.ensure_future(ours.close())
            await eventually(lambda: ours.state is State.CLOSING, "the message to the peer")
            await say(liar, Msg(Op.DISCNCT_ACK, LIAR, (0, PORT), ours.id))
            for op in (Op.CLIENT_SENT, Op.CLIENT_RCVD):
                await say(liar, Msg(op, LIAR, (0, PORT), ours.id))
            assert ours.id in fab.host.endpoints
            assert not closing.done()
            assert liar.host_link.dropped == 3
        await closing

    run(body)


def test_scif_3_3_a_stranger_confirms_no_accept() -> None:
    """CNCT_GNTACK and CNCT_GNTNACK for another card's request."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        listener, client = fab.host.open(), fab.nodes[2].open()
        listener.bind(800)
        listener.listen()
        connecting = asyncio.ensure_future(client.connect((0, 800)))
        await eventually(lambda: listener.pending, "the request")
        fab.cards[1].fall_asleep()
        accepting = asyncio.ensure_future(listener.accept())
        granted = lambda: [e for e in fab.host.endpoints.values() if e.state is State.CONNECTING]  # noqa: E731
        await eventually(granted, "the grant")
        (conn,) = granted()
        for op in (Op.CNCT_GNTACK, Op.CNCT_GNTNACK):
            await say(liar, Msg(op, LIAR, (0, 800), conn.id))
            assert conn.state is State.CONNECTING
        fab.cards[1].wake_up()
        assert await accepting is conn
        await connecting

    run(body)


def test_scif_3_3_a_stranger_reaches_no_window() -> None:
    """Neither those that others have announced to us nor ours that others use."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        live, mapped, ended = await registered(ours, 0), await registered(ours, 0x10000), list[object]()
        await registered(theirs, 0)
        theirs.windows.map(0x10000, PAGE, 3)
        ours.windows.unregister(0x10000, PAGE, ended.append)
        await eventually(lambda: ended, "the unregistration")
        assert mapped.lingering
        (remote,) = ours.windows.remote
        await say(liar, Msg(Op.UNREGISTER, LIAR, (0, PORT), remote.id, remote.peer_id))
        await say(liar, Msg(Op.MUNMAP, LIAR, (0, PORT), mapped.id))
        for _ in range(10):  # nothing of it is under way
            await asyncio.sleep(0)
        assert remote.alive
        assert mapped.lingering
        with pytest.raises(ScifError) as taken:
            ours.windows.reserve(0x10000, PAGE, 3, True)
        assert taken.value.errno == errno.EADDRINUSE
        assert (
            await answer(liar, Op.ALLOC_REJ, Msg(Op.ALLOC_REQ, LIAR, (0, PORT), ours.id, 1, 1))
        ).p3 == errno.ENOTCONN
        for op in (Op.SIG_LOCAL, Op.SIG_REMOTE):
            await answer(liar, Op.SIG_NACK, Msg(op, LIAR, (0, PORT), ours.id, 0, 0x4711, 1))
        await answer(liar, Op.MARK_NACK, Msg(Op.MARK, LIAR, (0, PORT), ours.id, 1))
        await answer(liar, Op.WAIT_NACK, Msg(Op.WAIT, LIAR, (0, PORT), ours.id, 1, 1))
        assert fab.host.memory.read(live.segments[0][0], 8) == bytes(8)

    run(body)


def test_scif_3_3_a_stranger_answers_no_question() -> None:
    """The keys of questions can be guessed; only who was asked may answer. A false grant would have us write."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        fab.cards[1].fall_asleep()
        ended: list[ScifError | None] = []
        pages = fab.host.pages.hold(os.getpid(), [(fab.host.pages.allocate(os.getpid(), PAGE), PAGE)])
        ours.windows.announce(ours.windows.reserve(0, PAGE, 3, True), pages, ended.append)
        (key,) = fab.host.questions._open
        await say(liar, Msg(Op.ALLOC_GNT, LIAR, (0, PORT), 4711, 0x200000, key))
        await say(liar, Msg(Op.ALLOC_REJ, LIAR, (0, PORT), 0, 0, key))
        assert list(fab.host.questions._open) == [key]
        assert not any(fab.nodes[2].memory.read(0x200000, HEAD.size))
        fab.cards[1].wake_up()
        await eventually(lambda: ended == [None], "the answer of who was asked")

    run(body)


def record(
    offset: int = 0, length: int = PAGE, places: tuple[tuple[int, int], ...] = (), **wrong: int
) -> bytes:
    """What describes a window."""
    head = HEAD.pack(wrong.get("magic", MAGIC), offset, length, 3, wrong.get("count", len(places)), 0, 0, 0)
    return head + b"".join(SEGMENT.pack(*place) for place in places)


def test_scif_3_3_a_record_that_describes_no_window_is_refused() -> None:
    """Each field is checked, and each page lies in the windows of the card that announces it."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        card = fab.cards[1]
        page = card.node.window_allocator.alloc(2 * PAGE)
        bank_end = page - page % (64 << 20) + (64 << 20)

        async def register(op: Op, data: bytes) -> Msg:
            room = await answer(
                card, Op.ALLOC_GNT, Msg(Op.ALLOC_REQ, (2, theirs.port), (0, PORT), ours.id, 2, 1)
            )
            await say(
                liar, Msg(Op.FREE_VIRT, LIAR, (0, PORT), ours.id, room.p0, 4711, Op.REGISTER)
            )  # not theirs
            card.card_link.peer_view(room.p1, len(data)).write(0, data)
            return await answer(
                card, op, Msg(Op.REGISTER, (2, theirs.port), (0, PORT), ours.id, room.p0, 4711)
            )

        good = ((page, PAGE),)
        for data in (
            record(places=good, magic=MAGIC ^ 1),
            record(places=good, count=1 << 40),
            record(places=good, count=3),
            record(places=good, length=2 * PAGE),
            record(places=()),
            record(places=((page, PAGE // 2), (page + PAGE, PAGE // 2))),
            record(places=((page + 64, PAGE),)),
            record(places=((page, 1 << 63), (page, (1 << 63) + PAGE))),
            record(offset=64, places=good),
            record(offset=1 << 63, places=good),
            record(length=0, places=()),
            record(places=((PAGE, PAGE),)),  # its log and rings
            record(places=((bank_end, PAGE),)),
            record(places=((1 << 63, PAGE),)),
        ):
            assert (await register(Op.REGISTER_NACK, data)).p3 == errno.EINVAL
            assert not len(ours.windows.remote)
        await register(Op.REGISTER_ACK, record(places=good))
        assert [w.segments for w in ours.windows.remote] == [[(page, PAGE)]]

    run(body)


def test_scif_3_3_a_record_belongs_to_one_connection() -> None:
    """What was granted for one endpoint is of no use to another one of the same card."""

    async def body(fab: Fabric, liar: Card, ours: KernelEndpoint, theirs: KernelEndpoint) -> None:
        card, listener, second = fab.cards[1], fab.host.open(), fab.nodes[2].open()
        listener.bind(800)
        listener.listen()
        _, other = await asyncio.gather(second.connect((0, 800)), listener.accept())
        room = await answer(card, Op.ALLOC_GNT, Msg(Op.ALLOC_REQ, (2, theirs.port), (0, PORT), ours.id, 1, 1))
        data = record(places=((card.node.window_allocator.alloc(PAGE), PAGE),))
        card.card_link.peer_view(room.p1, len(data)).write(0, data)
        said = await answer(
            card, Op.REGISTER_NACK, Msg(Op.REGISTER, (2, second.port), (0, 800), other.id, room.p0, 1)
        )
        assert said.p3 == errno.EINVAL
        assert not len(other.windows.remote)

    run(body)
