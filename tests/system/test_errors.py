"""Bad input: one clear sentence with the fix, an exit status, and everything as it was before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mic_emu import image
from mic_emu.testing.machine import MICEMU, Machine, eventually

pytestmark = pytest.mark.system
SMALL = ("--disk", "none", "--net", "none")


def refused(machine: Machine, *args: str, status: int = 1) -> str:
    """The one line on stderr of a command that fails; nothing runs afterwards."""
    failed = machine.micemu(*args, check=False)
    assert failed.returncode == status, failed.stderr
    lines = failed.stderr.strip().splitlines()
    assert len(lines) == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    return lines[0]


def corrupt(machine: Machine) -> Path:
    """The built-in image with one byte of its payload changed."""
    path = machine.home / "corrupt.img"
    data = bytearray(image.built_in().read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_corrupt_image(machine: Machine) -> None:
    """The bootstrap refuses it; a first boot leaves no emulator behind."""
    path = corrupt(machine)
    assert refused(machine, "boot", *SMALL, "--image", str(path)) == (
        f"micemu: mic0: the bootstrap refused {path}: the image is corrupt: its checksum does not match its content"
    )
    assert machine.status()["host"]["pid"] is None
    machine.check_clean()


def test_corrupt_image_on_a_running_emulator_leaves_the_card_ready(machine: Machine) -> None:
    """State as before: the card is ready again and boots with a good image."""
    machine.boot(*SMALL)
    machine.micemu("shutdown")
    refused(machine, "boot", *SMALL, "--image", str(corrupt(machine)))
    assert machine.card()["state"] == "ready"
    assert machine.boot(*SMALL, "--image", "")["cards"][0]["state"] == "online"


def test_hw_38_image_larger_than_the_aperture(machine: Machine) -> None:
    """EINVAL with sizes and the fix."""
    path = machine.home / "huge.img"
    with path.open("wb") as f:
        f.truncate(200 << 20)
    line = refused(machine, "boot", *SMALL, "--memory", "128M", "--image", str(path))
    assert "does not fit" in line
    assert "--memory" in line


def test_ramdisk_that_is_none_is_named(machine: Machine) -> None:
    """The card knows bytes only: the host says of which file."""
    path = machine.home / "ram.cpio"
    path.write_bytes(b"x" * 4096)
    line = refused(machine, "boot", *SMALL, "--ramdisk", str(path))
    assert line.startswith(f"micemu: mic0 did not boot with the ramdisk {path}: ")
    assert "is no cpio archive in newc form" in line


def test_hw_39_cosm_14_missing_ramdisk(machine: Machine) -> None:
    """ENOENT before anything is touched."""
    assert refused(machine, "boot", *SMALL, "--ramdisk", "/nonexistent/ramdisk") == (
        "micemu: mic0: the ramdisk /nonexistent/ramdisk does not exist"
    )


def test_disk_path_is_a_directory(machine: Machine) -> None:
    """EISDIR with the path."""
    assert (
        refused(machine, "boot", "--disk", str(machine.home))
        == f"micemu: mic0: the disk {machine.home} is a directory: name a file"
    )


@pytest.mark.root
def test_run_directory_of_somebody_else(machine: Machine) -> None:
    """It may be a trap: refused, with the fix."""
    base = machine.run_dir.parent
    base.mkdir()
    os.chown(base, 12345, 12345)
    line = refused(machine, "boot", *SMALL)
    assert "belongs to user 12345" in line
    assert "XDG_RUNTIME_DIR" in line
    base.rmdir()


def test_unknown_key_in_the_configuration(machine: Machine) -> None:
    """The nearest known key is named."""
    path = machine.home / "c.toml"
    path.write_text('[[card]]\nmemori = "1G"\n')
    assert refused(machine, "boot", "--config", str(path), status=2) == (
        f"micemu: {path}: [[card]] number 1 (mic0): unknown key 'memori'; did you mean 'memory'?"
    )


def test_one_image_for_several_cards(machine: Machine) -> None:
    """Two cards cannot write to one image."""
    line = refused(machine, "boot", "-n", "2", "--disk", str(machine.home / "one.img"), status=2)
    assert "{card}" in line


@pytest.mark.parametrize(
    "words",
    [["boot", "-n", "0"], ["boot", "--memory", "1Q"], ["run", "mic9", "--", "true"], ["wait", "online"]],
)
def test_bad_words_never_trace_back(machine: Machine, words: list[str]) -> None:
    """A sentence and an exit status for each."""
    failed = machine.micemu(*words, check=False)
    assert failed.returncode in (2, 3)
    assert failed.stderr.startswith("micemu: ")


@pytest.mark.peer("unshare")
def test_without_user_namespaces_the_card_is_plain_processes(machine: Machine) -> None:
    """user.max_user_namespaces = 0: the boot works, status says what is missing, programs run, ping works."""
    # In a user namespace of the test's own the limit can be set without touching the machine.
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    probe = ["unshare", "-Urn", "sh", "-c", script, "sh"]
    if subprocess.run([*probe, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces at all here")
    boot = subprocess.run(
        [*probe, *MICEMU, "boot", "--disk", "none"],
        env=machine.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert boot.returncode == 0, boot.stderr + machine.report()
    card = machine.card()
    assert card["contained"]["namespaces"] == []
    assert "max_user_namespaces" in card["contained"]["refused"][0]
    assert card["net"] == "responder"
    assert machine.on_card("sh", "-c", "exit 3", check=False).returncode == 3
    assert machine.json("ping", "mic0", "-W", "20")["received"] == 3


@pytest.mark.root
def test_small_shared_memory_is_enomem_for_the_devices_that_do_not_fit(machine: Machine) -> None:
    """/dev/shm of 24 MiB: the card comes online, boot and status say which devices could not start; nothing dies by
    SIGBUS."""
    script = 'mount -t tmpfs -o size=24m none /dev/shm && exec "$@"'
    boot = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *MICEMU, "boot", "--json"],
        env=machine.env, cwd=machine.home, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert boot.returncode == 1, boot.stderr + machine.report()
    card = machine.card()
    assert card["state"] == "online"
    failed = [d for d in card["devices"] if d["state"] == "failed"]
    assert failed
    assert all("could not start" in d["error"] for d in failed)
    for device in failed:
        assert f"micemu: mic0: device {device['type']}: the card's driver could not start" in boot.stderr
    assert machine.on_card("true").returncode == 0


BROKEN = {
    "no:Such": "there is no module 'no' in the Python path, nor in {home}",
    "broken:Device": "importing it failed: ZeroDivisionError: division by zero",
    "empty:Device": "module 'empty' has no attribute 'Device'",
    "ends:Device": "importing it ends the process",
}


@pytest.mark.parametrize("device", BROKEN)
def test_device_whose_class_cannot_be_imported(machine: Machine, device: str) -> None:
    """By option or file: known before the boot, wrong configuration, nothing runs; the sentence names device and fix."""
    for name, text in {"broken": "1 / 0", "empty": "", "ends": "import os; os._exit(3)"}.items():
        (machine.home / f"{name}.py").write_text(text + "\n")
    (machine.home / "lab.toml").write_text(f'[[card]]\ndisk = "none"\nnet = "none"\ndevices = ["{device}"]\n')
    for words in (["--config", "lab.toml"], [*SMALL, "--device", device]):
        line = refused(machine, "boot", *words, status=2)
        why = BROKEN[device].format(home=machine.home)
        assert line.startswith(
            f"micemu: mic0: device {device!r}: {why}; mend devices in the configuration"
        ), line
        assert machine.status()["host"]["pid"] is None


def test_device_that_cannot_be_opened(machine: Machine) -> None:
    """Only the boot shows it: exit status 1 and a sentence; card and other devices run; the log has the device's name."""
    text = """from mic_emu.vop import Backend
class Pump(Backend):
    device_type = 42
    def open(self): raise OSError(5, "no water")
    def process(self, chain): return 0
"""
    (machine.home / "garden.py").write_text(text)
    done = machine.micemu("boot", *SMALL, "--device", "garden:Pump", check=False)
    assert done.returncode == 1
    assert "micemu: mic0: device pump: the device cannot be added: [Errno 5] no water" in done.stderr
    card = machine.card()
    assert (card["state"], [d["type"] for d in card["devices"]]) == ("online", ["console", "pump"])
    assert "pump: the device cannot be added" in machine.micemu("log", "--level", "error").stdout
    assert "python" not in machine.micemu("log").stdout.partition("online")[2]


