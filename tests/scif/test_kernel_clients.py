"""Node and kernel clients: handshake, messages, ports, membership (two nodes in one process)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fabric import Fabric, eventually, fabric

from mic_emu import layout
from mic_emu.clock import Clock, ManualClock
from mic_emu.layout import SCIF_QP
from mic_emu.scif import ScifError
from mic_emu.scif import qp as queue
from mic_emu.scif.inspect import ask_tables
from mic_emu.scif.kernel import KernelEndpoint as Endpoint
from mic_emu.scif.node import Node
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.service import ScifService, listen_at
from mic_emu.scif.state import State


def run(body: Callable[[Fabric], Awaitable[None]], cards: int = 1, clock: Clock | None = None) -> None:
    async def main() -> None:
        async with fabric(cards, clock=clock) as fab:
            before = [n.used_bytes for n in fab.nodes]
            await asyncio.wait_for(body(fab), 20)
            if clock is None and len(fab.cards) == cards:

                def all_back() -> bool:
                    for n in fab.nodes:
                        n.queue_pairs.free_retired()
                    return all(n.used_bytes <= b for n, b in zip(fab.nodes, before, strict=True))

                if not any(n.endpoints for n in fab.nodes):  # the last word of a close may be under way
                    await eventually(all_back, "the endpoints' memory")

    asyncio.run(main())


async def pair(a: Node, b: Node, port: int = 300) -> tuple[Endpoint, Endpoint]:
    """A connection from ``a`` to ``b``: (connector, acceptor)."""
    listener = b.open()
    listener.bind(port)
    listener.listen(4)
    client = a.open()
    _, server = await asyncio.gather(client.connect((b.id, port)), listener.accept())
    await listener.close()
    return client, server


async def fails(code: int, what: Awaitable[object]) -> None:
    with pytest.raises(ScifError) as e:
        await what
    assert e.value.errno == code, e.value


ROUTES = [(0, 1), (1, 0), (0, 0), (1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize(("src", "dst"), ROUTES)
def test_scif_39_29_connections_between_all_kinds_of_nodes(src: int, dst: int) -> None:
    """SCIF-39: host, card, other card and loopback connect; connect returns the port accept reports."""

    async def body(fab: Fabric) -> None:
        a, b = fab.nodes[src], fab.nodes[dst]
        listener = b.open()
        assert listener.bind(200) == 200
        listener.listen(2)
        client = a.open()
        port, server = await asyncio.gather(client.connect((dst, 200)), listener.accept())
        assert server.peer == (src, port)
        data = os.urandom(20000)
        sent, got = await asyncio.gather(client.send(data), server.recv(len(data)))
        assert (sent, got) == (len(data), data)
        assert await server.send(b"back") == 4
        assert await client.recv(4) == b"back"
        await asyncio.gather(client.close(), server.close())
        await listener.close()

    run(body, cards=2)


def test_scif_30_connect_waits_for_accept() -> None:
    """SCIF-30: connect does not return before accept has run."""

    async def body(fab: Fabric) -> None:
        listener = fab.host.open()
        listener.bind(201)
        listener.listen(1)
        client = fab.cards[0].node.open()
        task = asyncio.ensure_future(client.connect((0, 201)))
        await eventually(lambda: listener.pending, "the request")
        assert await listener.poll(select.POLLIN, 1) == select.POLLIN
        assert not task.done()
        server = await listener.accept(sync=False)
        assert await task == client.port == server.peer[1]
        for ep in (client, server, listener):
            await ep.close()

    run(body)


def test_scif_33_refused_connect_keeps_the_port_and_may_retry() -> None:
    """SCIF-33: no listener: ECONNREFUSED, same port, a later connect succeeds."""

    async def body(fab: Fabric) -> None:
        client = fab.cards[0].node.open()
        await fails(errno.ECONNREFUSED, client.connect((0, 999)))
        assert client.state is State.BOUND
        port = client.port
        listener = fab.host.open()
        listener.bind(999)
        listener.listen(1)
        got, server = await asyncio.gather(client.connect((0, 999)), listener.accept())
        assert got == port == 1089
        for ep in (server, client, listener):
            await ep.close()

    run(body)


def test_scif_27_28_full_backlog_refuses_at_once() -> None:
    """SCIF-27: request n+1 is refused; SCIF-28: with backlog 0 every one is."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0].node
        for backlog in (0, 2):
            listener = fab.host.open()
            listener.bind(400)
            listener.listen(backlog)
            clients = [card.open() for _ in range(backlog + 1)]
            tasks = [asyncio.ensure_future(c.connect((0, 400))) for c in clients]
            await eventually(tasks[-1].done, "the refusal")
            await fails(errno.ECONNREFUSED, tasks[-1])
            assert not any(t.done() for t in tasks[:-1])
            await listener.close()
            for t in tasks[:-1]:
                await fails(errno.ECONNREFUSED, t)  # SCIF-38
            for c in clients:
                await c.close()

    run(body)


