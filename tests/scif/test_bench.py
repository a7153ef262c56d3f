"""The SCIF part of ``micemu bench`` and ``micemu scif perf``: what the tables hold, never how fast it was."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mic_emu.bench import ucx
from mic_emu.testing.machine import MICEMU, Machine

pytestmark = pytest.mark.system
LIMITS = {"shared cache line", "futex", "Unix stream", "Unix streams", "memcpy", "C", "Python daemon"}
UCX = {"UCX tag", "UCX stream", "UCX put"}
needs_two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="measures between two CPUs")


def perf(machine: Machine, path: str | None = None) -> dict[str, list[dict[str, object]]]:
    """``micemu scif perf`` between the host and the card, very short."""
    server = machine.popen(
        "run", "mic0", "--", *MICEMU, "scif", "perf", "-l", "3100", stdin=subprocess.DEVNULL
    )
    try:
        listing = ""
        while "3100" not in listing:
            listing = machine.micemu("scif", "endpoints", "mic0").stdout
            assert server.poll() is None
        if path is not None:
            machine.env["PATH"] = path
        out = machine.micemu("scif", "perf", "1", "3100", "--scale", "0.01", "--json").stdout
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
    found: dict[str, list[dict[str, object]]] = json.loads(out)
    return found


def limits(rows: list[dict[str, object]]) -> set[str]:
    return {str(r["name"]).rpartition("(")[2].rstrip(")") for r in rows}


@needs_two_cpus
@pytest.mark.timeout(300)
def test_scif_perf_without_ucx_says_how_to_get_it(machine: Machine, tmp_path: Path) -> None:
    """Every figure has its limit from the same run; the missing one is named."""
    machine.boot("--disk", "none", "--net", "none")
    table = perf(machine, str(tmp_path))
    assert limits(table["rows"]) == LIMITS
    for row in table["rows"]:
        value, limit, ratio = (row[k] for k in ("value", "limit", "ratio"))
        assert isinstance(value, float)
        assert isinstance(limit, float)
        assert ratio == value / limit > 0
    assert table["notes"] == [ucx.MISSING]


@needs_two_cpus
@pytest.mark.peer("ucx_perftest")
@pytest.mark.timeout(300)
def test_scif_perf_beside_ucx(machine: Machine) -> None:
    """UCX's own program, in the same run: tag latency, tag and stream bandwidth, put bandwidth."""
    machine.boot("--disk", "none", "--net", "none")
    table = perf(machine)
    assert limits(table["rows"]) == LIMITS | UCX
    assert all(isinstance(r["limit"], float) and r["limit"] > 0 for r in table["rows"])
    assert table["notes"] == []


@needs_two_cpus
@pytest.mark.timeout(300)
def test_bench_scif_between_host_and_card(machine: Machine) -> None:
    """``micemu bench scif`` boots an instance of its own and leaves nothing of it."""
    out = machine.micemu("bench", "scif", "--scale", "0.01", "--json").stdout
    rows = json.loads(out)["rows"]
    assert limits(rows) >= LIMITS
    assert {r["part"] for r in rows} == {"scif"}


def test_scif_perf_needs_an_address(machine: Machine) -> None:
    """Usage errors are sentences."""
    done = machine.micemu("scif", "perf", "1", check=False)
    assert done.returncode == 2
    assert "NODE PORT" in done.stderr
    assert "Traceback" not in done.stderr
