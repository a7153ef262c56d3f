"""virtio-net beside its yardstick: two TAPs joined by a plain copier, measured in turns in one run.

Three contestants with the same programs (iperf3, ping): the yardstick, a booted card, and the two C
loops alone with hand-built rings, which shows what the rest of the stack costs.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mic_emu import netns
from mic_emu.testing.machine import Machine
from mic_emu.testing.netpair import BridgedEnds, NetPair
from mic_emu.virtio import net

Row = dict[str, Any]
PORT = "5901"
BARS = {
    "TCP to the card": ">= 0.8",
    "TCP from the card": ">= 0.8",
    "ping every 2 ms": "<= 1.3",
    "ping flood": "-",
}


class Ends(Protocol):
    """Two hosts that reach each other and run programs."""

    host_ip: str
    card_ip: str

    def popen(self, side: str, argv: Sequence[str], **kw: Any) -> subprocess.Popen[str]:
        """Start a program at ``host`` or ``card``."""

    def run(self, side: str, argv: Sequence[str], timeout_s: float = 30) -> str:
        """Run one to its end; its output."""


class Booted:
    """A booted card; programs start through ``micemu run``. Context manager."""

    def __init__(self) -> None:
        self.host_ip = net.host_address(0).split("/")[0]
        self.card_ip = net.card_address(0).split("/")[0]
        self._machine = Machine()
        self._machine.boot("--net", "ns")

    def _words(self, side: str, argv: Sequence[str]) -> list[str]:
        return ["run", "host" if side == "host" else "mic0", "--", *argv]

    def popen(self, side: str, argv: Sequence[str], **kw: Any) -> subprocess.Popen[str]:
        """Start a program at ``host`` or ``card``."""
        return self._machine.popen(*self._words(side, argv), text=True, stdin=subprocess.DEVNULL, **kw)

    def run(self, side: str, argv: Sequence[str], timeout_s: float = 30) -> str:
        """Run one to its end; its output."""
        return self._machine.micemu(*self._words(side, argv), timeout=timeout_s).stdout

    def __enter__(self) -> Booted:
        return self

    def __exit__(self, *exc: object) -> None:
        self._machine.close()


def tcp_gbps(ends: Ends, server: str, client: str, seconds: float) -> float:
    """TCP throughput in Gb/s with one iperf3 stream from ``client`` to ``server``."""
    addr = ends.host_ip if server == "host" else ends.card_ip
    argv = ["iperf3", "-s", "-1", "--forceflush", "-p", PORT]
    with ends.popen(server, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as srv:
        try:
            assert srv.stdout
            for line in srv.stdout:
                if "listening" in line:
                    break
            report = ends.run(
                client, ["iperf3", "-c", addr, "-p", PORT, "-t", f"{seconds:g}", "-J"], seconds + 20
            )
        finally:
            srv.terminate()
    return float(json.loads(report)["end"]["sum_received"]["bits_per_second"]) / 1e9


def ping_us(ends: Ends, client: str, count: int, interval_s: float = 0.002) -> float:
    """Median round trip of ping in microseconds."""
    addr = ends.host_ip if client == "card" else ends.card_ip
    argv = ["ping", "-n", "-c", str(count), "-i", str(interval_s), addr]
    out = ends.run(client, argv, count * interval_s + 20)
    return statistics.median(float(t) * 1000 for t in re.findall(r"time=([0-9.]+) ms", out))


def flood_us(ends: Ends, client: str, count: int) -> float:
    """Mean round trip of a flood ping in microseconds."""
    addr = ends.host_ip if client == "card" else ends.card_ip
    out = ends.run(client, ["ping", "-n", "-q", "-f", "-c", str(count), addr], 60)
    found = re.search(r"= [0-9.]+/([0-9.]+)/", out)
    if not found:
        raise OSError(f"ping said: {out}")
    return float(found[1]) * 1000


def rows(scale: float = 1.0) -> list[Row]:
    """Gb/s: more is better; us: less is better. ``scale`` 1 takes about a minute.

    Raises OSError when iperf3, ping or the namespaces are missing.
    """
    for program in ("iperf3", "ping"):
        if not shutil.which(program):
            raise FileNotFoundError(f"{program} is not installed")
    found = netns.probe()
    if found.mode != "ns":
        raise OSError(found.errno, f"no TAPs to measure with: {found.reason}")
    seconds, pings = max(0.5, 1.5 * scale), max(100, int(400 * scale))
    figures: dict[str, tuple[str, Callable[[Ends], float]]] = {
        "TCP to the card": ("Gb/s", lambda e: tcp_gbps(e, "card", "host", seconds)),
        "TCP from the card": ("Gb/s", lambda e: tcp_gbps(e, "host", "card", seconds)),
        "ping every 2 ms": ("us", lambda e: ping_us(e, "host", pings)),
        "ping flood": ("us", lambda e: flood_us(e, "host", 10 * pings)),
    }
    features = net.accepted_features(net.MODERN_FEATURES)
    contestants: dict[str, Callable[[], Any]] = {
        "limit": BridgedEnds,
        "booted card": Booted,
        "loops alone": lambda: NetPair(features),
    }
    seen: dict[tuple[str, str], list[float]] = {}
    for _ in range(3):
        for who, make in contestants.items():
            with make() as ends:
                for name, (_, measure) in figures.items():
                    seen.setdefault((name, who), []).append(measure(ends))
    out: list[Row] = []
    for name, (unit, _) in figures.items():
        limit = statistics.median(seen[name, "limit"])
        for who in ("booted card", "loops alone"):
            value = statistics.median(seen[name, who])
            row = {"name": f"virtio-net {name}, {who}", "value": value, "unit": unit, "limit": limit}
            out.append({**row, "ratio": value / limit, "bar": BARS[name]})
    return out
