"""What a program leaves behind that is killed in the middle of something: nothing, at once."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from pathlib import Path

import pytest
from fabric import eventually, fabric
from scif_server import Server, settled

from mic_emu._native import lib
from mic_emu.scif.endpoint import Endpoint
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.service import ScifService, listen_at
from mic_emu.scif.state import State

REQUEST, REPLY = struct.Struct("<IIQ6Q"), struct.Struct("<iI8Q")
RW = 3


class Program:
    """What libscif sends for a program, as far as a test needs it; ``kill`` closes what a dead process closes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sockets: list[socket.socket] = []
        self.control = self._hello()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sockets.append(sock)
        sock.connect(str(self.path))
        return sock

    def _hello(self) -> socket.socket:
        sock = self._connect()
        sock.send(REQUEST.pack(lib.MIC_SCIF_HELLO, 0, 0, os.getpid(), 0, 0, 0, 0, 0))
        return sock

    def open(self) -> int:
        """A new endpoint; returns its sid."""
        sid = int.from_bytes(os.urandom(8), "little") | 1
        cookie = int.from_bytes(os.urandom(8), "little")
        self._connect().send(REQUEST.pack(lib.MIC_SCIF_OPEN, 0, 0, cookie, sid, 0, 0, 0, 0))
        return sid

    def send(self, op: int, sid: int, *args: int) -> None:
        """A request; the answer to the last one must have been read."""
        self.control.send(REQUEST.pack(op, 0, sid, *(args + (0,) * 6)[:6]))

    async def answer(self) -> tuple[int, int]:
        """Status and first value of the next answer."""
        self.control.setblocking(False)
        packet = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.control, 4096), 10)
        status, _, value, *_ = REPLY.unpack_from(packet)
        return status, value

    async def ask(self, op: int, sid: int, *args: int) -> int:
        """A request that succeeds; returns the first value."""
        self.send(op, sid, *args)
        status, value = await self.answer()
        assert status == 0, os.strerror(-status)
        return value

    def kill(self) -> None:
        for sock in self.sockets:
            sock.close()


async def started(path: Path) -> Program:
    program = Program(path)
    assert (await program.answer())[0] == 0
    return program


def test_scif_17_25_a_port_is_free_although_its_last_connection_was_only_being_made(tmp_path: Path) -> None:
    """A listener is killed between grant and confirmation: the next bind waits for that, and has the port."""

    async def main() -> None:
        path = tmp_path / "node0.sock"
        async with fabric(1) as fab:
            card = fab.cards[0]
            service = ScifService(fab.host, listen_at(path))
            service.start()
            first = await started(path)
            listener, fresh = first.open(), first.open()
            await first.ask(lib.MIC_SCIF_BIND, listener, 2700)
            await first.ask(lib.MIC_SCIF_LISTEN, listener, 4)
            connect = asyncio.ensure_future(card.node.open().connect((0, 2700)))
            await eventually(lambda: fab.host.listeners[2700].pending, "the request")
            with card.asleep():
                first.send(lib.MIC_SCIF_ACCEPT, listener, fresh, 1)
                connecting = lambda: [e for e in fab.host.endpoints.values() if e.state is State.CONNECTING]  # noqa: E731
                await eventually(connecting, "the grant")
                first.kill()
                second = await started(path)
                again = second.open()
                second.send(lib.MIC_SCIF_BIND, again, 2700)
                await eventually(lambda: 2700 not in fab.host.listeners, "the end of the listener")
            assert await second.answer() == (0, 2700)
            second.kill()
            connect.cancel()
            await asyncio.gather(connect, return_exceptions=True)
            await service.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_17_a_port_in_use_is_refused_at_once(tmp_path: Path) -> None:
    """A connection that lives keeps the port (SCIF-25): nobody waits for its end."""

    async def main() -> None:
        path = tmp_path / "node0.sock"
        async with fabric(0) as fab:
            service = ScifService(fab.host, listen_at(path))
            service.start()
            program, other = await started(path), await started(path)
            assert await program.ask(lib.MIC_SCIF_BIND, program.open(), 2700) == 2700
            other.send(lib.MIC_SCIF_BIND, other.open(), 2700)
            assert (await other.answer())[0] < 0
            program.kill()
            assert await other.ask(lib.MIC_SCIF_BIND, other.open(), 2700) == 2700
            other.kill()
            await service.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_17_53_a_killed_process_takes_no_request_along(tmp_path: Path) -> None:
    """Of two that wait at one listener, the first dies: the request that comes then is the other's."""

    async def main() -> None:
        path = tmp_path / "node0.sock"
        async with fabric(0) as fab:
            service = ScifService(fab.host, listen_at(path))
            service.start()
            first, second = await started(path), await started(path)
            listener, client = second.open(), fab.host.open()
            await second.ask(lib.MIC_SCIF_BIND, listener, 700)
            await second.ask(lib.MIC_SCIF_LISTEN, listener, 4)
            for waiting, program in enumerate((first, second), 1):
                program.send(lib.MIC_SCIF_ACCEPT, listener, program.open(), 1)
                await eventually(lambda n=waiting: len(fab.host.listeners[700].accepts) == n, "it waits")
            first.kill()
            await eventually(lambda: len(service._controls) == 1, "the node hears of its death")
            port = await client.connect((0, 700))
            status, packed = await second.answer()
            assert (status, packed) == (0, 0)  # from node 0
            assert port == client.port
            assert client.state is State.CONNECTED
            second.kill()
            await client.close()
            await service.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_17_a_registration_that_was_begun_leaves_nothing(server: Server) -> None:
    """Killed between the pages and the announcement: no window, no pages."""

    async def main() -> None:
        acceptor, connector = [await started(server.where / "node0.sock") for _ in range(2)]
        listener, accepted, ep = acceptor.open(), acceptor.open(), connector.open()
        port = await acceptor.ask(lib.MIC_SCIF_BIND, listener, 0)
        await acceptor.ask(lib.MIC_SCIF_LISTEN, listener, 4)
        connector.send(lib.MIC_SCIF_CONNECT, ep, 0, port)
        await acceptor.ask(lib.MIC_SCIF_ACCEPT, listener, accepted, 1)
        assert (await connector.answer())[0] == 0
        await connector.ask(lib.MIC_SCIF_REG_BEGIN, ep, 0, 4096, RW, 0, 0)
        connector.kill()
        acceptor.kill()

    asyncio.run(main())
    assert settled(server) == server.idle


