"""Policy with real crashes: a card OS that dies as it starts, and waiting clients that go away."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from drill import Control

from mic_emu import image
from mic_emu.testing.machine import Machine, eventually
from mic_emu.timing import PROFILES

pytestmark = pytest.mark.system


def events(machine: Machine) -> list[dict[str, Any]]:
    lines = (machine.run_dir / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "event" in r]


def broken_image() -> bytes:
    """A card OS that passes the bootstrap's checks and dies at once."""
    payload = io.BytesIO()
    with zipfile.ZipFile(payload, "w") as z:
        z.writestr("__main__.py", "raise SystemExit(1)\n")
    return image.pack_image(payload.getvalue())


def configured(tmp_path: Path, **keys: Any) -> tuple[str, Path]:
    """A configuration file with an image of its own."""
    own = tmp_path / "uos.img"
    shutil.copyfile(image.built_in(), own)
    config = tmp_path / "lab.toml"
    rows = {"image": str(own), "disk": "none", "net": "none", **keys}
    config.write_text("[[card]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items()))
    return str(config), own


def test_cosm_64_card_that_dies_at_every_boot_is_tried_with_growing_pauses_and_left(
    machine: Machine, tmp_path: Path
) -> None:
    """on_crash = "reboot": its image goes bad while it runs; three tries, then ready, and one event says so."""
    config, own = configured(tmp_path, on_crash="reboot", max_reboots=3)
    machine.micemu("boot", "--config", config)
    own.write_bytes(broken_image())
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    eventually(lambda: any(e["event"] == "gave_up" for e in events(machine)), 30, "the end of its patience")
    found = events(machine)
    tries = [e["time"] for e in found if e["event"] == "state" and e["state"] == "booting"][1:]
    assert len(tries) == 3
    assert tries[1] - tries[0] >= 4 * PROFILES["fast"].delay
    assert tries[2] - tries[1] >= 8 * PROFILES["fast"].delay
    assert [e["attempts"] for e in found if e["event"] == "gave_up"] == [4]
    assert (machine.card()["state"], machine.card()["boots"]) == ("ready", 4)
    done = machine.micemu("boot", check=False)  # by hand: one try, the reason, no loop
    assert (done.returncode, "mic0 did not boot: exit status 1" in done.stderr) == (1, True)
    assert machine.card()["boots"] == 5
    shutil.copyfile(image.built_in(), own)
    assert machine.boot()["cards"][0]["state"] == "online"


def test_service_goes_on_when_a_card_dies_at_its_autoboot(machine: Machine, tmp_path: Path) -> None:
    """`micemu host`: the bad card is reported once and ready, the good one is online; exit status 1. So it is with an image
    that is not there (COSM-60)."""
    config, own = configured(tmp_path)
    own.write_bytes(broken_image())
    with Path(config).open("a") as f:
        f.write('[[card]]\ndisk = "none"\nnet = "none"\n')
    done = machine.micemu("host", "--config", config, check=False)
    assert (done.returncode, "micemu: mic0 did not boot" in done.stderr) == (1, True)
    assert [c["state"] for c in machine.status()["cards"]] == ["ready", "online"]
    assert [c["boots"] for c in machine.status()["cards"]] == [1, 1]
    machine.micemu("stop")
    own.unlink()
    done = machine.micemu("host", "--config", config, check=False)
    assert (done.returncode, done.stderr) == (1, f"micemu: mic0: the card image {own} does not exist\n")
    assert [c["state"] for c in machine.status()["cards"]] == ["ready", "online"]


def test_waiting_clients_that_go_away_leave_nothing_in_the_host(machine: Machine) -> None:
    """Interrupted `micemu wait` commands cost no descriptor; a time-out names the first card that was late."""
    machine.boot("-n", "2", "--disk", "none", "--net", "none")
    host = machine.status()["host"]["pid"]

    def held() -> int:
        return len(os.listdir(f"/proc/{host}/fd"))

    Control(machine).ask("status")  # the connections of the commands before are closed when this one is
    before = held()
    waiting = [machine.popen("wait", "reset_failed", stderr=subprocess.DEVNULL) for _ in range(5)]
    eventually(lambda: held() >= before + 5, 20, "five waiting clients")
    for process in waiting:
        process.kill()
        process.wait()
    eventually(lambda: held() <= before, 30, "the end of their requests")
    late = machine.micemu("wait", "ready", "--timeout", "0.2", check=False)
    assert (late.returncode, "mic0" in late.stderr) == (5, True)
