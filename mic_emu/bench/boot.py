"""Boot and status times, idle cost and private memory of a whole emulator, in an instance of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mic_emu.proc import stat_words
from mic_emu.testing.machine import Machine

Row = dict[str, Any]
IDLE_S = 5.0
INSTALLED = {"PYTHONDONTWRITEBYTECODE": ""}  # as anywhere, modules are compiled when they are first used


def _seconds(work: list[str], env: dict[str, str], runs: int) -> float:
    """Median wall time of a command."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(work, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


def _boot_time(cards: int, runs: int) -> float:
    """Median of ``micemu boot -n cards`` from nothing, command included."""
    times = []
    for _ in range(runs + 1):
        with Machine(INSTALLED) as m:
            start = time.perf_counter()
            m.micemu("boot", "-n", str(cards))
            times.append(time.perf_counter() - start)
            m.micemu("stop")
    return sorted(times[1:])[runs // 2]  # the first builds the card image


def _tree(root: int) -> list[int]:
    """A process and everything below it."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents.setdefault(int(stat_words(entry)[1]), []).append(int(entry))
        except OSError:
            continue
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += parents.get(pid, [])
    return found


def _private(pids: list[int]) -> int:
    """Private bytes (clean and dirty) of processes."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(kb) for kb in re.findall(r"Private_(?:Clean|Dirty):\s+(\d+)", text)) << 10
    return total


def _cpu(pids: list[int]) -> float:
    """CPU seconds that processes have used."""
    ticks = 0
    for pid in pids:
        try:
            fields = stat_words(pid)
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _idle() -> list[Row]:
    """Four cards that do nothing."""
    with Machine(INSTALLED) as m:
        status = m.boot("-n", "4")
        pids = _tree(status["host"]["init"])
        before = _cpu(pids)
        time.sleep(IDLE_S)
        used = (_cpu(pids) - before) / IDLE_S * 100
        private = _private(pids) / 4 / 1e6
    return [
        {"name": "idle, four cards", "value": used, "unit": "% of a CPU", "limit": 1.0, "bar": "<= 1", "ratio": used},
        {"name": "private memory per card", "value": private, "unit": "MB", "limit": 60.0, "bar": "<= 60", "ratio": private / 60},
    ]  # fmt: skip


def rows(scale: float = 1.0) -> list[Row]:
    """Limit of the times: the start of a Python process on this machine, measured in the same run."""
    runs = max(3, int(5 * scale))
    python = _seconds([sys.executable, "-c", "pass"], {**os.environ, **INSTALLED}, runs)
    out: list[Row] = []
    for name, seconds, bar in (
        ("boot to online, 1 card", _boot_time(1, runs), 0.5),
        ("boot to online, 4 cards", _boot_time(4, runs), 1.0),
    ):
        out.append(
            {
                "name": name,
                "value": seconds,
                "unit": "s",
                "limit": python,
                "bar": f"<= {bar} s",
                "ratio": seconds / python,
            }
        )
    with Machine(INSTALLED) as m:
        m.boot()
        status = _seconds([sys.executable, "-m", "mic_emu.cli", "status"], m.env, runs)
    out.append(
        {
            "name": "micemu status",
            "value": status,
            "unit": "s",
            "limit": python,
            "bar": "<= 0.15 s",
            "ratio": status / python,
        }
    )
    return out + _idle()
