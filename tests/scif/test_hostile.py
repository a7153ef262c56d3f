"""Hostile programs and hostile peers: the node survives whatever arrives."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import subprocess
import sys

import pytest
from fabric import eventually, fabric
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scif_server import Server, settled

from mic_emu._native import lib
from mic_emu.scif.control import caller_is_privileged
from mic_emu.scif.proto import MSG_SIZE, Msg, Op

REQUEST = struct.Struct("<IIQ6Q")
OPS = [getattr(lib, n) for n in dir(lib) if n.startswith("MIC_SCIF_") and isinstance(getattr(lib, n), int)]
NUMBERS = st.one_of(
    st.integers(0, 5), st.sampled_from([1 << 62, (1 << 64) - 1, 4096, 1 << 63]), st.integers(0, (1 << 64) - 1)
)


def connect(server: Server) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(str(server.where / "node0.sock"))
    return sock


def call(sock: socket.socket, op: int, sid: int = 0, args: tuple[int, ...] = (), data: bytes = b"") -> bytes:
    sock.send(REQUEST.pack(op, len(data), sid, *(args + (0,) * 6)[:6]) + data)
    return sock.recv(1 << 17)


VICTIM = """
import threading
from mic_emu import scif
l, a = scif.Endpoint(), scif.Endpoint()
port = l.bind()
l.listen()
t = threading.Thread(target=lambda: a.connect((scif.get_node_ids()[1], port)))
t.start()
b, _ = l.accept()
t.join()
a.send(b"x")
b.recv(1)
print(port, flush=True)
c, _ = l.accept()
c.recv(1)
c.send(b"x")
input()
assert scif.poll([(a, scif.POLLIN | scif.POLLOUT), (b, scif.POLLIN)], 0) == [scif.POLLOUT, 0]
for i in range(100):
    a.send(bytes(4000))
    assert b.recv(4000) == bytes(4000)
threading.Timer(0, a.send, (b"y",)).start()
assert b.recv(1) == b"y"
print("unharmed")
"""
SCRIBBLER = """
import ctypes, os, random, sys
from mic_emu import scif
ep = scif.Endpoint()
ep.connect((0, int(sys.argv[1])))
ep.send(b"x")
ep.recv(1)
shared = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.split()[1] == "rw-s"]
assert len(shared) >= 3
for start, end in shared:
    start, size = int(start, 16), int(end, 16) - int(start, 16)
    if sys.argv[2] == "random":
        ctypes.memmove(start, random.Random(size).randbytes(size), size)
    else:
        ctypes.memset(start, int(sys.argv[2]), size)
os._exit(0)
"""


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("what", ["255", "0", "random"])
def test_scif_135_a_program_scribbles_over_all_that_it_has_mapped(
    server: Server, node: int, what: str
) -> None:
    """Ring headers, rings, notify pages: its own connection is gone, others go on, on its node and on the peer's."""
    env = [{**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / f"node{n}.sock")} for n in (0, node)]
    pipe = subprocess.PIPE
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM], env=env[0], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert victim.stdout is not None
    port = victim.stdout.readline().strip()
    subprocess.run([sys.executable, "-c", SCRIBBLER, port, what], env=env[1], check=True, timeout=20)
    out, said = victim.communicate("go on\n", timeout=20)
    assert (out, said, victim.returncode) == ("unharmed\n", "", 0)
    assert settled(server) == server.idle


