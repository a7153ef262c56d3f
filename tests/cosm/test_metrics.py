"""Metrics and the event stream: names, types, and that the figures move with what they count."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from typing import Any

import pytest
from drill import build, load, signal_tree
from prometheus_client.parser import text_string_to_metric_families

from mic_emu.scif.traffic import COUNTERS, checked
from mic_emu.testing.machine import Machine, eventually
from mic_emu.wire import connect_unix

pytestmark = pytest.mark.system
# What they must cover: states, boots, crashes, doorbells, ring depths, bytes, DMA, SCIF connections.
COVERED = {
    "micemu_card_state", "micemu_card_shutdown_status", "micemu_card_boots", "micemu_card_crashes", "micemu_doorbells",
    "micemu_vring_pending", "micemu_device_stats", "micemu_dma_bytes", "micemu_dma_transactions",
    "micemu_dma_ring_depth", "micemu_scif_connections", "micemu_scif_endpoints", "micemu_scif_bytes",
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


def test_metrics_on_a_loopback_port(machine: Machine) -> None:
    """metrics_port: the same text over TCP, on 127.0.0.1 alone; a port that is taken keeps the emulator from starting."""
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))  # nobody else gets it; who listens on it may
        number = port.getsockname()[1]
        config = machine.home / "m.toml"
        config.write_text(f'metrics_port = {number}\n[[card]]\nmemory = "64M"\ndisk = "none"\nnet = "none"\n')
        machine.micemu("boot", "--config", "m.toml")
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/metrics", timeout=20) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            names = {f.name for f in text_string_to_metric_families(answer.read().decode())}
        assert names >= COVERED - {"micemu_device_stats"}
        assert f"metrics_port = {number}\n" in machine.micemu("config", "show").stdout
        machine.micemu("stop")
        port.listen()
        refused = machine.micemu("boot", "--config", "m.toml", check=False)
        assert refused.returncode == 1
        assert f"metrics_port {number} cannot be had: Address already in use" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert machine.status()["host"]["pid"] is None


def total(values: dict[Key, float], name: str, **labels: str) -> float:
    return sum(v for (n, pairs), v in values.items() if n == name and labels.items() <= dict(pairs).items())


@pytest.mark.tap
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
        running.ends(40)
    for name, labels in (
        ("micemu_doorbells_total", {"to": "host"}), ("micemu_doorbells_total", {"to": "card"}),
        ("micemu_device_stats_total", {"device": "block"}), ("micemu_device_stats_total", {"device": "net"}),
    ):  # fmt: skip
        assert total(after, name, **labels) > total(before, name, **labels), name
    assert all(after.get(key, 0) >= before[key] for key in counters)
    eventually(
        lambda: total(scrape(machine)[2], "micemu_scif_connections", card="mic0") == 0, 20, "the end of all connections"
    )  # fmt: skip
    _, _, reset = scrape(machine)
    assert total(reset, "micemu_card_state", card="mic0", state="ready") == 1


@pytest.mark.parametrize("while_open", [True, False])
def test_scif_bytes_are_counted_at_both_nodes_and_stay(machine: Machine, while_open: bool) -> None:
    """A million bytes to a card: sent by node 0, received by node 1; looked at while open or only after the close."""
    machine.boot("--disk", "none", "--net", "none")
    size = 1_000_000
    script = f"""import mic_emu.scif as scif, sys
listener = scif.Endpoint(); listener.bind(3000); listener.listen(1)
print("listens", flush=True)
ep, _ = listener.accept(); left = {size}
while left: left -= len(ep.recv(min(left, 65536)))
print("all", flush=True); sys.stdin.readline()
"""
    sender = f"import mic_emu.scif as scif\nep = scif.Endpoint(); ep.connect((1, 3000)); ep.send(bytes({size})); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    before = scrape(machine)[2]
    looks = []
    with machine.popen("run", "mic0", "--", sys.executable, "-c", script, **pipes) as card:
        assert card.stdout
        assert card.stdout.readline() == "listens\n"
        with machine.popen("run", "host", "--", sys.executable, "-c", sender, **pipes) as host:
            assert card.stdout.readline() == "all\n"
            if while_open:
                looks = [scrape(machine)[2], scrape(machine)[2]]
            host.communicate("\n", timeout=20)
        card.communicate("\n", timeout=20)
    looks.append(scrape(machine)[2])
    assert not [
        n
        for n, pairs in before
        if n == "micemu_scif_bytes_total" and dict(pairs)["peer"] == dict(pairs)["node"]
    ]
    for node, peer, direction in ((0, 1, "sent"), (1, 0, "received")):
        labels = {"node": str(node), "peer": str(peer), "direction": direction}
        grown = [total(v, "micemu_scif_bytes_total", **labels) - total(before, "micemu_scif_bytes_total", **labels)
                 for v in looks]  # fmt: skip
        assert all(size <= n < size + 10_000 for n in grown), (labels, grown)  # and COSM's messages
    row = machine.json("top", "--once")["cards"][0]
    assert row["scif"]["sent"] >= size
    assert "scif_rates" in row


def test_metrics_of_a_card_that_hangs_come_without_its_own(machine: Machine) -> None:
    """A stopped card OS with a full queue of requests holds nobody up."""
    pid = machine.boot("--disk", "none", "--net", "none")["cards"][0]["pids"]["os"]
    signal_tree(pid, signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            path = str(machine.run_dir / "mic0/os.sock")
            try:
                while True:
                    stack.enter_context(connect_unix(path, wait=False))
            except BlockingIOError:
                pass
            _, _, values = scrape(machine)
    finally:
        signal_tree(pid, signal.SIGCONT)
    assert [n for n, pairs in values if n == "micemu_scif_bytes_total" and dict(pairs)["node"] == "1"] == []
    assert total(values, "micemu_scif_bytes_total", node="0") > 0


def test_sums_of_a_hostile_card_are_checked() -> None:
    """Whatever the card tells as its sums: numbers by known names, or nothing."""
    good = dict.fromkeys(COUNTERS, 5)
    bad = [
        {},
        {**good, "sent": -1},
        {**good, "sent": 1 << 64},
        {**good, "sent": "5"},
        {**good, "sent": True},
        [],
        None,
    ]
    answer = {"2": {**good, "more": 1}, "x": good, "-1": good, "²": good, "123456": good}
    assert checked({**answer, **{str(10 + i): row for i, row in enumerate(bad)}}) == {2: good}
    for nothing in (None, [], "x", 5):
        assert checked(nothing) == {}


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
    assert names >= COVERED
    _, types, _ = scrape(machine)
    assert names <= types.keys()
