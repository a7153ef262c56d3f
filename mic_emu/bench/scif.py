"""SCIF between a program on the host and one on a booted card, beside the limits of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from mic_emu import scif
from mic_emu.bench import ucx
from mic_emu.bench.scif_peer import Client
from mic_emu.bench.scif_rows import Bench, cpus
from mic_emu.testing.machine import Machine, eventually

Row = dict[str, Any]
CARD, PORT = 1, 3999


def notes() -> list[str]:
    """What is missing for the whole table, and how to get it."""
    return [] if ucx.available() else [ucx.MISSING]


def _connect() -> scif.Endpoint | None:
    ep = scif.Endpoint()
    try:
        ep.connect((CARD, PORT))
    except scif.ScifError:
        ep.close()
        return None
    return ep


def rows(scale: float = 1.0) -> list[Row]:
    """All SCIF figures as {name, value, unit, limit, ratio}, some with a bar. ``scale`` 1 takes about 40 s."""
    allowed = os.sched_getaffinity(0)
    before = os.environ.get("MICEMU_SCIF_SOCKET")
    with Machine() as machine:
        machine.boot("--disk", "none", "--net", "none")
        os.environ["MICEMU_SCIF_SOCKET"] = str(machine.run_dir / "scif.sock")
        command = [sys.executable, "-m", "mic_emu.cli", "scif", "perf", "-l", str(PORT)]
        server = machine.popen("run", "mic0", "--", *command, stdin=subprocess.DEVNULL)
        try:
            with eventually(_connect, 20, "a connection to the serving program on the card") as ep:
                return list(Bench(Client(ep, cpus()), CARD, scale).rows())
        finally:
            os.sched_setaffinity(0, allowed)
            if before is None:
                del os.environ["MICEMU_SCIF_SOCKET"]
            else:
                os.environ["MICEMU_SCIF_SOCKET"] = before
            server.terminate()
            server.wait()
