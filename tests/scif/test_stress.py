"""Programs that use everything at once and are killed at random; nothing wrong, nothing left."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from scif_server import HERE, PACKAGE, Server, settled


@dataclass
class Storm:
    """``processes``, each with ``2 * connections`` endpoints: it connects, and is connected to."""

    server: Server
    program: Path
    counters: Path
    processes: int
    connections: int
    seed: int

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.counters.write_bytes(bytes(8 * self.processes * self.connections))
        self.running: list[subprocess.Popen[bytes]] = []

    def launch(self, i: int) -> subprocess.Popen[bytes]:
        role = f"{i} {self.processes} {self.connections} {self.rng.randrange(1 << 31)} {self.counters}"
        return subprocess.Popen([self.program, "stress_program"], env={**self.server.env(), "STRESS": role})

    def rounds(self) -> tuple[int, ...]:
        """What each connecting thread has verified so far."""
        return struct.unpack(f"<{self.processes * self.connections}Q", self.counters.read_bytes())

    def blow(self, seconds: float, pause: float) -> None:
        """A random process is killed and started again, about every ``pause`` seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.rng.uniform(0, 2 * pause))  # the storm's own pace, not a wait for anything
            i = self.rng.randrange(self.processes)
            self.running[i].kill()
            assert self.running[i].wait() == -9, f"process {i} ended by itself"
            self.running[i] = self.launch(i)

    def abate(self, within_s: float) -> None:
        """Nobody is killed any more: every thread of every process goes on verifying."""
        before, end = self.rounds(), time.monotonic() + within_s
        while stuck := [i for i, (a, b) in enumerate(zip(before, self.rounds(), strict=True)) if b < a + 2]:
            bad = [(i, p.returncode) for i, p in enumerate(self.running) if p.poll() is not None]
            assert not bad, f"processes ended by themselves: {bad}"
            hung = [divmod(i, self.connections) for i in stuck]
            assert time.monotonic() < end, f"no round any more by (process, thread) {hung}"
            time.sleep(0.02)

    def run(self, seconds: float, pause: float, calm_s: float) -> None:
        try:
            self.running = [self.launch(i) for i in range(self.processes)]
            self.blow(seconds, pause)
            self.abate(calm_s)
        finally:
            for p in self.running:
                p.kill()
            codes = [p.wait() for p in self.running]
        assert codes == [-9] * self.processes
        assert settled(self.server) == self.server.idle


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stress") / "stress"
    c = HERE / "c"
    build = [
        "cc",
        "-O1",
        "-g",
        "-pthread",
        f"-I{PACKAGE / 'include'}",
        str(c / "stress.c"),
        str(c / "main.c"),
    ]
    subprocess.run([*build, f"-L{PACKAGE / 'lib'}", "-lscif", "-o", str(out)], check=True)
    return out


def test_scif_17_114_134_processes_killed_at_random(server: Server, program: Path, tmp_path: Path) -> None:
    """SCIF-17, 114, 134: no wrong byte, no hang, and the nodes' tables and memory are empty afterwards."""
    seed = int(os.environ.get("SCIF_STRESS_SEED", "1"))
    Storm(server, program, tmp_path / "counters", 9, 4, seed).run(seconds=4, pause=0.03, calm_s=60)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_scif_17_long_storm(program: Path, tmp_path: Path) -> None:
    """64 processes x 16 endpoints for five minutes; the node process grows by no more than its peak needs."""
    server = Server(tmp_path, 2, SCIF_TEST_MIB="768")
    seed = int(os.environ.get("SCIF_STRESS_SEED", random.randrange(1 << 30)))
    print("seed", seed)
    try:
        storm = Storm(server, program, tmp_path / "counters", 64, 8, seed)
        storm.run(seconds=20, pause=0.1, calm_s=120)
        warm = server.ask("private")
        storm.run(seconds=300, pause=0.1, calm_s=120)
        late = server.ask("private")
        print("rounds", sum(storm.rounds()), "private KiB", warm, late)
        assert isinstance(warm, int)
        assert isinstance(late, int)
        assert late < warm + 16 * 1024
    finally:
        assert server.stop() == 0
