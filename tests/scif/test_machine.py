"""SCIF programs on a booted machine: host and cards, through ``micemu run``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from scif_server import PACKAGE

from mic_emu import scif
from mic_emu.testing.machine import MICEMU, Machine, eventually

pytestmark = pytest.mark.system
EXAMPLES = PACKAGE.parent / "examples" / "scif"
RMA_BYTES = 2 << 20  # what the example rma copies
SAYS = {"echo": "hello over SCIF", "rma": "written", "flag": "round trip"}


def build(machine: Machine) -> Path:
    """The examples with the library beside them, in the machine's own folder, which the cards see too."""
    where = machine.home / "programs"
    where.mkdir()
    shutil.copy2(PACKAGE / "lib" / "libscif.so.0", where / "libscif.so.0")
    for name in SAYS:
        source = str(EXAMPLES / f"{name}.c")
        command = ["cc", "-Wall", source, f"-I{PACKAGE / 'include'}", str(where / "libscif.so.0")]
        subprocess.run([*command, "-Wl,-rpath,$ORIGIN", "-o", str(where / name)], check=True)
    return where


def start(machine: Machine, where: Path, place: str, *args: str) -> subprocess.Popen[str]:
    command = [*MICEMU, "run", place, "--", *args]
    return subprocess.Popen(
        command, env=machine.env, cwd=where, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


@pytest.mark.timeout(300)
def test_scif_39_104_124_examples_between_host_and_cards(machine: Machine) -> None:
    """SCIF-39: host to card, card to host, card to card: messages, RMA with a fence, a mapping. The large
    copies of ``rma`` were made by DMA channels of the node that issued them (SCIF 2.13)."""
    machine.boot("-n", "2", "--disk", "none", "--net", "none")
    where = build(machine)
    nodes = {"host": 0, "mic0": 1, "mic1": 2}
    port = 3000
    for server, client in (("host", "mic0"), ("mic0", "host"), ("mic0", "mic1")):
        for name, words in SAYS.items():
            port += 1
            a = start(machine, where, server, f"./{name}", "server", str(port))
            b = start(machine, where, client, f"./{name}", "client", str(nodes[server]), str(port))
            out = b.communicate(timeout=40)[0]
            a.communicate(timeout=40)
            assert (a.returncode, b.returncode) == (0, 0), f"{name}: {server} <- {client}: {out}"
            assert words in out
    by_channel = [
        row["engine"]["bytes"] for row in json.loads(machine.micemu("dump", "dma", "mic0", "--json").stdout)
    ]
    assert (sum(by_channel[:4]), sum(by_channel[4:])) == (RMA_BYTES, RMA_BYTES)
    metrics = machine.micemu("metrics").stdout
    busy = [
        line
        for line in metrics.splitlines()
        if line.startswith("micemu_dma_engine_bytes_total") and line.endswith(str(RMA_BYTES))
    ]
    assert len(busy) == 2


@pytest.mark.timeout(300)
def test_scif_60_a_hung_card_whose_program_goes_on_sending_ends_the_stream(machine: Machine) -> None:
    """A lost node's bytes end where they were when it was lost, though its program still fills the ring."""
    machine.boot("--timing", "test", "--disk", "none", "--net", "none")
    cat = [*MICEMU, "scif", "cat"]
    with subprocess.Popen(
        [*cat, "-l", "3000"], env=machine.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as listener:
        sender = start(
            machine, machine.home, "mic0", "sh", "-c", f"until yes | {' '.join(cat)} 0 3000; do :; done"
        )
        rows: list[dict[str, object]] = []
        while not any(e["port"] == 3000 and e["state"] == "connected" for e in rows):
            rows = json.loads(machine.micemu("scif", "endpoints", "host", "--json").stdout)["endpoints"]
        os.kill(machine.status()["cards"][0]["pids"]["os"], signal.SIGSTOP)
        machine.micemu("wait", "crashed", "mic0", "--timeout", "30")
        assert sender.poll() is None  # it lives, on a card that the host has given up
        assert listener.wait(20) == 0
    machine.micemu("reset", "mic0")
    sender.wait(20)


@pytest.mark.timeout(300)
def test_scif_17_129_a_crashed_card_disconnects_host_programs(machine: Machine) -> None:
    """SCIF-129: the card is reset under a connected program: ECONNRESET, ports and memory come back."""
    machine.boot("--disk", "none", "--net", "none")
    where = build(machine)
    card = start(machine, where, "mic0", "./rma", "server", "3500")
    listing = ""
    while "3500" not in listing:
        listing = machine.micemu("scif", "endpoints", "mic0").stdout
        assert card.poll() is None
    client = start(machine, where, "host", "./echo", "client", "1", "3500")  # it waits for an echo for ever
    while "connected" not in [line.split()[2] for line in listing.splitlines()[1:] if " 3500 " in line]:
        listing = machine.micemu("scif", "endpoints", "mic0").stdout
    machine.micemu("reset", "mic0")
    assert client.wait(40) == 1
    card.communicate(timeout=40)
    client.communicate()

    def left() -> list[list[str]]:
        table = machine.micemu("scif", "endpoints", "host").stdout.splitlines()[1:]
        return [line.split()[1:3] for line in table]

    eventually(lambda: left() == [["201", "listening"]], 20, "the end of every endpoint but the host's own")


@pytest.mark.timeout(300)
def test_hw_8_connections_leave_nothing_mapped_in_the_smpt(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link to a card maps host memory once, not again for each queue pair."""
    machine.boot("--disk", "none", "--net", "none")
    monkeypatch.setenv("MICEMU_SCIF_SOCKET", str(machine.run_dir / "scif.sock"))

    def mapped() -> int:
        rows = json.loads(machine.micemu("dump", "smpt", "mic0", "--json").stdout)
        return sum(row["refs"] for row in rows)

    before = mapped()
    for _ in range(20):
        with scif.Endpoint() as ep, pytest.raises(scif.ScifError):
            ep.connect((1, 3999))
    assert mapped() == before
