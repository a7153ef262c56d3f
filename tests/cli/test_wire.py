"""The wire between the emulator's processes: framing, descriptors, deadlines, hostile peers."""

from __future__ import annotations

import array
import asyncio
import errno
import gc
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_emu import peers, wire, wire_aio
from mic_emu.wire import Channel, PeerClosed, WireError, WireTimeout
from mic_emu.wire_aio import AsyncChannel


def open_fds() -> set[str]:
    """Descriptors of this process, without those that garbage of earlier tests holds, and of this look."""
    gc.collect()
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    before = open_fds()
    a, b = wire.channel_pair()
    yield a, b
    a.close()
    b.close()
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    before = open_fds()
    a, b = socket.socketpair()
    channel = Channel(b)
    yield a, channel
    a.close()
    channel.close()
    assert open_fds() == before, "descriptors leaked"


def test_messages_keep_order_and_content(pair: tuple[Channel, Channel]) -> None:
    """Messages arrive whole and in order, with any text, newlines and undecodable bytes included."""
    a, b = pair
    msgs = [{"n": 1, "s": "ä\n"}, {}, {"argv": [os.fsdecode(b"\xff\xfe")]}, {"deep": {"x": [1, None, True]}}]
    for m in msgs:
        a.send(m)
    for m in msgs:
        assert b.recv(20, "the message") == (m, [])


def test_descriptors_belong_to_their_message(pair: tuple[Channel, Channel]) -> None:
    """Descriptors come with the message that sent them, close-on-exec, and are the same files."""
    a, b = pair
    r, w = os.pipe()
    a.send({"n": 0})
    a.send({"n": 1}, [r, w])
    a.send({"n": 2})
    a.send({"n": 3}, [w])
    got = [b.recv(20, "message") for _ in range(4)]
    assert [m["n"] for m, _ in got] == [0, 1, 2, 3]
    assert [len(f) for _, f in got] == [0, 2, 0, 1]
    os.write(got[3][1][0], b"x")
    assert os.read(got[1][1][0], 1) == b"x"
    for _, fds in got:
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.close(fd)
    os.close(r)
    os.close(w)


def test_most_descriptors_of_one_message(pair: tuple[Channel, Channel]) -> None:
    """253 descriptors fit into one message; 254 are refused here, before anything is sent."""
    a, b = pair
    with open("/dev/null") as f:
        a.send({"x": 1}, [f.fileno()] * wire.MAX_FDS)
        _, fds = b.recv(20, "descriptors")
        assert len(fds) == wire.MAX_FDS
        for fd in fds:
            os.close(fd)
        with pytest.raises(WireError, match="254 descriptors"):
            a.send({"x": 1}, [f.fileno()] * (wire.MAX_FDS + 1))


def test_large_message_with_descriptor(pair: tuple[Channel, Channel]) -> None:
    """A message larger than the socket's buffer arrives whole, its descriptor with it."""
    a, b = pair
    text = "x" * (8 << 20)
    r, w = os.pipe()
    t = threading.Thread(target=a.send, args=({"text": text}, [w]))
    t.start()
    msg, fds = b.recv(20, "the large message")
    t.join()
    assert msg["text"] == text
    os.write(fds[0], b"y")
    assert os.read(r, 1) == b"y"
    for fd in (r, w, *fds):
        os.close(fd)


def test_too_long_message_is_refused_by_the_sender(pair: tuple[Channel, Channel]) -> None:
    """More than 16 MiB is an error of the sender, and the channel goes on."""
    a, b = pair
    with pytest.raises(WireError, match="at most 16777216"):
        a.send({"x": "y" * wire.MAX_MESSAGE})
    a.send({"ok": 1})
    assert b.recv(20, "x")[0] == {"ok": 1}


def test_timeouts_have_names(pair: tuple[Channel, Channel]) -> None:
    """A wait that ends says what was awaited and for how long."""
    a, _ = pair
    with pytest.raises(WireTimeout, match=r"greeting of the board: nothing came within 0\.01 s"):
        a.recv(0.01, "greeting of the board")
    with pytest.raises(WireTimeout, match="did not read"):
        a.send({"x": "y" * (4 << 20)}, timeout_s=0.05)


