"""DMA faults on the channels that SCIF's own copies use: what programs on both sides see, from the command line."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mic_emu
from mic_emu.testing.machine import Machine, eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
PACKAGE = Path(mic_emu.__file__).parent
COPY = 2 << 20  # bytes of one copy of copier.c; a channel gets it from there on
# Who copies, to whom: node numbers, and the channels that the copying node has.
SIDES = {"host": ("mic0", 1, range(4)), "mic0": ("host", 0, range(4, 8))}
both_sides = pytest.mark.parametrize("side", SIDES)


@dataclass(frozen=True)
class Result:
    """What a fence gave after how many milliseconds, and the wrong bytes of each copy before it."""

    code: int
    ms: int
    wrong: list[int]


class End:
    """A program at one end of a connection; it does what it is told to (c/copier.c)."""

    def __init__(self, machine: Machine, place: str, *args: object) -> None:
        self.process = machine.popen(
            "run", place, "--", "./copier", *map(str, args), cwd=machine.home / "copier",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, command: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def result(self, command: str) -> Result:
        code, ms, *wrong = map(int, self.say(command).split())
        return Result(code, ms, wrong)

    def close(self) -> None:
        """An orderly end: nothing hangs in the endpoint."""
        assert self.say("end") == "closed"
        assert self.process.wait(20) == 0


class Copies:
    """A booted card, connections between it and the host, and the counters of its channels."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ends: list[End] = []
        where = machine.home / "copier"
        where.mkdir()
        shutil.copy2(PACKAGE / "lib" / "libscif.so.0", where)
        source = str(Path(__file__).parent / "c" / "copier.c")
        flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{PACKAGE / 'include'}", "-Wl,-rpath,$ORIGIN"]
        subprocess.run(
            ["cc", source, *flags, str(where / "libscif.so.0"), "-o", str(where / "copier")], check=True
        )
        machine.boot("--disk", "none", "--net", "none")

    def connect(self, side: str) -> tuple[End, End]:
        """An end at ``side`` that copies, and its peer. The next endpoint gets the next channel (SCIF 2.13)."""
        peer_place, peer_node, _ = SIDES[side]
        port = 3000 + len(self.ends)
        peer = End(self.machine, peer_place, "listen", port)
        end = End(self.machine, side, "connect", peer_node, port)
        self.ends += [peer, end]
        assert (peer.hear(), end.hear()) == ("ready", "ready")
        return end, peer

    def moved(self) -> list[int]:
        """Bytes that the engine has copied, by channel."""
        rows = json.loads(self.machine.micemu("dump", "dma", "mic0", "--json").stdout)
        return [row["engine"]["bytes"] for row in rows]

    def close(self) -> None:
        for end in self.ends:
            end.process.kill()
            end.process.communicate()


@pytest.fixture
def copies(machine: Machine) -> Iterator[Copies]:
    c = Copies(machine)
    yield c
    c.close()


def right(result: Result, n: int) -> bool:
    """The fence came to its end, and every byte of ``n`` copies is there."""
    return (result.code, result.wrong) == (0, [0] * n)


@both_sides
def test_dma_delay_makes_copies_and_fences_late_and_nothing_else(copies: Copies, side: str) -> None:
    """Each descriptor waits: so does the fence, by as much; the bytes are right, another channel is not slowed."""
    first = SIDES[side][2][0]
    (slow, _), (other, _) = copies.connect(side), copies.connect(side)
    with copies.machine.fault("dma-delay", delay="50ms", channel=first) as fault:
        for what in ("write 4", "read 4"):
            before = fault.hits
            result = slow.result(what)
            assert right(result, 4)
            # The mark is reached before the interrupt's own descriptor has waited.
            assert result.ms >= 50 * 4
            assert fault.hits - before >= 4
        hits = fault.hits
        assert right(other.result("write 4"), 4)
        assert fault.hits == hits
    moved = copies.moved()
    assert (moved[first], moved[first + 1]) == (8 * COPY, 4 * COPY)
    slow.close()
    other.close()


@both_sides
def test_scif_119_dma_delay_beyond_the_engines_limit_counts_as_stuck(copies: Copies, side: str) -> None:
    """SCIF 2.13 row 11, SCIF-119: no progress for 3 s: ETIMEDOUT. The channel goes on when it has let go."""
    first = SIDES[side][2][0]
    late, _ = copies.connect(side)
    with copies.machine.fault("dma-delay", delay="5s", count=1, channel=first):
        assert late.result("write 1").code == errno.ETIMEDOUT
        other, _ = copies.connect(side)
        assert right(other.result("write 4"), 4)
    late.close()
    other.close()
    ends = [copies.connect(side)[0] for _ in range(4)]

    def everybody_works() -> bool:
        before = copies.moved()[first]
        assert all(right(e.result("write 1"), 1) for e in ends)
        return copies.moved()[first] > before

    eventually(everybody_works, 20, f"copies on channel {first}")


