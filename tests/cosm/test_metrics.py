"""Metrics and the event stream: names, types, and that the figures move with what they count."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from typing import Any

import pytest
from drill import build, load
from prometheus_client.parser import text_string_to_metric_families

from mic_emu.testing.machine import Machine

pytestmark = pytest.mark.system
# What they must cover: states, boots, crashes, doorbells, ring depths, bytes, DMA, SCIF connections.
COVERED = {
    "micemu_card_state", "micemu_card_shutdown_status", "micemu_card_boots", "micemu_card_crashes", "micemu_doorbells",
    "micemu_vring_pending", "micemu_device_stats", "micemu_dma_bytes", "micemu_dma_transactions",
    "micemu_dma_ring_depth", "micemu_scif_connections", "micemu_scif_endpoints",
}  # fmt: skip
Key = tuple[str, tuple[tuple[str, str], ...]]


def scrape(machine: Machine) -> tuple[str, dict[str, str], dict[Key, float]]:
    """Over HTTP: content type, type by family, value by name and labels."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(machine.run_dir / "metrics.sock"))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: micemu\r\n\r\n")
        raw = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    head, _, body = raw.partition("\r\n\r\n")
    families = list(text_string_to_metric_families(body))
    assert all(f.documentation for f in families)
    samples = [s for f in families for s in f.samples]
    values = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}
    assert len(values) == len(samples), "a series stands there twice"
    kind = re.search(r"(?im)^content-type: (.*?)\r?$", head)
    assert kind
    return kind[1], {f.name: f.type for f in families}, values


def total(values: dict[Key, float], name: str, **labels: str) -> float:
    return sum(v for (n, pairs), v in values.items() if n == name and labels.items() <= dict(pairs).items())


def test_metrics_are_valid_cover_the_machine_and_move(machine: Machine) -> None:
    """The Prometheus parser takes them; counters end in _total and only grow; load shows in each."""
    machine.boot()
    kind, types, before = scrape(machine)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert types.keys() >= COVERED
    assert set(types.values()) <= {"gauge", "counter"}
    counters = {key for key in before if types.get(key[0].removesuffix("_total")) == "counter"}
    assert all(name.endswith("_total") for name, _ in counters)
    assert total(before, "micemu_scif_connections", card="mic0") == 1  # COSM
    with load(machine, build(machine)) as running:
        _, _, after = scrape(machine)
        assert total(after, "micemu_scif_connections", card="mic0") >= 9
        machine.micemu("reset", "mic0")
        running.ends(20)
    for name, labels in (
        ("micemu_doorbells_total", {"to": "host"}), ("micemu_doorbells_total", {"to": "card"}),
        ("micemu_device_stats_total", {"device": "block"}), ("micemu_device_stats_total", {"device": "net"}),
    ):  # fmt: skip
        assert total(after, name, **labels) > total(before, name, **labels), name
    assert all(after.get(key, 0) >= before[key] for key in counters)
    _, _, reset = scrape(machine)
    assert total(reset, "micemu_scif_connections", card="mic0") == 0
    assert total(reset, "micemu_card_state", card="mic0", state="ready") == 1


def test_event_stream_has_a_schema_and_samples(machine: Machine) -> None:
    """Every line has schema, time and event; `--sample` adds the metrics under the names of the scrape."""
    machine.boot("--disk", "none", "--net", "none")
    with machine.popen("events", "--recent", "--sample", "0.1", stdout=subprocess.PIPE, text=True) as stream:
        try:
            assert stream.stdout
            seen: list[dict[str, Any]] = []
            while sum(e["event"] == "sample" for e in seen) < 2:
                seen.append(json.loads(stream.stdout.readline()))
        finally:
            stream.kill()
    assert all(e["schema"] == 1 and e["time"] > 0 for e in seen)
    assert {"state", "os_start", "driver_ok", "sample"} <= {e["event"] for e in seen}
    names = {row["name"].removesuffix("_total") for row in seen[-1]["metrics"]}
    assert names >= COVERED - {"micemu_device_stats"}
    _, types, _ = scrape(machine)
    assert names <= types.keys()
