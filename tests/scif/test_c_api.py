"""C programs through the public header, on a fabric of node processes; one test per C TEST()."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mic_emu

HERE = Path(__file__).parent
PACKAGE = Path(mic_emu.__file__).parent
CFLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
ROUTES = ["0-0", "0-1", "1-0", "1-2"]  # the test on one node, its peer process on another


class Server:
    """A running fabric: node sockets in ``where``, commands over its standard input."""

    def __init__(self, where: Path, cards: int, **env: str) -> None:
        self.where = where
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fabric_server.py"), str(where), str(cards)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.idle = self.ask("state")

    def ask(self, command: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def env(self, route: str = "0-0") -> dict[str, str]:
        a, b = route.split("-")
        sockets = {f"NODE{i}": str(self.where / f"node{i}.sock") for i in range(4)}
        return {**os.environ, **sockets, "A": a, "B": b, "LD_LIBRARY_PATH": str(PACKAGE / "lib")}

    def stop(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    s = Server(tmp_path_factory.mktemp("fabric"), 2)
    yield s
    assert s.stop() == 0


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every C file, compiled against the installed header and library."""
    where = tmp_path_factory.mktemp("bin")
    jobs = {}
    for source in sorted((HERE / "c").glob("*.c")):
        if source.name != "main.c":
            out = where / source.stem
            command = ["cc", *CFLAGS, f"-I{PACKAGE / 'include'}", str(source), str(HERE / "c" / "main.c")]
            jobs[source.stem] = subprocess.Popen([*command, f"-L{PACKAGE / 'lib'}", "-lscif", "-o", str(out)])
    assert all(job.wait() == 0 for job in jobs.values())
    return {name: where / name for name in jobs}


def cases() -> Iterator[object]:
    """Tests that have a peer process run on every route, the others on the host alone."""
    for source in sorted((HERE / "c").glob("*.c")):
        for name, body in re.findall(r"^TEST\((\w+)\)\n(.*?)^}", source.read_text(), re.M | re.S):
            for route in ROUTES if "with_peer" in body or "node_b" in body else ROUTES[:1]:
                yield pytest.param(source.stem, name, route, id=f"{name}-{route}")


def settled(server: Server) -> object:
    """The state of the nodes once every release has ended (asking again is the wait)."""
    state = server.ask("state")
    for _ in range(2000):
        if state == server.idle:
            break
        state = server.ask("state")
    return state


@pytest.mark.parametrize(("program", "test", "route"), list(cases()))
def test_c(server: Server, programs: dict[str, Path], program: str, test: str, route: str) -> None:
    """The C test passes, and afterwards the nodes hold nothing."""
    done = subprocess.run(
        [programs[program], test], env=server.env(route), timeout=58, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}(status {done.returncode})"
    assert settled(server) == server.idle
