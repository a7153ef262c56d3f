"""A node follows its programs to their CPU; whatever they say, it stays where it may run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric import fabric

from mic_emu._native import ffi, lib
from mic_emu.scif.service import ScifService, listen_at

ROW, REST_NS = 8, 20_000_000  # docs/scif.md: eight requests, a fiftieth of a second
HERE, THERE, ELSEWHERE = 1, 2, 3  # as requests tell it: one more than the number
LATE = 10**12

CLIENT = """
import os, sys
from mic_emu import scif
os.sched_setaffinity(0, {int(sys.argv[1])})
for _ in range(int(sys.argv[2])):
    with scif.Endpoint() as ep:
        ep.bind(0)
"""


class Steering:
    """Requests from CPUs, at a node that does not move."""

    def __init__(self) -> None:
        self.state = ffi.new("struct mic_scif_steer *")
        self.now = LATE

    def asks(self, *cpus: int) -> list[int]:
        """Where each request makes it go."""
        return [lib.mic_scif_steer(self.state, cpu, HERE - 1, self.now) for cpu in cpus]


STAY, GO = -1, THERE - 1


def test_steering_requests_in_a_row_from_elsewhere_are_followed() -> None:
    """Not before; and not those of programs here and there."""
    node = Steering()
    assert node.asks(*[THERE] * ROW) == [STAY] * (ROW - 1) + [GO]
    node.now += REST_NS
    assert node.asks(*[THERE] * (ROW - 1), ELSEWHERE, *[THERE] * (ROW - 1)) == [STAY] * (2 * ROW - 1)
    assert node.asks(HERE, *[THERE] * (ROW - 1)) == [STAY] * ROW
    assert node.asks(THERE) == [GO]


def test_steering_a_node_that_has_moved_rests() -> None:
    """The scheduler may have good reasons: it is not asked all the time."""
    node = Steering()
    assert node.asks(*[THERE] * ROW)[-1] == GO
    node.now += REST_NS - 1
    assert node.asks(*[THERE] * 3 * ROW) == [STAY] * 3 * ROW
    node.now += 1
    assert node.asks(THERE) == [GO]


@pytest.mark.parametrize("cpu", [0, 1025, 2**32 + THERE, 2**64 - 1])
def test_steering_what_is_no_cpu_moves_nobody(cpu: int) -> None:
    """A library that says nothing, a program that says anything."""
    assert Steering().asks(*[cpu] * 2 * ROW) == [STAY] * 2 * ROW


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """This thread may run on one CPU only."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    yield min(mine)
    os.sched_setaffinity(0, mine)


def test_steering_a_move_keeps_the_cpus_that_the_node_may_run_on() -> None:
    """They are its administrator's affair (taskset, a container)."""
    mine = os.sched_getaffinity(0)
    for cpu in mine:
        assert lib.mic_scif_go_to(cpu) == 0
        assert os.sched_getaffinity(0) == mine


def test_steering_a_node_that_may_not_run_there_stays(one_cpu: int) -> None:
    """Other CPUs of the machine, and none."""
    for cpu in (one_cpu + 1, 1023, 1024, -1, 2**31 - 1):
        assert lib.mic_scif_go_to(cpu) < 0
    assert os.sched_getaffinity(0) == {one_cpu}


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0)))
def test_steering_a_program_says_where_it_runs(cpu: int, tmp_path: Path) -> None:
    """Every request carries its CPU, so a node on another one hears of it."""

    async def main() -> None:
        async with fabric(0) as fab:
            path = tmp_path / "node0.sock"
            service = ScifService(fab.host, listen_at(path))
            service.start()
            env = {**os.environ, "MICEMU_SCIF_SOCKET": str(path)}
            program = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, str(cpu), str(2 * ROW), env=env, stderr=subprocess.PIPE
            )
            _, said = await program.communicate()
            assert program.returncode == 0, said.decode()
            assert service.steering.cpu == cpu + 1
            await service.close()

    asyncio.run(asyncio.wait_for(main(), 30))
