"""The tools' services of a card over real SCIF nodes: ports, privileged clients, requests that do not fit (COSM 13.2, 13.3)."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fabric import fabric

from mic_emu.card.os.tools import ToolServers
from mic_emu.cosm import tools_proto as P
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.node import Node
from mic_emu.testing.cosm import Records

SYSTOOLS, RAS = (1, 130), (1, 100)


@asynccontextmanager
async def served() -> AsyncIterator[Node]:
    """Node 0, with the services on node 1."""
    records = Records()
    async with fabric(1) as fab:
        tools = ToolServers(fab.cards[0].node, P.Facts(8 << 30, 60, "micos 1", "MICEMU000001"), records.log)
        tools.start()
        yield fab.host
        await tools.close()
    records.close()


async def client(node: Node, service: tuple[int, int], port: int = 0) -> KernelEndpoint:
    """Connected, from ``port`` or from an ordinary one."""
    ep = node.open()
    if port:
        ep.bind(port)
    await ep.connect(service)
    return ep


def request(kind: int, value: int = 0) -> bytes:
    return P.SYSTOOLS_HEADER.pack(kind, 0, 0, 0, struct.pack("<I12x", value))


async def asked(ep: KernelEndpoint, kind: int, value: int = 0) -> tuple[int, int, bytes]:
    """Length and error of the answer's header, and its payload."""
    await ep.send(request(kind, value))
    _, length, error, _, _ = P.SYSTOOLS_HEADER.unpack(await ep.recv(26))
    return length, error, await ep.recv(length)


async def is_closed(ep: KernelEndpoint) -> bool:
    try:
        await ep.recv(1)
    except ScifError as e:
        return e.errno == errno.ECONNRESET
    return False


async def test_cosm_71_port_130_answers_one_request_after_the_other() -> None:
    """Version 2.7; a type that it does not know is error 2 and no end of the connection."""
    async with served() as host:
        ep = await client(host, SYSTOOLS)
        assert await asked(ep, 1) == (2, 0, b"\2\7")
        assert await asked(ep, 0x55) == (0, 2, b"")
        assert await asked(ep, 1) == (2, 0, b"\2\7")


async def test_cosm_71_who_may_set_is_told_by_the_clients_port() -> None:
    """Port 1024 and above: error 6, nothing is stored. Port 1023: stored, for every client to read."""
    async with served() as host:
        users = [await client(host, SYSTOOLS), await client(host, SYSTOOLS, 1024)]
        for user in users:
            assert await asked(user, P.SET_LED, 1) == (0, 6, b"")
            assert await asked(user, 7) == (4, 0, bytes(4))
        root = await client(host, SYSTOOLS, 1023)
        assert await asked(root, P.SET_LED, 1) == (0, 0, b"")
        assert await asked(users[0], 7) == (4, 0, b"\1\0\0\0")


@pytest.mark.parametrize("extra", [b"x", request(1)], ids=["a byte", "another request"])
async def test_cosm_71_extra_bytes_close_the_connection(extra: bytes) -> None:
    """Nothing is answered; others, and the next connection, are served."""
    async with served() as host:
        good, bad = await client(host, SYSTOOLS), await client(host, SYSTOOLS)
        await bad.send(request(1) + extra)
        assert await is_closed(bad)
        assert await asked(good, 1) == (2, 0, b"\2\7")
        assert await asked(await client(host, SYSTOOLS), 1) == (2, 0, b"\2\7")


async def test_cosm_72_port_100_tells_the_hardware() -> None:
    """Op 1 from an ordinary port: 0x4001 and 35 bytes; an unknown op has the error bit and error 1; then the next."""
    async with served() as host:
        ep = await client(host, RAS)
        for op, cmd, length, start in (
            (1, 0x4001, 35, b""),
            (0x1FF, 0xC1FF, 4, struct.pack("<HH", 1, 0)),
            (26, 0xC01A, 4, struct.pack("<HH", 5, 0)),  # may not set
            (1, 0x4001, 35, b""),
        ):
            await ep.send(P.RAS_HEADER.pack(op, 0, 0, 0x1234567890, 0))
            head = P.RAS_HEADER.unpack(await ep.recv(24))
            assert (head[0], head[1], head[3]) == (cmd, length, 0x1234567890)
            assert (await ep.recv(length)).startswith(start)
