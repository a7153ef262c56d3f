"""Server and client over real SCIF nodes (COSM 5)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fabric import Fabric, eventually, fabric

from mic_emu import layout as L
from mic_emu.card.os.cosm import CosmClient
from mic_emu.clock import Clock
from mic_emu.cosm.states import State, Status
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.cosm_server import CosmServer
from mic_emu.scif.errors import ScifError
from mic_emu.testing.cosm import FakeOps, Records, message

S = State
CONNECT = (0, 201)


class Hosts:
    """Node 0 with a server and a device for each card but the last."""

    def __init__(self, fab: Fabric) -> None:
        self.fab = fab
        self.records = Records()
        clock = Clock("fast")
        self.devices = [CosmDevice(i, FakeOps(), clock, self.records.log) for i in range(len(fab.cards) - 1)]
        server = CosmServer.open(fab.host.open(), self.find, self.records.log)
        self.task = asyncio.ensure_future(server.serve())

    def find(self, index: int) -> CosmDevice | None:
        return self.devices[index] if 0 <= index < len(self.devices) else None


@asynccontextmanager
async def hosts(cards: int) -> AsyncIterator[Hosts]:
    async with fabric(cards) as fab:
        h = Hosts(fab)
        yield h
        h.task.cancel()
        for device in h.devices:
            await device.stop(force=True)


async def booted(h: Hosts, index: int) -> tuple[CosmDevice, CosmClient, asyncio.Task[None]]:
    device = h.devices[index]
    device.bootmode = "linux"
    await device.boot()
    client = CosmClient(h.fab.cards[index].node, Clock("fast"), h.records.log, lambda: None)
    task = asyncio.ensure_future(client.run())
    await eventually(lambda: device.state is S.ONLINE, "the card's connection")
    return device, client, task


async def test_cosm_41_42_port_201_and_24_byte_messages() -> None:
    """The layout of 5.2; a raw client on a card gets SYNC_TIME of 24 bytes first, and its status counts."""
    assert (L.COSM_MSG.size, message("SHUTDOWN_STATUS", 3)) == (24, bytes([3] + [0] * 7 + [3] + [0] * 15))
    assert [
        L.CONSTANTS[f"COSM_MSG_{n}"] for n in ("SHUTDOWN", "SYNC_TIME", "HEARTBEAT", "SHUTDOWN_STATUS")
    ] == [0, 1, 2, 3]
    async with hosts(2) as h:
        device = h.devices[0]
        device.bootmode = "linux"
        await device.boot()
        ep = h.fab.cards[0].node.open()
        await ep.connect(CONNECT)
        first = L.COSM_MSG.unpack(await ep.recv(24))
        assert first["id"] == 1
        await eventually(lambda: device.state is S.ONLINE, "online")
        await ep.send(message("SHUTDOWN_STATUS", Status.HALTED))
        await ep.close()
        await eventually(lambda: device.shutdown_status is Status.HALTED, "the status")


async def test_cosm_17_28_31_client_and_server_go_through_a_shutdown() -> None:
    """Real endpoints on both sides: online, message, status, hang-up."""
    async with hosts(2) as h:
        device, client, task = await booted(h, 0)
        await device.shutdown()
        await client.report(Status.POWEROFF)
        assert device.shutdown_status is Status.NOP
        await client.close()
        await eventually(lambda: device.shutdown_status is Status.POWEROFF, "the status")
        await task
        assert device.state is S.SHUTTING_DOWN


async def test_cosm_46_connection_of_a_node_without_a_card_is_closed() -> None:
    """From an unknown card and from node 0 itself: accepted, closed, nothing else happens, also while the first card is
    awaited."""
    async with hosts(2) as h:
        h.devices[0].bootmode = "linux"
        await h.devices[0].boot()
        for node in (h.fab.cards[1].node, h.fab.host):
            ep = node.open()
            await ep.connect(CONNECT)
            with pytest.raises(ScifError) as e:
                await ep.recv(1)
            assert e.value.errno == errno.ECONNRESET
            await ep.close()
        assert [(d.state, d.connected) for d in h.devices] == [(S.BOOTING, False)]


async def test_cosm_60_card_that_stops_in_the_middle_of_its_connection_holds_up_nobody() -> None:
    """Node 1 asks for a connection and never confirms the grant; node 2 comes online meanwhile."""
    async with hosts(3) as h:
        stuck = h.fab.cards[0].node
        stuck._handlers = {}  # it hears nothing any more
        ep = stuck.open()
        attempt = ep.start_connect(CONNECT, lambda _: None)
        await asyncio.sleep(0)
        device, _, task = await booted(h, 1)
        assert device.state is S.ONLINE
        task.cancel()
        attempt.fail(errno.EINTR)


async def test_cosm_54_lost_node_is_a_hang_up() -> None:
    """The link goes down without a word: the host's endpoint is closed, the state stays, reset works."""
    async with hosts(2) as h:
        device, _, task = await booted(h, 0)
        task.cancel()
        h.fab.cards[0].host_link.down()
        await eventually(lambda: not device.connected, "the hang-up")
        assert device.state is S.ONLINE
        await device.reset()
        await eventually(lambda: device.state is S.READY, "ready")
