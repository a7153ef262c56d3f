"""A node that is out of descriptors: no loop, one line in the log, programs are served when there are some again."""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
from pathlib import Path

import pytest
from scif_server import Server, settled

SPARE = 16  # of which the node keeps an eighth of its limit to itself
HOLDER = """
import errno, sys, time
from mic_emu import scif
first = scif.Endpoint(); first.bind()
more = [scif.Endpoint() for _ in range(30)]
def bind(ep):
    try:
        return ep.bind()
    except scif.ScifError as e:
        return -e.errno
print(bind(more[0]) > 0, bind(more[-1]) == -errno.ENFILE, flush=True)
sys.stdin.readline()
for ep in more[:-1]:
    ep.close()
end = time.monotonic() + 20
while (got := bind(more[-1])) == -errno.ENFILE and time.monotonic() < end:
    pass
print(got > 0, flush=True)
sys.stdin.readline()
"""
WAITER = "from mic_emu import scif; print(scif.Endpoint().bind() > 0, flush=True)"


def start(server: Server, code: str) -> subprocess.Popen[str]:
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def descriptors(pid: int) -> list[int]:
    return [int(fd) for fd in os.listdir(f"/proc/{pid}/fd")]


def cpu_s(pid: int) -> float:
    """Seconds that a process has run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_scif_8_a_node_without_descriptors_waits_for_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Programs wait in the queue; the node sleeps, says so once, and takes them when others have closed theirs."""
    server = Server(tmp_path, 0)
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(descriptors(pid)) + 1 + SPARE, before[1]))
    programs = []
    try:
        programs.append(holder := start(server, HOLDER))
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True True\n"
        programs.append(waiter := start(server, WAITER))
        assert waiter.stdout is not None
        assert len(descriptors(pid)) < resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] - 1, "some are kept"
        begun = cpu_s(pid)
        assert select.select([waiter.stdout], [], [], 2) == ([], [], [])
        assert cpu_s(pid) - begun < 1
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "True\n"
        assert select.select([waiter.stdout], [], [], 20)[0]
        assert waiter.stdout.readline() == "True\n"
        for p in programs:
            p.communicate(timeout=20)
            assert p.returncode == 0
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert settled(server) == server.idle
    finally:
        for p in programs:
            p.kill()
            p.wait()
        assert server.stop() == 0
    assert capfd.readouterr().err.count("cannot take another program") == 1