def test_end_of_the_peer(raw: tuple[socket.socket, Channel]) -> None:
    """EOF is PeerClosed (a ConnectionError); complete messages before it are still delivered."""
    peer, channel = raw
    peer.sendall(b'{"last":1}\n{"ha')
    peer.close()
    assert channel.recv(20, "x")[0] == {"last": 1}
    with pytest.raises(PeerClosed, match="in the middle"):
        channel.recv(20, "x")
    with pytest.raises(ConnectionError):
        channel.send({"x": 1})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "not a JSON line"),
        (b"\xff\xfe\n", "not a JSON line"),
        (b"\n", "not a JSON line"),
        (b"[1]\n", "a JSON list"),
        (b"[" * 100000 + b"\n", "not a JSON line"),
        (b'{"x":' + b"9" * 100000 + b"}\n", "not a JSON line"),
        (b'{"timeout":NaN}\n', "not a JSON line"),  # a timer that sorts nowhere
        (b'{"timeout":-Infinity}\n', "not a JSON line"),
        (b'{"fds":1}\n', "0 descriptors says that it has 1"),
        (b'{"fds":-1}\n', "says that it has -1"),
        (b'{"fds":true}\n', "says that it has True"),
        (b'{"fds":"1"}\n', "says that it has '1'"),
    ],
)
def test_garbage_is_a_wire_error(raw: tuple[socket.socket, Channel], line: bytes, why: str) -> None:
    """Bytes that are no message end in WireError, and the channel stays broken."""
    peer, channel = raw
    peer.sendall(line)
    with pytest.raises(WireError, match=why):
        channel.recv(20, "x")
    peer.sendall(b'{"fine":1}\n')
    with pytest.raises(WireError):
        channel.recv(20, "x")


def test_endless_line_is_bounded(raw: tuple[socket.socket, Channel]) -> None:
    """A line without an end is refused at 16 MiB, whatever follows."""
    peer, channel = raw

    def flood() -> None:
        try:
            while True:
                peer.sendall(b"x" * 65536)
        except OSError:
            pass

    t = threading.Thread(target=flood)
    t.start()
    with pytest.raises(WireError, match="longer than"):
        channel.recv(20, "x")
    channel.close()
    t.join()


@pytest.mark.parametrize("line", [b"{}\n", b'{"fds":1}\n', b"garbage\n"])
def test_unclaimed_descriptors_are_closed(raw: tuple[socket.socket, Channel], line: bytes) -> None:
    """Descriptors beyond what the message says are closed and the channel is broken."""
    peer, channel = raw
    with open("/dev/null") as f:
        rights = array.array("i", [f.fileno()] * 3)
        peer.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with pytest.raises(WireError):
        channel.recv(20, "x")


def test_flood_of_descriptors_is_bounded(raw: tuple[socket.socket, Channel]) -> None:
    """A peer that sends descriptors and never ends its line is stopped."""
    peer, channel = raw
    with open("/dev/null") as f:
        rights = array.array("i", [f.fileno()] * wire.MAX_FDS)
        for _ in range(3):
            peer.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with pytest.raises(WireError, match="waiting for a message"):
        channel.recv(20, "x")


