"""The hardware layer under whole machines: HW-15, HW-22, HW-47, HW-49 and the debug views."""

from __future__ import annotations

import json
import subprocess

import pytest

from mic_emu.testing.card import Card
from mic_emu.testing.machine import Machine

pytestmark = pytest.mark.system


@pytest.mark.parametrize("interrupts", ["msi", "intx"])
def test_hw_15_card_works_without_msix(machine: Machine, interrupts: str) -> None:
    """HW-15: with one interrupt line the card comes up, and its console, disk and programs work."""
    config = machine.home / "card.toml"
    config.write_text(f'[[card]]\ninterrupts = "{interrupts}"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    rows = json.loads(machine.micemu("dump", "interrupts", "--json").stdout)
    assert [(r["mode"], r["vector"]) for r in rows] == [(interrupts, 0)]
    assert machine.micemu("run", "mic0", "--", "sh", "-c", "echo on the card").stdout == "on the card\n"
    machine.micemu("shutdown")
    machine.micemu("boot", "--config", str(config))
    assert machine.status()["cards"][0]["state"] == "online"


def test_hw_47_vectors_of_a_card(machine: Machine) -> None:
    """HW-47: four vectors for DMA, one for SCIF, the rest for virtio devices."""
    machine.micemu("boot", "--net", "none")
    users = [u for r in json.loads(machine.micemu("dump", "interrupts", "--json").stdout) for u in r["users"]]
    assert users.count("mic dma_channel") == 4
    assert users.count("SCIF_INTR") == 1
    assert len(users) == 7  # console and block
    for n in range(2):
        machine.micemu("vop", "add", "mic0", "block", f"path={machine.home / f'{n}.img'}", "size=1M")
    refused = machine.micemu("vop", "add", "mic0", "rng", check=False)
    assert refused.returncode == 1
    assert "four devices are the most; remove one, or boot with interrupts" in refused.stderr
    machine.micemu("vop", "remove", "mic0", "block1")
    machine.micemu("vop", "add", "mic0", "rng")


def test_hw_22_channels_follow_the_card(machine: Machine) -> None:
    """HW-22, HW-49: both sides enable their four channels; after shutdown and reset all are off."""
    machine.micemu("boot", "--net", "none", "--disk", "none")

    def enabled() -> list[str]:
        rows = json.loads(machine.micemu("dump", "dma", "--json").stdout)
        assert not any(r["halted"] or r["error"] for r in rows)
        return [r["owner"] for r in rows if r["enabled"]]

    assert enabled() == ["host"] * 4 + ["card"] * 4
    machine.micemu("shutdown")
    machine.micemu("reset", check=False)
    assert enabled() == []
    machine.micemu("boot")
    assert enabled() == ["host"] * 4 + ["card"] * 4


@pytest.mark.peer("lspci")
def test_hw_01_lspci_of_a_running_card(machine: Machine) -> None:
    """HW-1: the dump of a booted card decodes: mastering on, MSI-X on, INTx off."""
    machine.micemu("boot", "--net", "none", "--disk", "none")
    dump = machine.home / "mic0.txt"
    dump.write_text(machine.micemu("lspci").stdout)
    out = subprocess.run(["lspci", "-F", dump, "-vv"], capture_output=True, text=True, timeout=20).stdout
    assert "BusMaster+" in out
    assert "DisINTx+" in out
    assert "MSI-X: Enable+ Count=16 Masked-" in out


def test_dma_counts_of_both_owners(machine: Machine) -> None:
    """``micemu dma``: a line per channel; the host's half also says what its driver was asked for."""
    machine.micemu("boot", "--net", "none", "--disk", "none")
    rows = json.loads(machine.micemu("dma", "--json").stdout)["mic0"]
    assert [r["owner"] for r in rows] == ["host"] * 4 + ["card"] * 4
    text = machine.micemu("dma", "mic0").stdout.splitlines()
    assert text[0] == "mic0"
    assert text[1].split()[:4] == ["CH", "OWNER", "STATE", "DESCRIPTORS"]
    assert [line.split()[:3] for line in text[2:]] == [[str(r["channel"]), r["owner"], "idle"] for r in rows]
    machine.micemu("shutdown")
    assert {line.split()[2] for line in machine.micemu("dma").stdout.splitlines()[2:]} == {"off"}


def test_hw_54_debug_files(machine: Machine) -> None:
    """HW-54: the real drivers' debug files, also of a card that is down."""
    machine.micemu("boot", "--net", "none", "--disk", "none")
    for _ in range(2):
        text = machine.micemu("dump", "debugfs").stdout
        for name in ("smpt", "post_code", "msi_irq_info", "mic_dma_reg", "dp", "vdev_info", "log_buf"):
            assert f"/{name} <==" in text
        machine.micemu("shutdown")


def test_hw_54_intr_test_rings_every_doorbell(machine: Machine) -> None:
    """HW-54: reading the card's file rings doorbells 0 to 3 and gives nothing; without a card OS it is ENODEV."""
    machine.micemu("boot", "--net", "none")
    path = "kernel/debug/mic_card/mic0/intr_test"

    def sent() -> dict[str, int]:
        rows = json.loads(machine.micemu("dump", "interrupts", "--json").stdout)
        return {r["sources"]: r["count"] for r in rows if r["sources"].startswith("db")}

    before = sent()
    assert sorted(before) == ["db0", "db1", "db2"]  # SCIF, console, block
    assert machine.micemu("sysfs", "cat", path).stdout == ""
    assert all(count > before[source] for source, count in sent().items())
    machine.micemu("shutdown")
    refused = machine.micemu("sysfs", "cat", path, check=False)
    assert (refused.returncode, "its card OS does not ring" in refused.stderr) == (1, True)


def test_vop_31_debug_files_of_the_devices(machine: Machine) -> None:
    """VOP 10, VOP-31: dp has every byte of a slot in words, vdev_info every entry of every ring and the bytes moved."""
    machine.micemu("boot", "--net", "none", "--disk", "none")
    dp = machine.micemu("sysfs", "cat", "kernel/debug/vop1/dp").stdout.splitlines()
    assert dp[0] == "magic: 0xc0ffee00"
    slot = machine.json("dump", "page")["slots"][0]
    at = dp.index("slot at 24")
    assert dp[at + 1 : at + 6] == [
        "type: 3 (console)",
        "num VQ: 2",
        "feature len: 8",
        "config len: 12",
        "status: 0xf",
    ]
    assert (
        f"vqconfig[1]: address {slot['rings'][1]['address']:#x} num 128 used address {slot['rings'][1]['used_address']:#x}"
        in dp
    )
    assert sum(line.startswith("config[") for line in dp) == 12
    assert dp[-2:] == [f"{way} vdev db: {slot['control'][f'{way}_vdev_db']}" for way in ("c2h", "h2c")]

    def moved() -> int:
        info = machine.micemu("sysfs", "cat", "kernel/debug/vop1/vdev_info").stdout.splitlines()
        assert info[0] == "VDEV type 3 (console) at 24 state UP"
        words = info[1].split()
        assert words[::2] == ["in", "in_dma", "out", "out_dma", "tx_dst_unaligned", "tx_len_unaligned"]
        for ring in (0, 1):
            assert sum(line.startswith("VRING") for line in info) == 2
            assert f"VRING {ring} num 128 info.avail_idx" in "\n".join(info)
        assert sum(line.startswith("desc[") for line in info) == 2 * 128
        return int(words[1])

    before = moved()
    card = Card(machine)
    card.console.send("echo $((40 + 2))\n")
    card.console.expect("42")
    card.close()
    assert moved() > before