def test_scif_37_unanswered_connect_times_out_and_leaves_no_stale_request() -> None:
    """SCIF-37: nobody accepts for 30 s: ECONNREFUSED; a later accept finds nothing to take."""
    clock = ManualClock()

    async def body(fab: Fabric) -> None:
        listener = fab.host.open()
        listener.bind(401)
        listener.listen(5)
        client = fab.cards[0].node.open()
        task = asyncio.ensure_future(client.connect((0, 401)))
        await eventually(lambda: listener.pending, "the request")
        await clock.advance(29.9)
        await asyncio.sleep(0)
        assert not task.done()
        await clock.advance(0.2)
        await fails(errno.ECONNREFUSED, task)
        await eventually(lambda: not listener.pending, "the withdrawal")
        await fails(errno.EAGAIN, listener.accept(sync=False))

    run(body, clock=clock)


def test_scif_37_grant_of_a_withdrawn_request_does_not_hang() -> None:
    """SCIF-37: an accept that races with the withdrawal goes on to the next request."""

    async def body(fab: Fabric) -> None:
        card, listener = fab.cards[0].node, fab.host.open()
        listener.bind(402)
        listener.listen(5)
        first, second = card.open(), card.open()
        lost = asyncio.ensure_future(first.connect((0, 402)))
        await eventually(lambda: listener.pending, "the request")
        request = listener.pending[0]
        first.destroy()  # no withdrawal is sent
        lost.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await lost
        task = asyncio.ensure_future(second.connect((0, 402)))
        await eventually(lambda: len(listener.pending) == 2, "both requests")
        assert listener.pending[0] is request
        server = await listener.accept()
        assert server.peer[1] == await task
        for ep in (server, second, listener):
            await ep.close()

    run(body)


def test_scif_23_24_ephemeral_ports_lowest_first() -> None:
    """SCIF-23: 1089, 1090, reuse of the lowest; SCIF-24: none left is ENOSPC, from connect too."""

    async def body(fab: Fabric) -> None:
        a, b, c = fab.host.open(), fab.host.open(), fab.host.open()
        assert (a.bind(0), b.bind(0), c.bind(0)) == (1089, 1090, 1091)
        await a.close()
        await b.close()
        assert (fab.host.open().bind(0), fab.host.open().bind(0)) == (1089, 1090)
        taken = [fab.host.ports.take(0) for _ in range(65535 - 1091)]
        assert taken[-1] == 65535
        with pytest.raises(ScifError) as e:
            fab.host.open().bind(0)
        assert e.value.errno == errno.ENOSPC
        await fails(errno.ENOSPC, fab.host.open().connect((1, 5)))

    run(body)


def test_scif_25_22_a_listeners_port_stays_taken_while_an_accepted_endpoint_lives() -> None:
    """SCIF-25: the port is free only after listener and accepted endpoints are closed."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        with pytest.raises(ScifError) as e:
            fab.host.open().bind(300)
        assert e.value.errno == errno.EINVAL
        fab.cards[0].node.open().bind(300)  # another node, another space
        await client.close()
        assert server.state is State.DISCONNECTED
        with pytest.raises(ScifError) as e:
            fab.host.open().bind(300)  # held until it is closed, too
        assert e.value.errno == errno.EINVAL
        await server.close()
        assert fab.host.open().bind(300) == 300

    run(body)


def test_scif_21_26_35_wrong_states() -> None:
    """SCIF-21, 26, 35: bind, listen and connect in states that do not allow them."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        fresh = fab.host.open()
        for call, code in ((lambda: fresh.listen(1), errno.EINVAL), (lambda: client.bind(5), errno.EISCONN),
                           (lambda: client.listen(5), errno.EISCONN)):  # fmt: skip
            with pytest.raises(ScifError) as e:
                call()
            assert e.value.errno == code
        await fails(errno.EISCONN, client.connect((0, 300)))
        await server.close()
        await eventually(lambda: client.state is State.DISCONNECTED, "the disconnect")
        await fails(errno.EINVAL, client.connect((0, 300)))
        with pytest.raises(ScifError) as e:
            client.listen(1)
        assert e.value.errno == errno.EINVAL
        fresh.bind(7)
        fresh.listen(1)
        await fails(errno.EOPNOTSUPP, fresh.connect((1, 7)))
        await fails(errno.ENODEV, fresh.connect((9, 7)))
        await client.close()

    run(body)


