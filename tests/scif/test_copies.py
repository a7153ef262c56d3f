"""Copies on DMA channels under faults: that they really are there, and what programs see when they fail."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scif_server import HERE, PACKAGE, Server, settled

from mic_emu import scif
from mic_emu.testing.machine import eventually

MIB = 1 << 20
ROUTES = {"0-1": range(4), "1-0": range(4, 8), "1-1": range(4, 8)}  # the channels of the node that copies
FAST = "0.1"  # the engine counts as stuck after 0.3 s instead of 3


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bin") / "copies"
    sources = [str(HERE / "c" / f"{n}.c") for n in ("copies", "main")]
    command = ["cc", "-std=gnu11", "-O1", "-g", "-pthread", f"-I{PACKAGE / 'include'}", *sources]
    subprocess.run([*command, f"-L{PACKAGE / 'lib'}", "-lscif", "-o", str(out)], check=True)
    return out


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    s = Server(tmp_path, 2, SCIF_TEST_API_TIME=getattr(request, "param", "1"))
    yield s
    assert s.stop() == 0


class Client:
    """A program that issues ``count`` large copies with ``flags``, and waits for their mark in another thread."""

    def __init__(self, program: Path, server: Server, route: str, count: int = 1, flags: int = 0) -> None:
        env = {**server.env(route), "DIALOG": str(count), "FLAGS": str(flags)}
        self.process = subprocess.Popen(
            [program, "dialog"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.hear() == "ready"

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def copy(self) -> str:
        """Issue the copies: "under way" or "copied", as the destination shows just afterwards."""
        self.say("copy")
        return self.hear()

    def fence(self) -> tuple[int, str]:
        """What the wait for the mark gave, and what the destination shows then."""
        return int(self.hear()), self.hear()

    def end(self) -> None:
        self.say("end")
        assert self.hear() == "closed"
        assert self.process.wait(20) == 0


@contextlib.contextmanager
def client(program: Path, server: Server, route: str, count: int = 1, flags: int = 0) -> Iterator[Client]:
    c = Client(program, server, route, count, flags)
    try:
        yield c
    finally:
        c.process.kill()
        c.process.communicate()


def copied(server: Server, card: int = 1) -> list[int]:
    """Bytes that each channel's engine has copied."""
    rows = server.ask(f"stats {card}")
    assert isinstance(rows, list)
    return [row["bytes"] for row in rows]


def memory(server: Server, node: int = 0) -> int:
    """Bytes of a node's memory that are in use beyond what an idle one uses."""
    return grown(server, node, "used")


def grown(server: Server, node: int, what: str) -> int:
    """How much more a node has of something than an idle one."""
    now, idle = server.ask("state"), server.idle
    assert isinstance(now, list)
    assert isinstance(idle, list)
    return int(now[node][what]) - int(idle[node][what])


@pytest.mark.parametrize("route", ROUTES)
def test_scif_2_13_an_asynchronous_copy_returns_before_it_is_done(
    lab: Server, program: Path, route: str
) -> None:
    """SCIF 2.13: the channels of the caller's node stand still: the call returns, the fence waits for them;
    when they go on, every byte is there, and their counters say who moved it."""
    for c in ROUTES[route]:
        lab.ask(f"pause 1 {c}")
    with client(program, lab, route, count=3) as p:
        assert p.copy() == "under way"
        assert sum(copied(lab)) == 0
        for c in ROUTES[route]:
            lab.ask(f"resume 1 {c}")
        assert p.fence() == (0, "copied")
        rows = copied(lab)
        assert sum(rows) == sum(rows[c] for c in ROUTES[route]) == 3 * 4 * MIB
        assert sorted(rows)[-2] == 0, "one endpoint uses one channel"
        p.end()
    assert settled(lab) == lab.idle


@pytest.mark.parametrize("flags", [scif.RMA_USECPU, scif.RMA_SYNC, scif.RMA_SYNC | scif.RMA_ORDERED])
def test_scif_111_a_large_copy_that_must_be_complete_is_when_the_call_returns(
    lab: Server, program: Path, flags: int
) -> None:
    """SCIF-111: although the channels, which make such copies without the flags, stand still."""
    for c in ROUTES["0-1"]:
        lab.ask(f"pause 1 {c}")
    with client(program, lab, "0-1", flags=flags) as p:
        assert p.copy() == "copied"
        assert p.fence() == (0, "copied")
        p.end()
    for c in ROUTES["0-1"]:
        lab.ask(f"resume 1 {c}")


