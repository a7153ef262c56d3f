"""Devices of a whole machine: VOP-19, 62, 65."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mic_emu import layout
from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system


def gone(pid: int) -> bool:
    """Has the process ended and been collected? (a zombie has not)"""
    return not Path(f"/proc/{pid}").exists()


def test_vop_62_disk_swapped_at_run_time(machine: Machine) -> None:
    """VOP-62: vop swap: the card sees the disk go and another one come; a bad file changes nothing."""
    status = machine.boot("--net", "none")
    run_dir = Path(status["cards"][0]["run_dir"])
    first = machine.device("block")
    image = machine.home / "other.img"
    image.write_bytes(b"the other image".ljust(3 << 20, b"\0"))
    bad = machine.micemu("vop", "swap", "mic0", "block", "path=/nonexistent/x.img", check=False)
    assert bad.returncode != 0
    assert machine.device("block")["pid"] == first["pid"]
    machine.micemu("vop", "swap", "mic0", "block", f"path={image}")
    now = machine.device("block")
    assert (now["path"], now["state"]) == (str(image), "running")
    eventually(lambda: gone(first["pid"]), 20, "the end of the old backend")
    assert (run_dir / "vda.nbd").exists()
    # The card writes to the log what the host has heard of already.
    eventually(
        lambda: [e["event"] for e in log(machine) if e.get("event", "").startswith("device_") and e.get("type") == 2]
        == ["device_up", "device_gone", "device_up"],
        20, "the card's disks, one after the other",
    )  # fmt: skip
    assert any("6144 sectors" in e["message"] for e in log(machine))
    assert (
        "only disks" in machine.micemu("vop", "swap", "mic0", "console", f"path={image}", check=False).stderr
    )


def test_vop_58_what_a_compat_card_is_offered(machine: Machine) -> None:
    """VOP-58: net 0x3C1, console 0, block 0x4 with seg_max 126; words of 4 bytes, rings of 128."""
    config = machine.home / "card.toml"
    config.write_text('[[card]]\npersonality = "compat"\n')
    machine.boot("--config", str(config))
    slots = {s["device"]: s for s in machine.json("dump", "page")["slots"] if s["type"] > 0}
    words = {name: bytes.fromhex(s["host_features"]) for name, s in slots.items()}
    want = {"net": 0x3C1, "console": 0, "block": 0x4}
    assert words == {name: word.to_bytes(4, "little") for name, word in want.items()}
    assert {ring["num"] for s in slots.values() for ring in s["rings"]} == {128}
    disk = bytes.fromhex(slots["block"]["config"])
    assert layout.BLK_CONFIG.unpack(disk)["seg_max"] == 126


def test_a_disk_that_is_removed_in_order_logs_no_error(machine: Machine) -> None:
    """vop add, use, remove: an orderly end is neither an error nor a warning in the log."""
    machine.boot("--net", "none")
    machine.micemu("vop", "add", "mic0", "block", f"path={machine.home / 'hot.img'}", "size=1M")
    machine.micemu("vop", "remove", "mic0", "block1")
    eventually(
        lambda: any(r.get("event") == "device_gone" for r in log(machine)),
        20,
        "the end of the device on the card",
    )
    assert [r["message"] for r in log(machine) if r["level"] in ("error", "warning")] == []


def log(machine: Machine) -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in (machine.run_dir / "log.jsonl").read_text().splitlines()]


def spare_of(machine: Machine) -> int:
    """Init's process that has nothing to do yet: one, once it is forked."""
    init = machine.status()["host"]["init"]

    def spares() -> list[int]:
        pids = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return [int(pid) for pid in pids if comm(int(pid)) == "micemu-spare\n"]

    eventually(lambda: len(spares()) == 1, 20, "the spare process")
    return spares()[0]


def comm(pid: int) -> str:
    """Name of a process, "" when it has gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def test_the_spare_process_becomes_the_next_backend_and_is_not_missed_when_killed(machine: Machine) -> None:
    """It has stdio, the log and one socket; a device gets it, with a name; killed, the next one is forked afresh."""
    machine.boot("--disk", "none", "--net", "none")
    spare = spare_of(machine)
    eventually(lambda: len(list(Path(f"/proc/{spare}/fd").iterdir())) == 5, 20, "just five descriptors")
    machine.micemu("vop", "add", "mic0", "block", f"path={machine.home / 'hot.img'}", "size=1M")
    assert machine.device("block1")["pid"] == spare
    assert comm(spare) == "mic0-block1\n"
    spare = spare_of(machine)
    os.kill(spare, signal.SIGKILL)
    eventually(lambda: gone(spare), 20, "the end of the spare process")
    machine.micemu("vop", "add", "mic0", "rng")
    assert machine.device("rng")["state"] == "running"
    assert spare_of(machine)
    machine.micemu("vop", "remove", "mic0", "block1")
    machine.micemu("vop", "remove", "mic0", "rng")


def test_vop_65_backends_follow_the_card(machine: Machine) -> None:
    """VOP-65: shutting_down to ready ends every backend without a zombie; restart boots with new ones."""
    machine.boot("--net", "none")
    before = [d["pid"] for d in machine.card()["devices"]]
    assert len(before) == 2  # console and block
    machine.micemu("run", "mic0", "--", "sh", "-c", "reboot; sleep 60", check=False)
    eventually(
        lambda: machine.card()["boots"] == 2 and machine.card()["state"] == "online", 20, "the second boot"
    )
    eventually(lambda: all(gone(pid) for pid in before), 20, "the end of the old backends, no zombie left")
    eventually(
        lambda: [d["state"] for d in machine.card()["devices"]] == ["running"] * 2, 30, "the new backends"
    )
    after = [d["pid"] for d in machine.card()["devices"]]
    assert not set(before) & set(after)
    machine.micemu("shutdown", "mic0")
    assert machine.card()["state"] == "ready"
    eventually(lambda: all(gone(pid) for pid in after), 20, "the end of all backends, no zombie left")
    assert [r["message"] for r in log(machine) if "starts again" in r["message"]] == []


def test_vop_19_devices_are_gone_after_stop(machine: Machine) -> None:
    """VOP-19: after stop no device is listed, none can be added or removed; the next boot has them again."""
    machine.boot("--net", "none")
    machine.micemu("vop", "add", "mic0", "rng")
    machine.micemu("reset", "mic0")
    assert machine.card()["devices"] == []
    for words in (["add", "mic0", "rng"], ["remove", "mic0", "rng"]):
        assert machine.micemu("vop", *words, check=False).returncode != 0
    machine.boot()
    assert {d["type"] for d in machine.card()["devices"]} == {"console", "block"}