TENANT = """
import sys, threading
from mic_emu import scif
l, a = scif.Endpoint(), scif.Endpoint()
port = l.bind(); l.listen()
t = threading.Thread(target=lambda: a.connect((0, port))); t.start()
b, _ = l.accept(); t.join()
held, free = scif.alloc(4096), scif.alloc(4096)
held[:], free[:] = b"A" * 4096, b"A" * 4096
window = a.register(held)
a.register(free).unregister()
print("ready", flush=True)
sys.stdin.readline()
got = bytearray(4096)
b.vreadfrom(got, window.offset)
assert bytes(got) == bytes(held) == bytes(free) == b"A" * 4096
print("unharmed")
"""
BURGLAR = """
import errno, os, socket, struct, threading
from mic_emu import scif
from mic_emu._native import lib
request, reply, segment = struct.Struct("<IIQ6Q"), struct.Struct("<iI8Q"), struct.Struct("<2Q")
l, ep = scif.Endpoint(), scif.Endpoint()
port = l.bind(); l.listen()
t = threading.Thread(target=lambda: ep.connect((0, port))); t.start()
other, _ = l.accept(); t.join()
node = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
node.connect(os.environ["MICEMU_SCIF_SOCKET"])

def ask(op, sid=0, *args, data=b""):
    node.send(request.pack(op, len(data), sid, *[a % (1 << 64) for a in (*args, *[0] * 6)[:6]]) + data)
    status, _, first, second, *_ = reply.unpack_from(node.recv(1 << 17))
    return status, first, second

def sid_of(endpoint):
    own = socket.socket(fileno=os.dup(endpoint.fileno()))
    cookie = int.from_bytes(own.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE
    own.close()
    return ask(lib.MIC_SCIF_FIND, 0, cookie)[1]

ask(lib.MIC_SCIF_HELLO, 0, os.getpid())
sid, wrong = sid_of(ep), sid_of(other)
begin = lambda pages: ask(lib.MIC_SCIF_REG_BEGIN, sid, 0, 4096, 3, 0, pages * 4096)
commit = lambda sid, ticket, *places: ask(
    lib.MIC_SCIF_REG_COMMIT, sid, ticket, data=b"".join(segment.pack(*p) for p in places))[0]
status, ticket, run = begin(1)
assert status == 0 and run
assert commit(wrong, ticket, (run, 4096)) == -errno.EINVAL  # another endpoint's registration
assert commit(sid, ticket, (run, 4096)) == 0
for places in ((), ((run, 8192),), ((run, 4096), (run, 4096)), ((run, 2048),)):
    assert commit(sid, begin(0)[1], *places) == -errno.EINVAL, places
around = [o for o in range(max(0, run - 256 * 4096), run + 256 * 4096, 4096) if o != run]
for place in [*around, 1 << 40, (1 << 64) - 4096]:
    assert commit(sid, begin(0)[1], (place, 4096)) == -errno.EFAULT, hex(place)  # nothing of it is ours
ask(lib.MIC_SCIF_DROP, data=b"".join(segment.pack(o, 4096) for o in around))
loot = scif.alloc(512 * 4096)
loot[:] = b"B" * len(loot)
ep.register(loot)
print("out")
"""


def test_scif_135_a_program_reaches_no_pages_of_others(server: Server) -> None:
    """It registers what is another's, finishes what another endpoint began, and gives back what it does not hold."""
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    pipe = subprocess.PIPE
    tenant = subprocess.Popen(
        [sys.executable, "-c", TENANT], env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert tenant.stdout is not None
    assert tenant.stdout.readline() == "ready\n"
    burglar = subprocess.run(
        [sys.executable, "-c", BURGLAR], env=env, timeout=40, capture_output=True, text=True
    )
    out, said = tenant.communicate("go on\n", timeout=20)
    assert (burglar.stdout, burglar.stderr) == ("out\n", "")
    assert (out, said) == ("unharmed\n", "")
    assert settled(server) == server.idle


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packets=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_scif_135_rubbish_on_the_socket(server: Server, packets: list[bytes]) -> None:
    """Any bytes on a new connection: it is closed, the node serves the next one."""
    with connect(server) as sock, contextlib.suppress(OSError):
        for p in packets:
            sock.send(p)
    with connect(server) as sock:
        assert struct.unpack_from("<i", call(sock, lib.MIC_SCIF_HELLO))[0] == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(
        st.tuples(st.sampled_from(OPS), st.booleans(), st.tuples(*[NUMBERS] * 6), st.binary(max_size=64)),
        max_size=8,
    )
)
def test_scif_135_any_request_with_any_arguments(
    server: Server, requests: list[tuple[int, bool, tuple[int, ...], bytes]]
) -> None:
    """Every request with arbitrary arguments ends in an answer or a closed connection, nothing stays."""
    waits = {lib.MIC_SCIF_CANCEL, lib.MIC_SCIF_CONNECT, lib.MIC_SCIF_ACCEPT}
    with connect(server) as endpoint, connect(server) as control, contextlib.suppress(OSError):
        sid = random.getrandbits(64) | 1
        endpoint.send(REQUEST.pack(lib.MIC_SCIF_OPEN, 0, 0, 12345, sid, 0, 0, 0, 0))
        call(control, lib.MIC_SCIF_HELLO, args=(1,))
        for op, ours, args, data in requests:
            if op in waits:
                continue
            if not call(control, op & 0xFFFFFFFF, sid if ours else args[0], args, data):
                break
    with connect(server) as sock:
        assert struct.unpack_from("<i", call(sock, lib.MIC_SCIF_HELLO))[0] == 0
    assert settled(server) == server.idle


def test_scif_135_descriptors_that_nobody_asked_for(server: Server) -> None:
    """A first packet may bring one descriptor along: the node keeps none of those that others bring."""
    with open("/dev/null") as null:
        for count in (1, 2, 3, 253):
            for packet in (b"", REQUEST.pack(lib.MIC_SCIF_HELLO, 0, 0, 1, 0, 0, 0, 0, 0)):
                with connect(server) as sock:
                    socket.send_fds(sock, [packet + b"?" * (not packet)], [null.fileno()] * count)
                    sock.recv(1 << 17)  # an answer, or the end
    assert settled(server) == server.idle


