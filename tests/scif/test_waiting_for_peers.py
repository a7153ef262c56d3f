"""Calls that wait for a peer's node, and what ends them when it is lost, withdraws or comes (SCIF-37, 129, 131)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fabric import Card, Fabric, card_ports, eventually, fabric, host_ports
from scif_server import Server

from mic_emu.scif import ScifError
from mic_emu.scif.kernel import POLLHUP, POLLIN, KernelEndpoint
from mic_emu.scif.state import State
from mic_emu.testing.machine import eventually as until

PORT = 700


def run(body: Callable[[Fabric, Card, KernelEndpoint], Awaitable[None]]) -> None:
    """``body`` with a card, and a listener of the host."""

    async def main() -> None:
        async with fabric(1) as fab:
            listener = fab.host.open()
            listener.bind(PORT)
            listener.listen()
            await asyncio.wait_for(body(fab, fab.cards[0], listener), 20)

    asyncio.run(main())


async def fails(code: int, what: Awaitable[object]) -> None:
    with pytest.raises(ScifError) as e:
        await what
    assert e.value.errno == code, e.value


async def granted(fab: Fabric) -> None:
    """Until the host has granted a request, and waits for the connector's confirmation."""
    await eventually(
        lambda: any(e.state is State.CONNECTING for e in fab.host.endpoints.values()), "the grant"
    )


def test_scif_37_a_grant_that_comes_after_the_withdrawal_is_given_back() -> None:
    """The connector gave up while the grant was under way: accept goes on with the next request."""

    async def body(fab: Fabric, card: Card, listener: KernelEndpoint) -> None:
        first, second = card.node.open(), card.node.open()
        lost = asyncio.ensure_future(first.connect((0, PORT)))
        await eventually(lambda: listener.pending, "the request")
        card.fall_asleep()
        accepting = asyncio.ensure_future(listener.accept())
        await granted(fab)
        lost.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await lost
        card.wake_up()
        port, server = await asyncio.gather(second.connect((0, PORT)), accepting)
        assert server.peer == (1, port)
        assert first.state is State.BOUND  # it may try again
        for ep in (first, second, server):
            await ep.close()

    run(body)


def test_scif_129_accept_that_waits_for_a_lost_connector_is_enodev() -> None:
    """SCIF 3.7: the node goes between grant and confirmation."""

    async def body(fab: Fabric, card: Card, listener: KernelEndpoint) -> None:
        connecting = asyncio.ensure_future(card.node.open().connect((0, PORT)))
        await eventually(lambda: listener.pending, "the request")
        card.fall_asleep()
        accepting = asyncio.ensure_future(listener.accept())
        await granted(fab)
        card.host_link.down()
        await fails(errno.ENODEV, accepting)
        assert listener.state is State.LISTENING
        connecting.cancel()

    run(body)


def test_scif_129_requests_of_a_lost_node_are_gone() -> None:
    """SCIF 3.7: nobody is told of them any more; the listener serves the other nodes."""

    async def body(fab: Fabric, card: Card, listener: KernelEndpoint) -> None:
        connecting = asyncio.ensure_future(card.node.open().connect((0, PORT)))
        assert await listener.poll(POLLIN) == POLLIN
        card.host_link.down()
        assert listener.mask() == 0
        await fails(errno.EAGAIN, listener.accept(sync=False))
        client = fab.host.open()
        port, server = await asyncio.gather(client.connect((0, PORT)), listener.accept())
        assert server.peer == (0, port)
        connecting.cancel()
        await asyncio.gather(client.close(), server.close())

    run(body)


def test_scif_131_a_node_can_be_connected_to_as_soon_as_clients_hear_of_it() -> None:
    """The callback itself connects, the first time and when the node has returned."""

    async def body(fab: Fabric, card: Card, listener: KernelEndpoint) -> None:
        there = card.node.open()
        there.bind(PORT)
        there.listen()
        heard: list[bool] = []
        clients: list[KernelEndpoint] = []
        ended: list[ScifError | None] = []

        def on_peer(node: int, online: bool) -> None:
            if node == 1:
                heard.append(online)
                if online:
                    clients.append(fab.host.open())
                    clients[-1].start_connect((1, PORT), ended.append)

        fab.host.on_peer(on_peer)
        await there.accept()
        await eventually(lambda: ended == [None], "the first connection")
        await card.card_link.stop()
        card.host_link.down()
        card.page.host_addr = 0
        card.host_link = fab.host.add_link(1, host_ports(card.bus, card.page))
        card.card_link = card.node.add_link(0, card_ports(card.bus, card.page))
        card.card_link.start()
        card.host_link.start()
        accepted = await there.accept()
        await eventually(lambda: ended == [None, None], "the second connection")
        assert heard == [True, False, True]
        assert accepted.peer == (0, clients[1].port)

    run(body)