@pytest.mark.parametrize("route", ["0-0", "1-2"])
def test_scif_2_13_no_engine_reaches_the_hosts_loopback_and_other_cards(
    lab: Server, program: Path, route: str
) -> None:
    """SCIF 2.13: there the caller copies, complete when the call returns."""
    with client(program, lab, route) as p:
        assert p.copy() == "copied"
        assert p.fence()[1] == "copied"
        assert sum(copied(lab, 1)) == sum(copied(lab, 2)) == 0
        p.end()


def test_scif_2_13_endpoints_take_the_channels_in_turn(lab: Server, program: Path) -> None:
    """SCIF 2.13: four endpoints of one node use its four channels."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(program, lab, "0-1")) for _ in range(4)]
        for p in clients:
            p.copy()
            assert p.fence() == (0, "copied")
        assert copied(lab) == [4 * MIB] * 4 + [0] * 4
        for p in clients:
            p.end()


@pytest.mark.parametrize("route", ["0-1", "1-0"])
def test_scif_119_a_halted_channel_fails_its_marks_and_nothing_else(
    lab: Server, program: Path, route: str
) -> None:
    """SCIF-119: the mark can never complete: ETIMEDOUT, at once, again and again; the next endpoint gets a
    channel that works; unregister and close do not hang, no page is lost."""
    first = ROUTES[route][0]
    lab.ask(f"fault 1 dma-fail channel={first} error=memory count=1")
    with client(program, lab, route, count=2) as bad, client(program, lab, route) as good:
        assert bad.copy() == "under way"
        assert bad.fence() == (110, "not copied")
        good.copy()
        assert good.fence() == (0, "copied")
        rows = lab.ask("stats 1")
        assert isinstance(rows, list)
        assert [c for c in range(8) if rows[c]["faults"]] == [first]
        good.end()
        bad.end()
    assert settled(lab) == lab.idle


@pytest.mark.parametrize("lab", [FAST], indirect=True)
def test_scif_119_a_stuck_channel_is_given_up(lab: Server, program: Path) -> None:
    """SCIF-119, 2.13 row 11: no progress for 3 s: ETIMEDOUT. The channel's pages stay until it has let go:
    here it writes a second later what it had begun."""
    for c in ROUTES["0-1"]:
        lab.ask(f"fault 1 dma-delay channel={c} delay=1500ms count=1")
    with client(program, lab, "0-1") as p:
        assert p.copy() == "under way"
        assert p.fence() == (110, "not copied")
        p.end()
    lab.ask("heal 1")
    held = memory(lab)
    assert held >= 4 * MIB or sum(copied(lab)), "the pages were freed under the engine"
    eventually(lambda: lab.ask("state") == lab.idle, 30, "the channel has let go of the pages")


def test_scif_118_a_lost_interrupt_only_delays(lab: Server, program: Path) -> None:
    """SCIF-118: the completion is found without its interrupt."""
    for c in ROUTES["0-1"]:
        lab.ask(f"fault 1 dma-lose-interrupt channel={c}")
    with client(program, lab, "0-1", count=2) as p:
        p.copy()
        assert p.fence() == (0, "copied")
        p.end()


@pytest.mark.parametrize("route", ["0-1", "1-0"])
@pytest.mark.parametrize("what", ["reset", "down"])
def test_scif_129_a_card_that_goes_away_under_copies(
    lab: Server, program: Path, what: str, route: str
) -> None:
    """SCIF-129: a reset cuts off the copies, or their card is lost while a channel is in the middle of one:
    ECONNRESET, never a hang, nothing lost; a new connection copies again."""
    for c in ROUTES[route]:
        lab.ask(f"fault 1 dma-delay channel={c} delay=100ms")
    with client(program, lab, route, count=30) as p:  # three seconds of copies
        assert p.copy() == "under way"
        lab.ask(f"{what} 1")
        lab.ask("heal 1")
        assert p.fence() == (104, "disconnected" if what == "down" else "not copied")
        if what == "down":
            lab.ask("up 1 bank")
    eventually(lambda: memory(lab) == 0, 30, "every page is free")
    with client(program, lab, route) as p:
        p.copy()
        assert p.fence() == (0, "copied")
        p.end()


@pytest.mark.parametrize("lab", ["10"], indirect=True)
@pytest.mark.parametrize("route", ["0-1", "1-0"])
def test_scif_114_a_killed_program_leaves_its_pages_to_the_engine(
    lab: Server, program: Path, route: str
) -> None:
    """SCIF-114: whoever dies with copies under way: their pages stay until the channel has ended them, then
    everything is free."""

    node = int(route[0])
    for c in ROUTES[route]:
        lab.ask(f"pause 1 {c}")
    with client(program, lab, route, count=4) as p:
        assert p.copy() == "under way"
        p.process.kill()
        eventually(lambda: grown(lab, node, "controls") == 0, 20, "its node knows that it is dead")
        for _ in range(200):  # the nodes could tell each other whatever they liked
            assert memory(lab, node) >= 4 * MIB, "the pages were freed under the engine"
        for c in ROUTES[route]:
            lab.ask(f"resume 1 {c}")
    for c in ROUTES[route]:
        lab.ask(f"fault 1 dma-delay channel={c} delay=20ms")
    for _ in range(2):  # in the middle of its copies, most likely
        with client(program, lab, route, count=4) as p:
            p.copy()
            p.process.kill()
    lab.ask("heal 1")
    assert settled(lab) == lab.idle


def test_scif_135_more_copies_than_the_node_queues(lab: Server, program: Path) -> None:
    """SCIF-135: beyond its limit the node takes no more, and the caller copies: nothing waits for ever."""
    for c in ROUTES["0-1"]:
        lab.ask(f"pause 1 {c}")
    with client(program, lab, "0-1", count=70) as p:
        assert p.copy() == "copied"
        for c in ROUTES["0-1"]:
            lab.ask(f"resume 1 {c}")
        assert p.fence() == (0, "copied")
        assert sum(copied(lab)) == 64 * 4 * MIB
        p.end()


HOSTILE = """
import errno, os, socket, struct, sys
from mic_emu import scif
from mic_emu._native import lib
request, reply = struct.Struct("<IIQ6Q"), struct.Struct("<iI8Q")
ep = scif.Endpoint()
while True:
    try:
        ep.connect((1, 7000))
        break
    except OSError as e:
        assert e.errno == errno.ECONNREFUSED, e