def test_device_without_a_driver_on_the_card(machine: Machine) -> None:
    """The boot says which device and why, and ends; the driver that is then loaded takes the waiting device."""
    (machine.home / "lone.py").write_text(
        "from mic_emu.vop import Backend, Driver\n"
        "class Lone(Backend):\n    device_type = 42\n    def process(self, chain): return 0\n"
        "class LoneDriver(Driver):\n    device_type = 42\n    def run(self): self.wait()\n"
    )
    done = machine.micemu("boot", *SMALL, "--timing", "test", "--device", "lone:Lone", check=False)
    why = "the card has no driver for virtio device type 42: micemu vop driver mic0 MODULE:CLASS loads one"
    assert (done.returncode, done.stderr) == (
        1, f"micemu: mic0: device lone: {why}; the rest of the card runs\n",
    )  # fmt: skip
    row = machine.card()["devices"][1]
    assert (machine.card()["state"], row["state"], row["error"]) == ("online", "failed", why)
    added = machine.micemu("vop", "add", "mic0", "--backend", "lone:Lone", check=False)
    assert (added.returncode, added.stderr) == (1, f"micemu: mic0: lone1: {why}\n")
    assert [d["type"] for d in machine.card()["devices"]] == ["console", "lone"]
    machine.micemu("vop", "driver", "mic0", "lone:LoneDriver")
    eventually(lambda: machine.card()["devices"][1]["state"] == "running", 30, "the driver takes the device")
    assert "error" not in machine.card()["devices"][1]