@pytest.mark.parametrize(("src", "dst"), [(0, 0), (0, 1), (1, 0), (1, 2)])
def test_scif_132_a_queue_pair_stays_while_the_peer_can_write_into_it(src: int, dst: int) -> None:
    """The survivor goes on reading, and tells its read index to the pages of the one that closed."""

    async def main() -> None:
        async with fabric(2) as fab:
            here, there = fab.nodes[src], fab.nodes[dst]
            listener = there.open()
            listener.bind(2700)
            listener.listen()
            dying = here.open()
            _, survivor = await asyncio.gather(dying.connect((dst, 2700)), listener.accept())
            await dying.send(b"last words")
            qp = dying.qp
            assert qp is not None
            await dying.close()
            here.queue_pairs.free_retired()
            assert qp.offset in dict(here.allocator.used_areas())
            assert await survivor.recv(10) == b"last words"
            await survivor.close()
            held = lambda: here.queue_pairs.free_retired() or len(here.queue_pairs)  # noqa: E731
            await eventually(lambda: not held(), "the survivor's close")
            assert qp.offset not in dict(here.allocator.used_areas())
            await listener.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_132_a_lost_node_keeps_no_queue_pair() -> None:
    """Nobody can write any more once the peer's node is lost."""

    async def main() -> None:
        async with fabric(1) as fab:
            listener = fab.cards[0].node.open()
            listener.bind(2700)
            listener.listen()
            ep = fab.host.open()
            await asyncio.gather(ep.connect((1, 2700)), listener.accept())
            await ep.close()
            fab.host.queue_pairs.free_retired()
            assert len(fab.host.queue_pairs) == 1
            fab.cards[0].host_link.down()
            fab.host.queue_pairs.free_retired()
            assert len(fab.host.queue_pairs) == 0

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_17_the_room_that_a_peer_was_granted_stays_until_it_says_so() -> None:
    """It may be writing its window record there when our endpoint closes."""

    async def main() -> None:
        async with fabric(1) as fab:
            card, records = fab.cards[0], fab.host.records
            listener = fab.host.open()
            listener.bind(2700)
            listener.listen()
            client = card.node.open()
            _, server = await asyncio.gather(client.connect((0, 2700)), listener.accept())
            with card.asleep():  # before it can use the grant
                card.card_link.send(Msg(Op.ALLOC_REQ, (1, client.port), (0, 2700), server.id, 1, 77))
                await eventually(lambda: records._granted, "the grant")
                closing = asyncio.ensure_future(server.close())
                await eventually(lambda: server.state is State.CLOSING, "the release")
                assert records._granted
            card.card_link.on_doorbell()
            await closing
            await eventually(lambda: not records._granted, "the card's answer")
            await client.close()
            await listener.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_request_that_fails_for_a_defect_of_ours_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program gets EIO instead of waiting for ever, the log says why, the next request is served."""

    async def main() -> list[str]:
        path = tmp_path / "node0.sock"
        async with fabric(0) as fab:
            said: list[str] = []
            monkeypatch.setattr(fab.host.log, "error", lambda text, *args: said.append(text % args))
            service = ScifService(fab.host, listen_at(path))
            service.start()
            monkeypatch.setattr(Endpoint, "listen", lambda *_: [][1])
            program = await started(path)
            ep = program.open()
            assert await program.ask(lib.MIC_SCIF_BIND, ep, 2700) == 2700
            program.send(lib.MIC_SCIF_LISTEN, ep, 4)
            assert (await program.answer())[0] == -errno.EIO
            await program.ask(lib.MIC_SCIF_MASK, ep)
            program.kill()
            await service.close()
            return said

    (said,) = asyncio.run(asyncio.wait_for(main(), 30))
    assert f"request {lib.MIC_SCIF_LISTEN} of process {os.getpid()} failed: IndexError" in said