def test_scif_135_random_messages_on_the_node_queue() -> None:
    """20000 random and nearly right messages from a card: logged and dropped, the link goes on."""

    async def main() -> None:
        rng = random.Random(7)
        async with fabric(2) as fab:
            card = fab.cards[0]
            ids = [*fab.host.endpoints, fab.host.open().id, 1, 0, (1 << 64) - 1]
            quiet = {Op.INIT, Op.EXIT, Op.EXIT_ACK}
            for _ in range(20000):
                if rng.random() < 0.3:
                    msg = Msg.unpack(rng.randbytes(MSG_SIZE))
                else:
                    op = rng.choice([o for o in Op if o not in quiet])
                    words = [rng.choice([*ids, rng.getrandbits(rng.choice((8, 20, 63)))]) for _ in range(4)]
                    msg = Msg(op, (1, rng.randrange(4)), (rng.choice((0, 0, 2)), rng.randrange(4)), *words)
                card.card_link.send(msg)
                await asyncio.sleep(0) if rng.random() < 0.05 else None
            want = card.card_link.sent
            await eventually(lambda: card.host_link.received >= want, "the last message", 40)
            assert fab.host.node_ids() == [0, 1, 2]
            listener = fab.host.open()
            listener.bind(77)
            listener.listen(1)
            client = card.node.open()
            _, conn = await asyncio.gather(client.connect((0, 77)), listener.accept())
            await client.send(b"alive")
            assert await conn.recv(5) == b"alive"
            await asyncio.gather(client.close(), conn.close())

    asyncio.run(asyncio.wait_for(main(), 50))


def test_a_card_that_says_init_again_and_again() -> None:
    """It has been introduced to the others once: each time would cost the host a task and a connection to their programs."""

    async def main() -> None:
        async with fabric(2) as fab:
            card = fab.cards[0]
            introduced = 0
            begin = fab.host.members._introduce

            async def introduce(i: int, j: int) -> None:
                nonlocal introduced
                introduced += 1
                await begin(i, j)

            fab.host.members._introduce = introduce  # type: ignore[method-assign]
            for _ in range(20):
                card.card_link.send(Msg(Op.INIT, (1, 0), (0, 0)))
            want = card.card_link.sent
            await eventually(lambda: card.host_link.received >= want, "the last message", 40)
            await asyncio.sleep(0)
            assert introduced == 0
            assert fab.host.node_ids() == [0, 1, 2]

    asyncio.run(asyncio.wait_for(main(), 50))


def test_scif_19_a_program_whose_name_is_no_text_is_asked_for_its_capabilities() -> None:
    """Any bytes are a name; who is not root needs CAP_SYS_ADMIN for a low port (D14)."""
    rename = "open('/proc/self/comm', 'wb').write(b'\\xff\\xfe'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        program.stdout.readline()
        with open(f"/proc/{program.pid}/status", "rb") as f:
            status = f.read()
        assert b"\xff\xfe" in status or b"\\xff" in status
        able = int(status.partition(b"CapEff:")[2].split()[0], 16) >> 21 & 1
        assert caller_is_privileged(program.pid, 1000) == bool(able)
        program.communicate(b"\n")


def test_a_card_that_comes_and_goes_without_end() -> None:
    """INIT and EXIT in turn: one introduction to each other card at a time, however slow that card's programs are, and
    the last INIT has one that begins after it."""

    async def main() -> None:
        async with fabric(2) as fab:
            card, members = fab.cards[0], fab.host.members
            running = most = begun = 0
            free = asyncio.Event()
            begin = members._introduce

            async def introduce(i: int, j: int) -> None:
                nonlocal running, most, begun
                begun += 1
                running += 1
                most = max(most, running)
                try:
                    await free.wait()
                    await begin(i, j)
                finally:
                    running -= 1

            members._introduce = introduce  # type: ignore[method-assign]
            for _ in range(20):
                card.card_link.send(Msg(Op.EXIT, (1, 0), (0, 0)))
                card.card_link.send(Msg(Op.INIT, (1, 0), (0, 0)))
            want = card.card_link.sent
            await eventually(lambda: card.host_link.received >= want, "the last message", 40)
            await eventually(lambda: running, "the first introduction", 40)
            assert begun == 1
            free.set()
            await eventually(lambda: not members._introducing, "the end of the introductions", 40)
            assert (begun, most) == (2, 1)
            assert fab.host.node_ids() == [0, 1, 2]

    asyncio.run(asyncio.wait_for(main(), 50))