OWNER = """
import sys
from mic_emu import scif
l = scif.Endpoint(); l.bind(4000); l.listen()
kept = []
while len(kept) < 7:
    conn, _ = l.accept()
    kept.append((conn, conn.register(scif.alloc(4096), 0)))
    conn.send(b"r")
sys.stdin.read()
"""
USER = """
import errno, json, sys, threading
from mic_emu import scif
def connected():
    while True:
        ep = scif.Endpoint()
        try:
            ep.connect((1, 4000))
            ep.recv(1)
            return ep
        except scif.ScifError as e:
            assert e.errno == errno.ECONNREFUSED, e
            ep.close()
a, b, c, d, e, f, g = [connected() for _ in range(7)]
window, mark, fresh = b.register(scif.alloc(4096)), d.fence_mark(2), scif.Endpoint()
print("ready", flush=True); sys.stdin.readline()
ends = {}
def call(name, function, *args):
    try:
        ends[name] = function(*args)
    except scif.ScifError as x:
        ends[name] = errno.errorcode[x.errno]
calls = {
    "register": (a.register, scif.alloc(4096)), "unregister": (window.unregister,), "mark": (c.fence_mark, 2),
    "wait": (d.fence_wait, mark), "signal": (e.fence_signal, 0, 0, 0, 1, 0x12), "connect": (fresh.connect, (1, 4000)),
    "send": (f.send, bytes(100000)), "recv": (g.recv, 10), "poll": (scif.poll, [(g, 1)]),
}
threads = [threading.Thread(target=call, args=(name, *what)) for name, what in calls.items()]
[t.start() for t in threads]
while scif.poll([(f, 4)], 0) != [0]: pass
print("blocked", flush=True)
[t.join() for t in threads]
print(json.dumps(ends), flush=True)
"""


def test_scif_129_calls_that_are_blocked_when_the_node_is_lost(tmp_path: Path) -> None:
    """SCIF 3.7, the column of blocked calls, of a program on the host whose peers' card has stopped answering."""
    server = Server(tmp_path, 1)
    env = [{**server.env(), "MICEMU_SCIF_SOCKET": str(tmp_path / f"node{n}.sock")} for n in (0, 1)]
    pipe = subprocess.PIPE

    def waiting() -> tuple[int, int]:
        """Questions to the card, and endpoints with a queue pair."""
        state = server.ask("state")
        assert isinstance(state, list)
        return state[0]["questions"], state[0]["slots"]

    with (
        subprocess.Popen([sys.executable, "-c", OWNER], env=env[1], stdin=pipe) as owner,
        subprocess.Popen(
            [sys.executable, "-c", USER], env=env[0], stdin=pipe, stdout=pipe, text=True
        ) as user,
    ):
        try:
            assert user.stdin is not None
            assert user.stdout is not None
            assert user.stdout.readline() == "ready\n"
            server.ask("freeze 1")
            user.stdin.write("\n")
            user.stdin.flush()
            assert user.stdout.readline() == "blocked\n"
            until(
                lambda: waiting() == (5, 8),
                20,
                "register, unregister, mark, wait, signal and connect ask the card",
            )
            server.ask("down 1")
            assert json.loads(user.stdout.readline()) == {
                "register": "ENODEV", "unregister": "ENODEV", "mark": "ENODEV", "wait": "ENODEV", "signal": "ENODEV",
                "connect": "ENODEV", "send": 4095, "recv": "ECONNRESET", "poll": [POLLHUP],
            }  # fmt: skip
        finally:
            owner.kill()
            user.kill()
    assert server.stop() == 0