def test_scif_poll_ends_by_its_time_out_and_by_cancellation() -> None:
    """poll with a time-out: 0 when the time has passed; a caller that is cancelled meanwhile is cancelled."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        assert await client.poll(select.POLLIN, 0.01) == 0
        caller = asyncio.ensure_future(client.poll(select.POLLIN, 60))
        await eventually(lambda: client._waiters, "the wait")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not client._waiters
        await asyncio.gather(client.close(), server.close())

    run(body)


def test_scif_58_63_exactly_4095_bytes_and_drain_after_close() -> None:
    """SCIF-58: 4095 bytes fit; SCIF-63: they can be read after the peer closed, then ECONNRESET."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        assert client.send_nowait(b"x" * 5000) == 4095
        assert client.send_nowait(b"x") == 0
        assert client.mask() == 0
        await client.close()
        assert server.mask() & select.POLLHUP
        assert server.recv_nowait(5000) == b"x" * 4095
        await fails(errno.ECONNRESET, server.recv(1))
        await fails(errno.ECONNRESET, server.send(b"x"))
        await server.close()

    run(body)


def test_scif_62_blocked_receiver_gets_what_came_before_the_close() -> None:
    """SCIF-62: recv(n) returns the k < n bytes that came, the next call ECONNRESET."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        task = asyncio.ensure_future(server.recv(100))
        await client.send(b"abc")
        await client.close()
        assert await task == b"abc"
        await fails(errno.ECONNRESET, server.recv(1))
        await server.close()

    run(body)


def test_scif_133_concurrent_close() -> None:
    """SCIF-133: both ends close at the same time, both return."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        await asyncio.gather(client.close(), server.close())
        assert not fab.host.endpoints
        assert not fab.cards[0].node.endpoints

    run(body)


def test_scif_131_129_132_node_loss_reaches_clients_then_endpoints() -> None:
    """SCIF-131: clients hear of the loss before endpoints end; SCIF-132: buffered data stays readable."""

    async def body(fab: Fabric) -> None:
        client, server = await pair(fab.cards[0].node, fab.host)
        seen: list[tuple[int, bool, State]] = []
        fab.host.on_peer(lambda n, on: seen.append((n, on, server.state)))
        listener = fab.host.open()
        listener.bind(50)
        listener.listen(1)
        held = fab.cards[0].node.open()
        held.bind(301)
        held.listen(1)
        pending = asyncio.ensure_future(fab.host.open().connect((1, 301)))
        await client.send(b"last words")
        blocked = asyncio.ensure_future(listener.accept())
        await eventually(lambda: held.pending and listener.accepts, "both calls wait")
        fab.cards[0].host_link.down()
        assert (1, False, State.CONNECTED) in seen
        assert server.state is State.DISCONNECTED
        await fails(errno.ENODEV, pending)
        assert await server.recv(50) == b"last words"
        await fails(errno.ECONNRESET, server.recv(1))
        assert not blocked.done()
        assert fab.host.node_ids() == [0]
        await fails(errno.ENODEV, fab.host.open().connect((1, 300)))
        blocked.cancel()

    run(body)