def test_hw_47_more_devices_than_vectors(machine: Machine) -> None:
    """HW-47: known before the boot; the sentence counts the devices. With MSI, where they share one, all come up."""
    options = ["--device", "rng", "--device", "vsock", "--net", "responder"]
    line = refused(machine, "boot", *options, status=2)
    assert line.startswith(
        "micemu: mic0: 5 devices (console, net, block, rng, vsock), and a card with MSI-X has interrupt vectors for 4:"
    )
    assert machine.status()["host"]["pid"] is None
    (machine.home / "msi.toml").write_text('[[card]]\nmemory = "256M"\ninterrupts = "msi"\n')
    assert machine.micemu("boot", "--config", "msi.toml", *options).returncode == 0
    assert [d["state"] for d in machine.card()["devices"]] == ["running"] * 5


def test_interpreter_that_is_gone_is_named(tmp_path: Path) -> None:
    """The card OS cannot be started: boot says that and where the reason is, the log has it; the card is ready again."""
    (tmp_path / "python").symlink_to(sys.prefix)
    program = [str(tmp_path / "python" / Path(sys.executable).relative_to(sys.prefix)), "-m", "mic_emu.cli"]
    config = tmp_path / "lab.toml"
    config.write_text('[[card]]\nautoboot = false\ndisk = "none"\nnet = "none"\n')
    with Machine(program=program) as machine:
        machine.micemu("host", "--config", str(config))
        (tmp_path / "python").unlink()
        machine.program = MICEMU
        done = machine.micemu("boot", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("micemu: mic0 did not boot: exit status 70; micemu log says more")
        assert "the card OS cannot be started: [Errno 2] No such file" in machine.micemu("log").stdout
        assert machine.card()["state"] == "ready"