there = int.from_bytes(ep.recv(8), "little")
here = ep.register(scif.alloc(1 << 20)).offset
private = ep.register(scif.alloc(4096), prot=1).offset
node = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
node.connect(os.environ["MICEMU_SCIF_SOCKET"])

def ask(op, sid=0, *args):
    node.send(request.pack(op, 0, sid, *[a % (1 << 64) for a in (*args, *[0] * 6)[:6]]))
    return reply.unpack_from(node.recv(1 << 17))

ask(lib.MIC_SCIF_HELLO, 0, 1)
own = socket.socket(fileno=os.dup(ep.fileno()))
cookie = int.from_bytes(own.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE
own.close()
sid = ask(lib.MIC_SCIF_FIND, 0, cookie)[2]
W = lib.MIC_SCIF_COPY_WRITE
for args, code in [
    ((here, there, 1 << 20, W), 0), ((here, there, 64, 0), 0), ((here, there, 128, 0xFFFFFFFF), 0),
    ((here, there, 0, W), errno.EINVAL), ((here, there, 100, W), errno.EINVAL), ((here + 8, there, 64, W), errno.EINVAL),
    ((-64, there, 64, W), errno.EINVAL), ((here, there, (1 << 64) - 64, W), errno.ENXIO),
    ((here, there + (2 << 20), 1 << 20, W), errno.ENXIO), ((here + 8192, there, 1 << 20, W), errno.ENXIO),
    ((private, there, 64, 0), errno.EPERM), ((private, there, 64, W), 0), ((0, 0, 64, W), errno.ENXIO),
]:
    got = ask(lib.MIC_SCIF_COPY, sid, *args)[0]
    assert got == -code, (args, got, code)
for mark in (0, 1, 7, 1 << 29, (1 << 30) - 1, 1 << 30, (1 << 31) - 1):
    assert ask(lib.MIC_SCIF_FENCE_WAIT, sid, mark)[0] == 0, mark
ep.fence_wait(ep.fence_mark())
ep.close()
print("survived")
"""


PEER = """
from mic_emu import scif
with scif.Endpoint() as listener:
    listener.bind(7000)
    listener.listen()
    conn, _ = listener.accept()
    conn.send(conn.register(scif.alloc(2 << 20)).offset.to_bytes(8, "little"))
    conn.recv(1)
"""


def test_scif_135_a_hostile_program_asks_for_copies(lab: Server) -> None:
    """SCIF-135: the node believes nothing that the library would have checked: range, protection, alignment."""
    env = lab.env("1-1")
    with subprocess.Popen(
        [sys.executable, "-c", PEER], env={**env, "MICEMU_SCIF_SOCKET": env["NODE1"]}
    ) as server:
        env["MICEMU_SCIF_SOCKET"] = env["NODE0"]
        done = subprocess.run(
            [sys.executable, "-c", HOSTILE], env=env, timeout=30, capture_output=True, text=True
        )
        server.kill()
    assert (done.stdout, done.stderr) == ("survived\n", "")
    assert sum(copied(lab)[:4]) == (1 << 20) + 64 + 128 + 64
    assert settled(lab) == lab.idle
