"""The card's network across real namespaces, or its user-space stand-in."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
PATIENT = ("-W", "20")  # seconds that an answer may take on a busy machine


@pytest.mark.tap
@pytest.mark.peer("ping")
def test_vop_59_ping_in_both_directions(machine: Machine) -> None:
    """Host 172.31.1.254 and card 172.31.1.1 reach each other."""
    assert machine.boot("--disk", "none")["cards"][0]["net"] == "ns"
    for args in (("mic0",), ("mic0", "--from-card")):
        result = machine.json("ping", *args, *PATIENT)
        assert result["received"] == result["sent"] == 3


@pytest.mark.tap
@pytest.mark.peer("ip")
def test_vop_59_addresses_on_the_card(machine: Machine) -> None:
    """The card has a host name and addresses of its own."""
    assert machine.boot("--disk", "none")["cards"][0]["net"] == "ns"
    assert machine.shell("hostname") == "mic0\n"
    assert " inet 172.31.1.1/24 " in machine.shell("ip addr show mic0")
    assert "default via 172.31.1.254 dev mic0" in machine.shell("ip route")


@pytest.mark.tap
@pytest.mark.peer("iperf3")
@pytest.mark.parametrize("direction", [[], ["-R"]])
def test_iperf3_keeps_the_link(machine: Machine, direction: list[str]) -> None:
    """A bulk transfer in each direction, and the link answers pings afterwards."""
    assert machine.boot("--disk", "none")["cards"][0]["net"] == "ns"
    server = machine.popen(
        "run",
        "host",
        "--",
        "iperf3",
        "-s",
        "-1",
        "--forceflush",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert server.stdout
        for line in iter(server.stdout.readline, b""):
            if b"Server listening" in line:
                break
        out = machine.on_card("iperf3", "-c", "172.31.1.254", "-t", "3", "-J", *direction)
        assert json.loads(out.stdout)["end"]["sum_received"]["bytes"] > 10 << 20
        assert machine.json("ping", "mic0", *PATIENT)["received"] == 3
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()


@pytest.mark.tap
@pytest.mark.peer("ping", "tshark")
def test_pcap_is_readable_by_tshark(machine: Machine) -> None:
    """micemu pcap while pinging: tshark sees the echo requests and replies."""
    assert machine.boot("--disk", "none")["cards"][0]["net"] == "ns"
    path = machine.home / "t.pcap"
    capture = machine.popen("pcap", "mic0", "-w", str(path), "--seconds", "200")
    try:
        eventually(lambda: path.exists() and path.stat().st_size >= 24, 30, "the capture file")
        machine.micemu("ping", "mic0", *PATIENT)
    finally:
        capture.terminate()
        assert capture.wait(30) == 0
    out = subprocess.run(
        ["tshark", "-r", str(path), "-Y", "icmp", "-T", "fields", "-e", "icmp.type"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split().count("8") >= 3
    assert out.stdout.split().count("0") >= 3


def test_a_capture_ends_with_its_command(machine: Machine, tmp_path: Path) -> None:
    """Also when that is killed: nobody writes to the file any more, and the next one can begin."""
    machine.boot("--disk", "none", "--net", "responder")
    path, backend = tmp_path / "t.pcap", machine.device("net")["pid"]

    def held() -> bool:
        fds = [
            fd
            for pid in (backend, machine.status()["host"]["pid"])
            for fd in Path(f"/proc/{pid}/fd").iterdir()
        ]
        return any(os.path.realpath(fd) == str(path) for fd in fds)

    capture = machine.popen("pcap", "mic0", "-w", str(path))
    try:
        eventually(lambda: path.exists() and path.stat().st_size >= 24, 30, "the capture file")
        second = machine.micemu("pcap", "mic0", "-w", str(tmp_path / "second.pcap"), check=False)
        assert (second.returncode, second.stdout) == (4, "")
        assert "mic0 is being captured already" in second.stderr
        assert held()
    finally:
        capture.kill()
        capture.wait(30)
    eventually(lambda: not held(), 30, "the end of the capture")
    third = machine.popen("pcap", "mic0", "-w", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with third:
        assert third.stdout
        assert third.stderr
        assert len(third.stdout.read(24)) == 24
        assert machine.json("ping", "mic0", *PATIENT)["received"] == 3
        third.terminate()
        assert len(third.stdout.read()) > 300  # and its end: nobody else has the pipe
        said = third.stderr.read().decode()
    assert third.returncode == 0, said
    assert int(said.split()[1]) >= 6


def test_responder_answers_in_both_directions(machine: Machine) -> None:
    """--net responder: no TAP, no namespace of the host, real frames all the same."""
    status = machine.boot("--disk", "none", "--net", "responder")
    assert status["cards"][0]["net"] == "responder"
    for args in (("mic0",), ("mic0", "--from-card")):
        assert machine.json("ping", *args, *PATIENT)["received"] == 3


def test_two_cards_have_two_networks(machine: Machine) -> None:
    """Each card answers at its own address."""
    machine.boot("-n", "2", "--disk", "none", "--net", "responder")
    assert machine.json("ping", "mic1", *PATIENT)["target"] == "172.31.2.1"
    assert machine.json("ping", "mic0", *PATIENT)["target"] == "172.31.1.1"


@pytest.mark.tap
@pytest.mark.peer("ping")
def test_cards_reach_each_other_through_the_host(machine: Machine) -> None:
    """A card has a default route to the host, which forwards to the other card."""
    assert machine.boot("-n", "2", "--disk", "none")["cards"][0]["net"] == "ns"
    assert " 2 received" in machine.on_card("ping", "-c", "2", "-i", "0.2", "-w", "20", "172.31.2.1").stdout