def test_scif_130_node_returns_and_new_connections_work() -> None:
    """SCIF-130: a node that comes back does not revive endpoints, new connections work."""

    async def body(fab: Fabric) -> None:
        from fabric import card_ports, host_ports

        card = fab.cards[0]
        client, server = await pair(card.node, fab.host)
        await card.card_link.stop()  # the card leaves in order
        assert client.state is State.DISCONNECTED
        assert server.state is State.DISCONNECTED
        assert card.page.card_addr == 0
        card.host_link.down()
        card.page.host_addr = 0
        card.host_link = fab.host.add_link(1, host_ports(card.bus, card.page))
        card.card_link = card.node.add_link(0, card_ports(card.bus, card.page))
        card.card_link.start()
        card.host_link.start()
        await eventually(
            lambda: fab.host.node_ids() == [0, 1] and card.node.node_ids() == [0, 1], "online again"
        )
        assert server.state is State.DISCONNECTED
        again = await pair(card.node, fab.host, 301)
        for ep in (*again, client, server):
            await ep.close()

    run(body)


def test_scif_125_card_learns_of_other_cards_and_their_loss() -> None:
    """SCIF-125: every node lists all online nodes ascending; a lost card vanishes everywhere."""

    async def body(fab: Fabric) -> None:
        assert [n.node_ids() for n in fab.nodes] == [[0, 1, 2, 3]] * 4
        await fab.cards[2].node.members.refresh_info()
        assert fab.cards[2].node.maxid == 3
        fab.cards[1].host_link.down()
        await eventually(lambda: fab.cards[0].node.node_ids() == [0, 1, 3], "node 2 removed")
        await eventually(lambda: fab.cards[2].node.node_ids() == [0, 1, 3], "node 2 removed")

    run(body, cards=3)


def test_scif_135_host_removes_a_silent_card_within_the_node_timeout() -> None:
    """SCIF-135: a card that does not answer EXIT is dropped after the node timeout."""
    clock = ManualClock()

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        with card.asleep():
            task = asyncio.ensure_future(card.host_link.stop())
            await asyncio.sleep(0)
            await clock.advance(29)
            await asyncio.sleep(0)
            assert not task.done()
            await clock.advance(2)
            await task
            assert fab.host.node_ids() == [0]

    run(body, clock=clock)


def test_scif_link_survives_rubbish_on_its_queue() -> None:
    """Unknown opcodes, unknown ids and wrong nodes are dropped; the link goes on."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        for op in (0, 999, *(int(o) for o in Op)):
            if op not in (Op.INIT, Op.EXIT):
                card.card_link.send(Msg(op, (1, 5), (0, 6), 0xDEAD, 2, 3, 4))
        card.card_link.send(Msg(Op.CNCT_REQ, (7, 5), (0, 6), 1, 2, 3, 4))
        sent = card.card_link.sent
        await eventually(lambda: card.host_link.received >= sent, "all read")
        assert card.host_link.dropped > 10
        client, server = await pair(card.node, fab.host)
        await asyncio.gather(client.close(), server.close())

    run(body)


def test_scif_link_survives_bad_indices_and_refuses_bad_queue_pairs(caplog: pytest.LogCaptureFixture) -> None:
    """A write index outside the ring and a request with a bad queue pair harm nobody."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        host_qp = card.host_link.qp
        assert host_qp is not None
        listener = fab.host.open()
        listener.bind(60)
        listener.listen(4)
        assert card.card_link.qp is not None
        for addr in (1 << 60, 0x8000000000, card.card_link.qp.offset + 128):
            card.card_link.send(Msg(Op.CNCT_REQ, (1, 5), (0, 60), 77, addr))
            await fails(errno.EIO, listener.accept())
        good = SCIF_QP.get(fab.host.memory, host_qp.offset, "local_write")
        SCIF_QP.put(fab.host.memory, host_qp.offset, "local_write", 0xFFFFFFFF)
        card.bus.ring_host(0)
        await eventually(lambda: "the queue from node 1 is damaged" in caplog.text, "a look at the bad index")
        assert fab.host.node_ids() == [0, 1]
        SCIF_QP.put(fab.host.memory, host_qp.offset, "local_write", good)
        client, server = await pair(card.node, fab.host)
        client_qp = client.qp
        assert client_qp is not None
        SCIF_QP.put(card.node.memory, client_qp.offset, "local_write", queue.EP_RING)
        await fails(errno.ECONNRESET, client.recv(1))
        await asyncio.gather(client.close(), server.close())

    run(body)


