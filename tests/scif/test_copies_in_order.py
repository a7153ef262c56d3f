"""Copies on DMA channels that stand still, or leave something out: what is never seen too early (SCIF-112, 118)."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scif_server import Server

MIB = 1 << 20
HOSTS, CARDS = range(4), range(4, 8)  # channels


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Server]:
    s = Server(tmp_path, 1, SCIF_TEST_API_TIME="10")  # a channel that is paused is not stuck soon
    yield s
    assert s.stop() == 0


ISSUER = """
from mic_emu import scif
listener = scif.Endpoint(); listener.bind(7001); listener.listen()
conn, _ = listener.accept()
mine = scif.alloc(4 << 20); mine[:] = b"p" * len(mine)
here, there = conn.register(mine).offset, int.from_bytes(conn.recv(8), "little")
conn.writeto(here, len(mine), there, 0)
conn.send(b"i")
conn.recv(1)
"""
WAITER = """
import sys
from mic_emu import scif
ep = scif.Endpoint()
while True:
    try:
        ep.connect((1, 7001))
        break
    except scif.ScifError:
        pass
memory = scif.alloc(4 << 20)
window = ep.register(memory)
ep.send(window.offset.to_bytes(8, "little"))
ep.recv(1)
if sys.argv[1] == "fence":
    mark = ep.fence_mark(2)
    print("begins", flush=True)
    ep.fence_wait(mark)
else:
    print("begins", flush=True)
    window.unregister()
print(memory[:].count(b"p"), flush=True)
"""


@pytest.mark.parametrize("what", ["fence", "unregister"])
def test_scif_114_118_what_waits_for_the_channel_of_the_peer(lab: Server, what: str) -> None:
    """The peer's copy is behind a channel that stands still. SCIF-118: a wait for its mark ends with the copy.
    SCIF-114: unregistering the window that it goes to, too."""
    for c in CARDS:
        lab.ask(f"pause 1 {c}")
    env = [{**lab.env(), "MICEMU_SCIF_SOCKET": str(lab.where / f"node{n}.sock")} for n in (0, 1)]
    with (
        subprocess.Popen([sys.executable, "-c", ISSUER], env=env[1]) as issuer,
        subprocess.Popen(
            [sys.executable, "-c", WAITER, what], env=env[0], stdout=subprocess.PIPE, text=True
        ) as waiter,
    ):
        try:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == "begins\n"
            for _ in range(200):  # the request reaches both nodes, and an answer would be back
                lab.ask("state")
            assert select.select([waiter.stdout], [], [], 0) == ([], [], [])
            for c in CARDS:
                lab.ask(f"resume 1 {c}")
            assert waiter.stdout.readline() == f"{4 * MIB}\n"
        finally:
            waiter.kill()
            issuer.kill()


PEER = """
from mic_emu import scif
with scif.Endpoint() as listener:
    listener.bind(7000)
    listener.listen()
    conn, _ = listener.accept()
    conn.send(conn.register(scif.alloc(4 << 20)).offset.to_bytes(8, "little"))
    conn.recv(1)
"""
ORDERED = """
import sys
from mic_emu import scif
ep = scif.Endpoint()
while True:
    try:
        ep.connect((1, 7000))
        break
    except scif.ScifError:
        pass
size, there = 4 << 20, int.from_bytes(ep.recv(8), "little")
mine = scif.alloc(size)
here, got = ep.register(mine).offset, bytearray(size)
for round, line in enumerate(sys.stdin, 1):
    length, fence = map(int, line.split())
    mine[:] = bytes([round]) * size
    ep.writeto(here, length, there, scif.RMA_ORDERED)
    if fence:
        ep.fence_wait(ep.fence_mark())
    ep.vreadfrom(got, there)
    print(got[:length].count(round), int(got[length - 1] == round), flush=True)
"""


@contextlib.contextmanager
def ordered(lab: Server) -> Iterator[Callable[[int, int], tuple[int, bool]]]:
    """A program on the host that copies ``length`` bytes to a card with ORDERED, each time others, and may wait for
    the fence: how many bytes have arrived then, and has the last one?"""
    env = [{**lab.env(), "MICEMU_SCIF_SOCKET": str(lab.where / f"node{n}.sock")} for n in (0, 1)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", PEER], env=env[1]) as peer,
        subprocess.Popen(
            [sys.executable, "-c", ORDERED], env=env[0], stdin=pipe, stdout=pipe, text=True
        ) as p,
    ):

        def copy(length: int, fence: int) -> tuple[int, bool]:
            assert p.stdin is not None
            assert p.stdout is not None
            p.stdin.write(f"{length} {fence}\n")
            p.stdin.flush()
            count, last = p.stdout.readline().split()
            return int(count), last == "1"

        try:
            yield copy
        finally:
            p.kill()
            peer.kill()


def test_scif_112_a_channel_writes_the_last_line_by_itself(lab: Server) -> None:
    """SCIF-112: what it does last, when all other bytes are there, is that line and nothing else."""
    size = 4 * MIB
    with ordered(lab) as copy:
        assert copy(size, 1) == (size, True)
        rows = lab.ask("stats 1")
        assert isinstance(rows, list)
        (busy,) = [c for c in range(8) if rows[c]["bytes"]]
        got = (size, True)
        for before in reversed(range(rows[busy]["descriptors"])):  # the last ones tell of the end
            lab.ask(f"fault 1 dma-skip channel={busy} after={before} count=1")
            got = copy(size, 1)
            lab.ask("heal 1")
            if got != (size, True):
                break
        assert got == (size - 64, False)


def test_scif_112_a_tail_that_no_channel_can_write_is_never_first(lab: Server) -> None:
    """SCIF-112: the last bytes do not end a cache line; the channels stand still, whoever sees them sees all."""
    for c in HOSTS:
        lab.ask(f"pause 1 {c}")
    with ordered(lab) as copy:
        for length in (2 * MIB + 1, 3 * MIB + 63, 4 * MIB - 17):
            assert copy(length, 0) == (length, True)
        for c in HOSTS:
            lab.ask(f"resume 1 {c}")
