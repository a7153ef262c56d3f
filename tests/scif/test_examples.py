"""The examples that users start from: built and run, host to card and back; the CLI's SCIF commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scif_server import PACKAGE, Server

EXAMPLES = PACKAGE.parent / "examples" / "scif"


def together(server: Server, first: list[str], second: list[str], nodes: tuple[int, int]) -> list[str]:
    """Run a server and a client program, each on its node; returns both outputs."""
    running = []
    for command, node in ((first, nodes[0]), (second, nodes[1])):
        env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / f"node{node}.sock")}
        running.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        )
    try:
        out = [p.communicate("ping\n" if p is running[1] else "", timeout=30)[0] for p in reversed(running)]
        assert [p.returncode for p in running] == [0, 0]
    finally:
        for p in running:
            p.kill()
            p.wait()
    return out[::-1]


@pytest.mark.parametrize(("name", "nodes"), [("echo", (0, 1)), ("rma", (1, 0)), ("flag", (2, 1))])
def test_scif_39_c_examples(server: Server, tmp_path: Path, name: str, nodes: tuple[int, int]) -> None:
    """Each C example builds with the flags that the CLI prints and does what it says."""
    micemu = [sys.executable, "-m", "mic_emu.cli", "scif", "--cflags", "--libs"]
    flags = subprocess.check_output(micemu, text=True).split()
    subprocess.run(
        [
            "cc",
            "-Wall",
            "-Wextra",
            "-Werror",
            str(EXAMPLES / f"{name}.c"),
            *flags,
            "-o",
            str(tmp_path / name),
        ],
        check=True,
    )
    program = str(tmp_path / name)
    port = str(3000 + len(name) + nodes[0])
    out = together(server, [program, "server", port], [program, "client", str(nodes[0]), port], nodes)
    assert {"echo": "hello over SCIF", "rma": "written", "flag": "round trip"}[name] in out[1]


def test_scif_39_python_work_queue(server: Server) -> None:
    """The Python example: a worker on a card, its master on the host."""
    script = [sys.executable, str(EXAMPLES / "workqueue.py")]
    out = together(server, [*script, "worker", "3100"], [*script, "master", "1", "3100"], (1, 0))
    assert "100 jobs for node 0" in out[0]
    assert "sum of 100 squares: 338350" in out[1]


def listens(process: subprocess.Popen[bytes], env: dict[str, str], port: int) -> None:
    """Wait until ``process`` listens at ``port`` of the node that ``env`` names."""
    command = [sys.executable, "-m", "mic_emu.cli", "scif", "endpoints", "--json"]
    table: dict[str, list[dict[str, object]]] = {"endpoints": []}
    while not any(e["port"] == port and e["state"] == "listening" for e in table["endpoints"]):
        table = json.loads(subprocess.check_output(command, env=env, timeout=20))
        assert process.poll() is None


def test_scif_125_cli_tables_and_cat(server: Server) -> None:
    """`micemu scif nodes`, `endpoints` and `cat` against live nodes."""
    micemu = [sys.executable, "-m", "mic_emu.cli", "scif"]
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    rows = json.loads(subprocess.check_output([*micemu, "nodes", "--json"], env=env))
    assert [r["name"] for r in rows if not r["self"]] == ["mic0", "mic1"]
    listener = subprocess.Popen(
        [*micemu, "cat", "-l", "3200"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    listens(listener, env, 3200)
    other = {**env, "MICEMU_SCIF_SOCKET": str(server.where / "node1.sock")}
    subprocess.run(
        [*micemu, "cat", "0", "3200"], env=other, input=b"through the cat\n", check=True, timeout=20
    )
    assert listener.communicate(timeout=20)[0] == b"through the cat\n"


def test_scif_125_cat_carries_megabytes_both_ways_at_once(server: Server, tmp_path: Path) -> None:
    """Neither side waits for the other to read first; a listener with nothing on its input only receives."""
    micemu = [sys.executable, "-m", "mic_emu.cli", "scif", "cat"]
    env = [{**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / f"node{n}.sock")} for n in (0, 1)]
    payload = os.urandom(3 << 20)

    def transfer(listen_input: bytes, connect_input: bytes, port: int) -> tuple[list[bytes], list[int], str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        listener = subprocess.Popen([*micemu, "-l", str(port)], env=env[0], **pipes)  # type: ignore[call-overload]
        listens(listener, env[0], port)
        connector = subprocess.Popen([*micemu, "host", str(port)], env=env[1], **pipes)  # type: ignore[call-overload]
        out, said = [b"", b""], [b"", b""]

        def drive(i: int, process: subprocess.Popen[bytes], data: bytes) -> None:
            out[i], said[i] = process.communicate(data, timeout=40)

        threads = [
            threading.Thread(target=drive, args=args)
            for args in ((0, listener, listen_input), (1, connector, connect_input))
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return out, [listener.returncode, connector.returncode], b"".join(said).decode()

    assert transfer(b"", payload, 3210) == ([payload, b""], [0, 0], "")
    got, status, said = transfer(payload, payload, 3211)
    # Whoever has sent everything first ends: the other has all of it, and says what of its own was on the way.
    assert payload in got
    assert all(payload.startswith(g) for g in got)
    lost = [got[1 - i] != payload and "not sent" in said for i in (0, 1)]
    assert all(s == 0 or lost[i] for i, s in enumerate(status))


def test_scif_125_cat_says_that_input_is_left_over(server: Server) -> None:
    """The peer closes in the middle of a transfer: status 1, not a success."""
    env = [{**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / f"node{n}.sock")} for n in (0, 1)]
    micemu = [sys.executable, "-m", "mic_emu.cli", "scif", "cat"]
    script = "from mic_emu import scif\nl = scif.Endpoint()\nl.bind(3220)\nl.listen()\n"
    script += "ep, _ = l.accept()\nep.recv(10)\nep.close()"
    peer = subprocess.Popen([sys.executable, "-c", script], env=env[0])
    listens(peer, env[0], 3220)
    done = subprocess.run(
        [*micemu, "host", "3220"], input=bytes(100_000), env=env[1], capture_output=True, timeout=40
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"micemu: the peer closed with \d+ bytes of the input not sent\n", done.stderr)
    assert peer.wait(20) == 0
