"""C programs through the public header, on a fabric of node processes; one test per C TEST()."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scif_server import HERE, PACKAGE, Server, settled

CFLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
ROUTES = ["0-0", "0-1", "1-0", "1-2"]  # the test on one node, its peer process on another


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


@pytest.mark.parametrize(("program", "test", "route"), list(cases()))
def test_c(server: Server, programs: dict[str, Path], program: str, test: str, route: str) -> None:
    """The C test passes, and afterwards the nodes hold nothing."""
    done = subprocess.run(
        [programs[program], test], env=server.env(route), timeout=58, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}(status {done.returncode})"
    assert settled(server) == server.idle