def test_scif_queue_pair_bytes_are_those_of_the_specification() -> None:
    """SCIF 3.2: magic at 0, indices at 128 and 192, addresses at 208-224; INIT is 44 bytes."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        qp = card.host_link.qp
        assert qp is not None
        raw = fab.host.memory.read(qp.offset, 256)
        assert int.from_bytes(raw[0:8], "little") == 0x5C1F000000005C1F
        assert int.from_bytes(raw[128:132], "little") == 44 * card.card_link.sent
        assert int.from_bytes(raw[192:196], "little") == 44 * card.host_link.sent
        smpt = layout.CONSTANTS["SMPT_BASE"]
        assert int.from_bytes(raw[208:216], "little") == smpt + qp.ring_offset
        assert int.from_bytes(raw[216:224], "little") == smpt + qp.offset
        first = fab.host.memory.read(qp.ring_offset, 44)
        assert first[0:4] == b"\1\0\0\0"
        assert first[8:12] == b"\1\0\0\0"

    run(body)


def test_scif_135_a_full_node_queue_is_retried_then_given_up() -> None:
    """SCIF 3.5: a queue that stays full for 3 s drops its messages; one that is read again loses none."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        count = 0x10000 // 44 + 100
        with card.asleep():
            for _ in range(count):
                card.host_link.send(Msg(Op.NODE_REMOVE_ACK, (0, 0), (1, 0)))
            before = card.card_link.received
        await eventually(lambda: card.card_link.received == before + count, "every message")
        assert card.host_link.dropped == 0
        assert not card.host_link.stuck

    run(body)


def test_scif_135_a_stuck_queue_fails_connects_with_enodev() -> None:
    """SCIF 2.4 row 12: the request cannot be queued: ENODEV, state Bound."""

    async def body(fab: Fabric) -> None:
        card = fab.cards[0]
        with card.asleep():
            for _ in range(0x10000 // 44 + 1):
                card.host_link.send(Msg(Op.NODE_REMOVE_ACK, (0, 0), (1, 0)))
            client = fab.host.open()
            await fails(errno.ENODEV, client.connect((1, 5)))
            assert client.state is State.BOUND
            assert card.host_link.stuck

    run(body, clock=Clock("fast", program=0.02))


def test_scif_tables_of_any_length_are_shown(tmp_path: Path) -> None:
    """SCIF 3.8: two thousand endpoints do not fit into a packet."""

    async def body(fab: Fabric) -> None:
        service = ScifService(fab.host, listen_at(tmp_path / "node0.sock"))
        service.start()
        endpoints = [fab.host.open() for _ in range(2000)]
        shown = await asyncio.to_thread(ask_tables, tmp_path / "node0.sock")
        assert len(shown["endpoints"]) == len(endpoints)
        for ep in endpoints:
            await ep.close()
        await service.close()

    run(body, cards=0)


def test_scif_58_61_a_program_that_was_not_asked_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """SCIF-58, 61: programs tell a kernel client of bytes or room only after it asked. What happens between its
    look and its question is seen, not waited for."""

    async def body(fab: Fabric) -> None:
        a, b = await pair(fab.host, fab.cards[0].node)
        assert a._rings is not None
        assert b._rings is not None
        there, here = a._rings, b._rings  # `there` acts as a program would: without a message to the node
        want_room, drained = here.want_room, here.drained

        def read_first() -> None:
            there.take(4096)
            want_room()

        def write_first() -> None:
            monkeypatch.setattr(here, "drained", drained)
            there.put(b"late")
            drained()

        monkeypatch.setattr(here, "want_room", read_first)
        assert b.send_nowait(bytes(4095)) == 4095
        assert await asyncio.wait_for(b.send(b"x"), 5) == 1
        assert b.send_nowait(bytes(4094)) == 4094
        assert await asyncio.wait_for(b.poll(select.POLLOUT), 5) == select.POLLOUT
        monkeypatch.setattr(here, "drained", write_first)
        assert await asyncio.wait_for(b.recv(4), 5) == b"late"
        monkeypatch.setattr(here, "drained", write_first)
        assert await asyncio.wait_for(b.poll(select.POLLIN), 5) == select.POLLIN
        assert b.recv_nowait(9) == b"late"
        there.take(4096)
        await asyncio.gather(a.close(), b.close())

    run(body)
