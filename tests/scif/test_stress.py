"""Programs that use everything at once and are killed at random; nothing wrong, nothing left."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from scif_server import HERE, PACKAGE, Server, settled


def launch(server: Server, program: Path, node: int, role: str) -> subprocess.Popen[bytes]:
    env = {**server.env(f"{node}-{node}"), "STRESS": role}
    return subprocess.Popen([program, "stress_program"], env=env)


def storm(server: Server, program: Path, clients: int, seconds: float, seed: int) -> None:
    """Servers on two nodes, clients on three; a random process is killed every few milliseconds."""
    rng = random.Random(seed)
    roles = [(0, "server 7000"), (1, "server 7001")]
    roles += [(i % 3, f"client {i % 2} {7000 + i % 2} {seed + i}") for i in range(clients)]
    running = [launch(server, program, *r) for r in roles]
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.005, 0.05))  # the storm's own pace, not a wait for anything
            i = rng.randrange(len(running))
            running[i].kill()
            assert running[i].wait() in (-9, 0), f"{roles[i]} ended by itself"
            running[i] = launch(server, program, *roles[i])
        bad = [p.returncode for p in running if p.poll() is not None]
        assert not bad, f"processes ended by themselves: {bad}"
    finally:
        for p in running:
            p.kill()
        codes = [p.wait() for p in running]
    assert 3 not in codes
    assert settled(server) == server.idle


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


def test_scif_17_114_134_processes_killed_at_random(server: Server, program: Path) -> None:
    """SCIF-17, 114, 134: no wrong byte, no hang, and the nodes' tables and memory are empty afterwards."""
    storm(server, program, clients=6, seconds=4, seed=int(os.environ.get("SCIF_STRESS_SEED", "1")))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_scif_17_long_storm(server: Server, program: Path) -> None:
    """The same for five minutes with 24 clients."""
    storm(server, program, clients=24, seconds=300, seed=random.randrange(1 << 30))
