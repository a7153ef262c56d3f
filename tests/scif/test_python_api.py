"""The Python API of programs."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import select
import threading

import pytest
from scif_server import Server, settled

from mic_emu import scif


@pytest.fixture
def node(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """This process is a program on the host; afterwards the nodes hold nothing."""
    monkeypatch.setenv("MICEMU_SCIF_SOCKET", str(server.where / "node0.sock"))
    return server


def pair() -> tuple[scif.Endpoint, scif.Endpoint]:
    with scif.Endpoint() as listener:
        port = listener.bind()
        listener.listen()
        client = scif.Endpoint()
        thread = threading.Thread(target=client.connect, args=((0, port),))
        thread.start()
        server, peer = listener.accept()
        thread.join()
        assert peer.node == 0
        assert peer.port >= 1089
        return client, server


def test_scif_24_without_a_free_ephemeral_port(node: Server) -> None:
    """ENOSPC from bind(0) and from connect on an unbound endpoint; both work again with the first port that is free."""
    with scif.Endpoint() as listener, scif.Endpoint() as ep, scif.Endpoint() as other:
        port = listener.bind(1050)
        listener.listen()
        holders = [scif.Endpoint(), scif.Endpoint()]
        freed = [holder.bind() for holder in holders]
        node.ask("exhaust 0")
        try:
            for call in (ep.bind, lambda: ep.connect((0, port))):
                with pytest.raises(scif.ScifError) as e:
                    call()
                assert e.value.errno == errno.ENOSPC
            holders.pop().close()
            assert ep.bind() == freed.pop()
            holders.pop().close()
            thread = threading.Thread(target=other.connect, args=((0, port),))
            thread.start()
            conn, peer = listener.accept()
            thread.join()
            assert peer.port == freed.pop()
            conn.close()
        finally:
            node.ask("free 0")


def test_scif_60_send_and_receive_buffers(node: Server) -> None:
    """Any buffer goes through unchanged; recv_into fills in place; errno comes as ScifError."""
    a, b = pair()
    with a, b:
        assert a.send(b"hello") == 5
        assert b.recv(5) == b"hello"
        view = memoryview(bytearray(8))
        assert a.send(bytearray(b"12345678")) == 8
        assert b.recv_into(view[2:6]) == 4
        assert bytes(view) == b"\0\x001234\0\0"
        assert b.recv(100, block=False) == b"5678"
        assert b.recv(100, block=False) == b""
        assert a.send(bytes(5000), block=False) == 4095
        assert scif.poll([(a, select.POLLOUT), (b, select.POLLIN)], 1) == [0, select.POLLIN]
    with pytest.raises(scif.ScifError) as e:
        a.send(b"x")
    assert e.value.errno == errno.EBADF


def test_scif_86_104_windows_rma_mapping_and_fences(node: Server) -> None:
    """Register, mmap as memoryview, RMA in both directions, fence signal."""
    a, b = pair()
    with a, b:
        mine = scif.alloc(8192)
        mine[:5] = b"there"
        with a.register(mine) as window:
            assert window.offset == 1 << 62
            got = bytearray(5)
            b.vreadfrom(got, window.offset)
            assert got == b"there"
            b.vwriteto(b"HERE", window.offset + 1)
            assert mine[:5] == b"tHERE"
            with b.mmap(window.offset, 8192) as view:
                view[100] = 7
                assert mine[100] == 7
            local = b.register(scif.alloc(4096))
            b.readfrom(local.offset, 64, window.offset)
            b.writeto(local.offset, 5, window.offset + 4096)
            assert mine[4096:4101] == b"tHERE"
            b.fence_wait(b.fence_mark())
            b.fence_signal(0, 0, window.offset + 8, 0x1122, 1 | 0x20)
            assert int.from_bytes(mine[8:16], "little") == 0x1122
        with pytest.raises(scif.ScifError) as e:
            b.vreadfrom(got, window.offset)
        assert e.value.errno == errno.ENXIO


def test_scif_98_a_mapping_lives_as_long_as_what_is_made_of_it(node: Server) -> None:
    """Closed, but an array has a view of its own: no dangling memory; the window goes with the last of them."""
    a, b = pair()
    with a, b:
        memory = scif.alloc(4096)
        window = a.register(memory, 0)
        mapping = b.mmap(0, 4096)
        other, held = memoryview(mapping.view.obj), (ctypes.c_char * 8).from_buffer(mapping.view)
        window.unregister()
        mapping.close()
        with pytest.raises(ValueError, match="released"):
            mapping.view[0]
        mapping.close()
        other[:4], held[4] = b"live", b"!"
        assert memory[:5] == b"live!"
        for lingers in (other, held):
            with pytest.raises(scif.ScifError) as taken:
                a.register(memory, 0)
            assert taken.value.errno == errno.EADDRINUSE
            if lingers is other:
                other.release()
        del held, lingers, mapping
        gc.collect()
        a.register(memory, 0)


def test_scif_40_asyncio_helpers(node: Server) -> None:
    """aconnect, aaccept, asend and arecv move a megabyte in one loop."""

    async def main() -> None:
        with scif.Endpoint() as listener, scif.Endpoint() as client:
            port = listener.bind()
            listener.listen()
            (server, _), local = await asyncio.gather(listener.aaccept(), client.aconnect((0, port)))
            assert local >= 1089
            data = os.urandom(1 << 17)

            async def receive() -> bytes:
                out = bytearray()
                while len(out) < len(data):
                    out += await server.arecv(70000)
                return bytes(out)

            sent, got = await asyncio.gather(client.asend(data), receive())
            assert (sent, got) == (len(data), data)
            client.close()
            assert await server.arecv(1) == b""
            server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_53_several_tasks_wait_on_one_endpoint(node: Server) -> None:
    """Two accepting tasks get one connection each; of two that receive each gets something; close wakes them."""

    async def main() -> None:
        with scif.Endpoint() as listener, scif.Endpoint() as one, scif.Endpoint() as two:
            port = listener.bind()
            listener.listen()
            first, second = (asyncio.create_task(listener.aaccept()) for _ in range(2))
            ports = await asyncio.gather(one.aconnect((0, port)), two.aconnect((0, port)))
            (a, peer_a), (b, peer_b) = await first, await second
            assert sorted(ports) == sorted((peer_a.port, peer_b.port))
            with a, b:
                readers = [asyncio.create_task(a.arecv(1)) for _ in range(2)]
                await (one if ports[0] == peer_a.port else two).asend(b"12")
                assert sorted(await asyncio.gather(*readers)) == [b"1", b"2"]
            waiting = asyncio.create_task(listener.aaccept())
            await asyncio.sleep(0)
            listener.close()
            with pytest.raises(scif.ScifError) as closed:
                await waiting
            assert closed.value.errno == errno.EBADF

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.timeout(20)  # less than the node's 30 s
def test_scif_40_a_connect_that_was_cancelled_is_closed_at_once(node: Server) -> None:
    """Nobody accepts: the program does not wait for the node's time-out."""

    async def main() -> None:
        with scif.Endpoint() as listener:
            port = listener.bind()
            listener.listen()
            with scif.Endpoint() as client:
                task = asyncio.create_task(client.aconnect((0, port)))
                while scif.poll([(listener, scif.POLLIN)], 0) == [0]:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(asyncio.wait_for(main(), 30))


def test_scif_15_an_endpoint_goes_with_its_last_reference(node: Server) -> None:
    """As a socket: the peer sees it closed, and a ResourceWarning names it."""
    a, b = pair()
    with a:
        with pytest.warns(ResourceWarning, match="unclosed <scif endpoint"):
            del b
        with pytest.raises(scif.ScifError) as reset:
            a.recv(1)
        assert reset.value.errno == errno.ECONNRESET


def test_scif_125_node_ids_and_leaks(node: Server) -> None:
    """get_node_ids lists host and cards; everything that the other tests opened is gone."""
    assert scif.get_node_ids() == ([0, 1, 2], 0)
    state = settled(node)
    assert isinstance(state, list)
    assert state[0]["endpoints"] == state[0]["ports"] == 0


def test_scif_no_emulator_is_enoent(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing runs, open fails with ENOENT at once (SCIF 2.17)."""
    monkeypatch.setenv("MICEMU_SCIF_SOCKET", "/nonexistent/scif.sock")
    with pytest.raises(scif.ScifError) as e:
        scif.Endpoint()
    assert e.value.errno == errno.ENOENT