@both_sides
def test_scif_119_dma_fail_costs_the_endpoints_of_its_channel_their_marks(copies: Copies, side: str) -> None:
    """ETIMEDOUT at once and from then on, ENOMEM for the peer's fence, EIO for a signal, which is not written;
    synchronous copies, other endpoints, the node: as ever. A reset mends the channel."""
    first = SIDES[side][2][0]
    bad, peer = copies.connect(side)
    with copies.machine.fault("dma-fail", channel=first, count=1):
        assert bad.result("write 4").code == errno.ETIMEDOUT
        good, _ = copies.connect(side)
        assert right(good.result("write 4"), 4)
        assert right(good.result("read 4"), 4)
    assert (bad.result("write 1").code, bad.result("write 1").wrong) == (errno.ETIMEDOUT, [0])
    assert bad.result("sync").wrong == [0]
    assert peer.result("mark").code == errno.ENOMEM
    assert bad.result("signal 7").code == errno.EIO
    assert peer.say("seen 7") == "no"
    moved = copies.moved()
    assert (moved[first], moved[first + 1]) == (0, 8 * COPY)
    bad.close()
    good.close()
    copies.machine.micemu("reset", "mic0")
    copies.machine.micemu("boot", "mic0")
    again, _ = copies.connect(side)
    begin = copies.moved()[first]
    ends = [again, *(copies.connect(side)[0] for _ in range(3))]
    assert all(right(e.result("write 2"), 2) for e in ends)
    assert copies.moved()[first] == begin + 2 * COPY


@both_sides
def test_scif_2_13_without_a_channel_that_works_programs_copy_themselves(copies: Copies, side: str) -> None:
    """dma-fail on every channel of the node: no error for whoever comes later, and the right bytes."""
    channels = SIDES[side][2]
    for c in channels:
        copies.machine.micemu("fault", "add", "mic0", "dma-fail", "--channel", str(c), "--count", "1")
        end, _ = copies.connect(side)
        assert end.result("write 2").code == errno.ETIMEDOUT
        end.close()
    before = copies.moved()
    last, peer = copies.connect(side)
    assert right(last.result("write 4"), 4)
    assert right(last.result("read 4"), 4)
    assert last.result("signal 9").code == 0
    assert peer.say("seen 9") == "yes"
    assert copies.moved() == before
    assert copies.machine.card()["state"] == "online"
    last.close()


@both_sides
@pytest.mark.parametrize("kind", ["dma-corrupt", "dma-skip"])
def test_dma_corrupt_and_skip_spoil_the_copies_of_their_channel_only(
    copies: Copies, side: str, kind: str
) -> None:
    """Silent, as on hardware that breaks this way: the fence says 0. One byte for each descriptor that was hit, or
    none of its bytes; another channel's copies are right meanwhile, this one's when the filter is gone."""
    first = SIDES[side][2][0]
    (bad, _), (good, _) = copies.connect(side), copies.connect(side)
    assert right(bad.result("write 4"), 4)
    with copies.machine.fault(kind, channel=first) as fault:
        for what in ("write 4", "read 4"):
            before = fault.hits
            result = bad.result(what)
            hits = fault.hits - before
            assert result.code == 0
            if kind == "dma-skip":
                assert result.wrong == [COPY] * 4
            else:
                assert 4 <= sum(result.wrong) <= hits
                assert all(result.wrong)
            assert right(good.result(what), 4)
            assert bad.result("sync").wrong == [0]
    assert right(bad.result("write 4"), 4)
    assert right(bad.result("read 4"), 4)
    bad.close()
    good.close()


@both_sides
def test_scif_118_a_fence_ends_although_every_interrupt_is_lost(copies: Copies, side: str) -> None:
    """SCIF-118: the node finds completions without their interrupts; waits of both sides end, signals come."""
    end, peer = copies.connect(side)
    with copies.machine.fault("dma-lose-interrupt") as fault:
        for _ in range(5):
            assert right(end.result("write 4"), 4)
            assert right(end.result("read 4"), 4)
        assert peer.result("mark").code == 0
        assert end.result("signal 5").code == 0
        assert peer.say("seen 5") == "yes"
        assert fault.hits >= 10
    end.close()
