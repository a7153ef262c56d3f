"""The Python API of programs."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import errno
import gc
import os
import pickle
import select
import signal
import threading
import time

import pytest
from scif_server import Server

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


def test_scif_15_an_endpoint_cannot_be_copied(node: Server) -> None:
    """A copy would close the descriptor of its original; an error can travel between processes."""
    a, b = pair()
    with a, b:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot copy or pickle a scif endpoint"):
                make(a)
        gc.collect()
        assert a.send(b"here") == 4
        assert b.recv(4) == b"here"
    error = scif.ScifError(errno.ECONNRESET, "recv")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.errno, str(again)) == (scif.ScifError, errno.ECONNRESET, str(error))


def test_scif_48_an_accept_never_goes_on_with_another_endpoint_of_the_same_number(node: Server) -> None:
    """Closed in another thread, which opens the next listener at once: EBADF, and the next one keeps its requests."""
    for _ in range(30):
        listener = scif.Endpoint()
        listener.bind()
        listener.listen()
        ended: list[BaseException | None] = []

        def accept(listener: scif.Endpoint = listener, ended: list[BaseException | None] = ended) -> None:
            try:
                listener.accept()[0].close()
                ended.append(None)
            except scif.ScifError as error:
                ended.append(error)

        blocked = threading.Thread(target=accept, daemon=True)
        blocked.start()
        _wait_until_asleep(blocked)
        listener.close()
        with scif.Endpoint() as following, scif.Endpoint() as client:
            port = following.bind()
            following.listen()
            client.setblocking(False)
            with pytest.raises(scif.ScifError):
                client.connect((0, port))
            blocked.join(10)
            assert [getattr(e, "errno", None) for e in ended] == [errno.EBADF]
            following.accept()[0].close()


def _wait_until_asleep(thread: threading.Thread) -> None:
    """Until the thread waits in the kernel."""
    while True:
        with open(f"/proc/self/task/{thread.native_id}/stat") as f:
            if f.read().rpartition(")")[2].split()[0] == "S":
                return
        os.sched_yield()


@pytest.mark.timeout(30)
def test_scif_76_signals_do_not_prolong_a_poll(node: Server) -> None:
    """Handlers run, the time-out stays; one beyond the C type's range is not cut to its low bits."""
    ticks: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: ticks.append(1))
    done = threading.Event()
    me = threading.get_ident()

    def interrupt() -> None:
        while not done.wait(0.02):
            signal.pthread_kill(me, signal.SIGUSR1)

    clock = threading.Thread(target=interrupt, daemon=True)
    with scif.Endpoint() as listener:
        listener.bind()
        listener.listen()
        clock.start()
        try:
            start = time.monotonic()
            assert scif.poll([(listener, scif.POLLIN)], 0.3) == [0]
            assert time.monotonic() - start >= 0.3
            assert ticks
        finally:
            done.set()
            clock.join()
            signal.signal(signal.SIGUSR1, before)
    a, b = pair()
    with a, b:
        late = threading.Timer(0.3, a.send, args=(b"x",))
        late.start()
        assert scif.poll([(b, scif.POLLIN)], 2**32 / 1000) == [scif.POLLIN]
        late.join()


class Reluctant(scif.Endpoint):
    """Its ring takes little, and every second time nothing."""

    full = False

    def send(self, data: bytes | memoryview, *, block: bool = True) -> int:
        self.full = not self.full
        return 0 if self.full else super().send(data[:1000], block=block)


def test_scif_68_what_several_tasks_send_stays_in_one_piece(node: Server) -> None:
    """Three tasks that wait for room again and again: no block within another."""
    size, count = 10000, 5
    a, b = pair()
    with a, b, Reluctant(os.dup(a.fileno())) as sender:

        async def tasks() -> None:
            async def send(value: int) -> None:
                for _ in range(count):
                    await sender.asend(bytes([value]) * size)

            await asyncio.wait_for(asyncio.gather(*(send(value) for value in range(3))), 20)

        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(b.recv(3 * count * size)), daemon=True)
        reader.start()
        asyncio.run(tasks())
        reader.join(10)
        assert [at for at in range(0, 3 * count * size, size) if len(set(got[0][at : at + size])) != 1] == []


def test_scif_125_node_ids_and_leaks(node: Server) -> None:
    """get_node_ids lists host and cards; everything that the other tests opened is gone."""
    assert scif.get_node_ids() == ([0, 1, 2], 0)
    end = time.monotonic() + 30
    while True:  # our own connections to the node stay: it is not idle
        state = node.ask("state")
        assert isinstance(state, list)
        if state[0]["endpoints"] == state[0]["ports"] == 0:
            break
        assert time.monotonic() < end, state


def test_scif_no_emulator_is_enoent(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing runs, open fails with ENOENT at once (SCIF 2.17)."""
    monkeypatch.setenv("MICEMU_SCIF_SOCKET", "/nonexistent/scif.sock")
    with pytest.raises(scif.ScifError) as e:
        scif.Endpoint()
    assert e.value.errno == errno.ENOENT