def test_no_descriptor_left_here_is_an_error_not_a_loss() -> None:
    """When this process has no room for a descriptor, the message fails instead of arriving short."""
    code = (
        "import resource,os\nfrom mic_emu import wire\n"
        "a,b=wire.channel_pair()\nr,w=os.pipe()\na.send({'x':1},[r]*20)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE,(12,12))\n"
        "n=len(os.listdir('/proc/self/fd'))\n"
        "try: b.recv(1,'x')\n"
        "except wire.WireError as e: print(e)\n"
        "assert len(os.listdir('/proc/self/fd'))==n\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert "were lost" in run.stdout, run.stderr


def test_try_recv(pair: tuple[Channel, Channel]) -> None:
    """try_recv never waits."""
    a, b = pair
    assert b.try_recv() is None
    a.send({"x": 1})
    assert b.try_recv() == ({"x": 1}, [])


def test_what_is_no_number_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    """A time that is none stays with whoever made it."""
    with pytest.raises(ValueError, match="JSON"):
        pair[0].send({"timeout": float("nan")})


def test_sending_fds_word_is_reserved(pair: tuple[Channel, Channel]) -> None:
    """Nobody can say "fds" by accident."""
    with pytest.raises(ValueError, match="fds"):
        pair[0].send({"fds": 3})


def test_long_paths_and_stale_sockets(tmp_path: Path) -> None:
    """Sockets work at paths beyond sun_path; a dead one is replaced, a live one is not, a file never."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    path = str(deep / "s")
    first = wire.listen_unix(path)
    with pytest.raises(OSError, match="somebody listens"):
        wire.listen_unix(path)
    wire.connect_unix(path).close()
    first.close()
    with pytest.raises(ConnectionRefusedError) as e:
        wire.connect_unix(path)
    assert e.value.filename == path
    wire.listen_unix(path).close()
    (deep / "file").write_text("mine")
    with pytest.raises(OSError, match="in the way"):
        wire.listen_unix(str(deep / "file"))
    assert (deep / "file").read_text() == "mine"


def test_serve_unix_speaks_to_clients_and_leaves_nothing(tmp_path: Path) -> None:
    """The server's socket is 0600, serves several clients, survives garbage, and its name goes away."""
    path = str(tmp_path / "control.sock")
    before = open_fds()

    async def handler(ch: AsyncChannel) -> None:
        while True:
            msg, fds = await ch.recv(20, "a request")
            for fd in fds:
                os.write(fd, b"seen")
                os.close(fd)
            await ch.send({"echo": msg})

    async def ask(n: int) -> None:
        loop = asyncio.get_running_loop()
        sock = await loop.run_in_executor(None, wire.connect_unix, path)
        async with AsyncChannel(sock) as ch:
            assert ch.peer_uid() == os.getuid()
            r, w = os.pipe()
            await ch.send({"n": n, "pad": "x" * 500000}, [w])
            os.close(w)
            reply, _ = await ch.recv(20, "the echo")
            assert reply["echo"]["n"] == n
            assert os.read(r, 4) == b"seen"
            os.close(r)

    async def main() -> None:
        server = await wire_aio.serve_unix(path, handler)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with wire.connect_unix(path) as bad:
            bad.sendall(b"nonsense\n")
            assert await asyncio.get_running_loop().run_in_executor(None, bad.recv, 10) == b""
        await asyncio.gather(*(ask(n) for n in range(8)))
        await server.close()
        await server.close()

    asyncio.run(main())
    assert os.listdir(tmp_path) == []
    assert open_fds() == before


def test_serve_unix_refuses_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection of a user who is not permitted is closed before a byte is read, one of the group is served."""
    path = str(tmp_path / "s")
    users, groups = (1, 2, 3), {4, 5}
    monkeypatch.setattr(peers, "peer_credentials", lambda _: users)
    monkeypatch.setattr(peers, "peer_groups", lambda _: groups)

    async def handler(ch: AsyncChannel) -> None:
        await ch.send({"hello": 1})

    async def main() -> None:
        for group in (None, 2, 6):
            server = await wire_aio.serve_unix(path, handler)
            server._group = group
            async with AsyncChannel(wire.connect_unix(path)) as ch:
                with pytest.raises(PeerClosed):
                    await ch.recv(20, "anything")
            await server.close()
        for group in (3, 5):
            server = await wire_aio.serve_unix(path, handler)
            server._group = group
            async with AsyncChannel(wire.connect_unix(path)) as ch:
                assert (await ch.recv(20, "anything"))[0] == {"hello": 1}
            await server.close()

    asyncio.run(main())


def test_async_deadline_and_cancel_lose_nothing() -> None:
    """A recv that timed out or was cancelled leaves the channel usable."""

    async def main() -> None:
        a, b = socket.socketpair()
        left, right = AsyncChannel(a), AsyncChannel(b)
        with pytest.raises(WireTimeout, match="the answer"):
            await right.recv(0.01, "the answer")
        b_half = asyncio.ensure_future(right.recv(None, "x"))
        a.send(b'{"half":')
        await asyncio.sleep(0)
        b_half.cancel()
        with pytest.raises(asyncio.CancelledError):
            await b_half
        a.send(b"1}\n")
        assert (await right.recv(20, "x"))[0] == {"half": 1}
        # A peer that does not read: the send ends, and the connection with it.
        with pytest.raises(WireTimeout):
            await left.send({"x": "y" * (8 << 20)}, timeout_s=0.05)
        with pytest.raises(PeerClosed):
            await left.send({"more": 1})
        left.close()
        right.close()

    asyncio.run(main())


def test_words_come_without_descriptors() -> None:
    """Who takes no descriptors is not filled up with them."""

    async def main() -> None:
        a, b = socket.socketpair()
        async with AsyncChannel(a) as left, AsyncChannel(b) as right:
            before = open_fds()
            for n in range(3):
                await left.send({"n": n}, [0] * 100)
                assert await right.recv_words(20, "the words") == {"n": n}
            assert open_fds() == before

    asyncio.run(main())


def test_a_slow_reader_has_one_limit_for_a_message() -> None:
    """The limit of a send is that of the message, however often the peer takes a bite of it."""

    async def main() -> None:
        a, b = socket.socketpair()
        b.setblocking(False)
        loop = asyncio.get_running_loop()
        async with AsyncChannel(a) as left:
            sending = asyncio.ensure_future(left.send({"x": "y" * (12 << 20)}, timeout_s=0.3))
            while not sending.done():
                await loop.sock_recv(b, 1 << 16)
                await asyncio.sleep(0.02)  # the slowness of the reader
            with pytest.raises(WireTimeout, match=r"within 0\.3 s"):
                sending.result()
        b.close()

    asyncio.run(main())


def test_a_cancelled_send_of_a_closed_channel_is_cancelled() -> None:
    """Whoever ends a task that sends closes its channel, too, in any order."""

    async def main() -> None:
        a, b = socket.socketpair()
        left = AsyncChannel(a)
        sending = asyncio.ensure_future(left.send({"x": "y" * (8 << 20)}))
        await asyncio.sleep(0)
        left.close()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        b.close()

    asyncio.run(main())


@pytest.mark.parametrize("reads", [True, False])
def test_a_silent_peer_ends_its_own_connection_only(tmp_path: Path, reads: bool) -> None:
    """A client that says nothing, or never reads its answer, is nobody's error: no traceback tells of it."""
    path = str(tmp_path / "s")
    told: list[object] = []
    begun = asyncio.Event()

    async def handler(ch: AsyncChannel) -> None:
        begun.set()
        if reads:
            await ch.recv(0.02, "a request")
        else:
            await ch.send({"x": "y" * (8 << 20)}, timeout_s=0.02)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        server = await wire_aio.serve_unix(path, handler)
        with wire.connect_unix(path) as client:
            client.settimeout(20)
            await asyncio.wait_for(begun.wait(), 20)
            if reads:
                assert await loop.run_in_executor(None, client.recv, 1) == b""
            while server._tasks:
                await asyncio.sleep(0)
        gc.collect()  # a task that nobody asks for its error tells it now
        await server.close()

    asyncio.run(main())
    assert told == []


def test_a_lack_of_descriptors_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it lasts: whoever serves for months fills no log with it."""
    told: list[str] = []
    tries = 0

    class Short(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries in (1, 2, 3, 5):
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def handler(ch: AsyncChannel) -> None:
        await ch.send({"hello": 1})

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        listener = wire.listen_unix(str(tmp_path / "s"))
        server = wire_aio.UnixServer(Short(fileno=listener.detach()), str(tmp_path / "s"), handler)
        for shortages in (1, 2):
            async with AsyncChannel(wire.connect_unix(str(tmp_path / "s"))) as ch:
                assert await ch.recv_words(20, "the greeting") == {"hello": 1}
            assert len(told) == shortages
        await server.close()

    asyncio.run(main())


def test_concurrent_senders_do_not_mix() -> None:
    """Large messages of several tasks arrive whole."""

    async def main() -> None:
        a, b = socket.socketpair()
        async with AsyncChannel(a) as left, AsyncChannel(b) as right:
            sends = [asyncio.ensure_future(left.send({"n": n, "pad": "z" * 400000})) for n in range(10)]
            got = [(await right.recv(20, "a message"))[0] for _ in range(10)]
            await asyncio.gather(*sends)
            assert sorted(m["n"] for m in got) == list(range(10))
            assert all(len(m["pad"]) == 400000 for m in got)

    asyncio.run(main())


def test_speed_of_small_messages(pair: tuple[Channel, Channel]) -> None:
    """10,000 small messages through one socket take well under a second."""
    a, b = pair
    blob = b"".join(wire.encode({"n": n}) for n in range(10000))
    t = threading.Thread(target=a.sock.sendall, args=(blob,))
    t.start()
    assert [b.recv(20, "x")[0]["n"] for _ in range(10000)] == list(range(10000))
    t.join()
    assert json.loads(blob.splitlines()[0]) == {"n": 0}
