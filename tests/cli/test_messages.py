"""What commands say when they refuse: one sentence, the object, the way out, the documented exit status."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from mic_emu import config
from mic_emu.errors import UsageError
from mic_emu.rundir import RunDir
from mic_emu.testing.machine import MICEMU, Machine, eventually


def said(machine: Machine, *args: str) -> tuple[int, str]:
    """Exit status and stderr of a command that fails."""
    done = machine.micemu(*args, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour'; known keys: card, group, host_memory, metrics_port, timing"),
        ("metrics_port = 70000", "metrics_port: 70000: use 1 to 65535, or 0 for none"),
        ('[[cards]]\nmemory = "1G"', "unknown key 'cards'; did you mean 'card'?"),
        ('[[card]]\nheartbeat = "yes"', "[[card]] number 1 (mic0): heartbeat: 'yes' is not true or false"),
        ("[[card]]\ndisk = 7", "[[card]] number 1 (mic0): disk: 7 is not a string: write it in quotes"),
        (
            '[[card]]\ndevices = "rng"',
            "[[card]] number 1 (mic0): devices: 'rng' is not a list: write it in brackets",
        ),
        (
            "[[card]]\n[[card]]\nmemory = 8",
            "[[card]] number 2 (mic1): memory: 8: use whole MiB, at least 64M",
        ),
        (
            '[[card.fault]]\nkind = "packet-loss"',
            "write cards as [[card]] tables, and [[card.fault]] below the [[card]] that it is about",
        ),
    ],
)
def test_configuration_names_keys_and_types_as_one_writes_them(
    tmp_path: Path, text: str, message: str
) -> None:
    """The keys that exist in the file, and types in words."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        config.load(path)
    assert str(refused.value) == f"{path}: {message}"


def test_no_emulator(machine: Machine) -> None:
    """SCIF tables are of an emulator, too."""
    assert said(machine, "scif", "endpoints")[0] == 3
    assert said(machine, "scif", "windows", "mic0")[0] == 3
    for words in (["events"], ["events", "--recent"], ["events", "--sample", "1"]):
        status, text = said(machine, *words)
        assert (status, "no emulator runs" in text) == (3, True)


def test_card_that_does_not_run_or_exist(machine: Machine) -> None:
    """The fix names the card; a node that is no card is exit status 6."""
    machine.boot("--disk", "none", "--net", "none")
    assert said(machine, "ping", "mic0") == (4, "micemu: mic0 has no network: boot it without --net none\n")
    assert said(machine, "scif", "endpoints", "mic7") == (6, "micemu: there is no card mic7; cards: mic0\n")
    machine.micemu("shutdown")
    for command in (
        ["ping", "mic0"],
        ["scif", "endpoints", "mic0"],
        ["run", "mic0", "--", "true"],
        ["vop", "add", "mic0", "rng"],
    ):
        assert said(machine, *command) == (4, "micemu: mic0 is ready: boot it first (micemu boot mic0)\n")
    status, text = said(machine, "sysfs", "write", "mic0/state", "fly")
    assert (status, text) == (1, "micemu: mic0/state: 'fly' is not accepted; write boot, reset, shutdown\n")
    assert said(machine, "sysfs", "write", "mic0/state", "shutdown") == (
        4, "micemu: mic0/state: shutdown is not allowed in state ready\n"
    )  # fmt: skip
    assert said(machine, "sysfs", "write", "mic0/power/control", "off") == (
        1, "micemu: mic0/power/control: 'off' is not accepted; write auto or on\n"
    )  # fmt: skip
    for words in (["cat", "mic9/state"], ["write", "mic9/state", "boot"]):
        status, text = said(machine, "sysfs", *words)
        assert (status, text) == (
            6, "micemu: there is no card mic9; cards: mic0\n"
        )  # fmt: skip
    assert said(machine, "sysfs", "cat", "mic0/colour") == (
        1, "micemu: there is no file class/mic/mic0/colour (micemu sysfs ls shows those that are)\n"
    )  # fmt: skip


def test_devices_and_mounts_that_are_not_there(machine: Machine, tmp_path: Path) -> None:
    """A wrong device name is wrong usage wherever it is written; a card that is down is a matter of its state."""
    machine.boot("--disk", "none", "--net", "none")
    for words in (["vop", "remove", "mic0", "tape"], ["vop", "swap", "mic0", "tape", "path=x"]):
        assert said(machine, *words) == (2, "micemu: mic0 has no device 'tape'; devices: console\n")
    machine.micemu("shutdown")
    assert said(machine, "vop", "remove", "mic0", "tape") == (
        4, "micemu: mic0 is ready: boot it first (micemu boot mic0)\n"
    )  # fmt: skip
    for words in (["suspend", "--timeout", "-1"], ["stop", "--timeout", "-1"]):
        status, text = said(machine, *words)
        assert (status, "-1.0 is not in the range x>=0" in text) == (2, True)
    assert said(machine, "sysfs", "ls", "mic3") == (6, "micemu: there is no card mic3; cards: mic0\n")
    listed = machine.micemu("sysfs", "ls", "mic0/power").stdout.splitlines()
    assert "0644 class/mic/mic0/power/control" in listed
    assert all(" class/mic/mic0/power/" in line for line in listed)
    status, text = said(machine, "sysfs", "umount", str(tmp_path))
    assert (status, f"{tmp_path}: no tree of micemu is mounted there" in text) == (1, True)


CRASHED = "micemu: mic0 has crashed: micemu dump log mic0 shows its last words, micemu boot mic0 resets and boots it\n"


def test_crashed_card(machine: Machine, tmp_path: Path) -> None:
    """Every command that needs an online card says what has happened; the last events are there, and end."""
    pid = machine.boot("--disk", "none", "--net", "none")["cards"][0]["pids"]["os"]
    os.kill(pid, signal.SIGKILL)
    machine.micemu("wait", "crashed")
    (tmp_path / "f").write_text("")
    for command in (
        ["run", "mic0", "--", "hostname"],
        ["shell", "mic0"],
        ["ping", "mic0"],
        ["cp", str(tmp_path / "f"), "mic0:/tmp"],
        ["vop", "add", "mic0", "rng"],
    ):
        assert said(machine, *command) == (4, CRASHED)
    everything = machine.micemu("events", "--recent", "--count", "1000").stdout.splitlines()
    assert len(everything) > 3
    last = machine.micemu("events", "--recent", "--count", "3").stdout.splitlines()
    assert len(last) == 3
    more = machine.micemu(
        "events", "--recent", "--count", "1000"
    ).stdout.splitlines()  # some may have come meanwhile
    assert any(more[n : n + 3] == last for n in range(len(everything) - 3, len(more) - 2))
    assert said(machine, "events", "--recent", "--count", "3", "--sample", "1")[0] == 2


def test_folder_that_is_not_on_the_card(machine: Machine, tmp_path: Path) -> None:
    """The reason in our words, not in those of the tool that copies."""
    machine.boot("--disk", "none", "--net", "none")
    (tmp_path / "f").write_text("")
    for folder, why in (("/nosuch", "there is no folder /nosuch"), ("/proc", "nothing can be made in /proc")):
        assert said(machine, "cp", str(tmp_path / "f"), f"mic0:{folder}/y") == (
            1, f"micemu: cannot write mic0:{folder}/y: {why}\n"
        )  # fmt: skip


def test_wrong_words(machine: Machine) -> None:
    """The choice once; what is missing in a sentence."""
    status, text = said(machine, "wait", "flying")
    assert (status, text.count("reset_failed")) == (2, 1)
    assert said(machine, "fault", "add", "mic0", "packet-delay") == (
        2, "micemu: fault add mic0: packet-delay needs delay (how long, for example 10us, 5ms or 1.5s)\n"
    )  # fmt: skip


def test_nodes_by_number(machine: Machine) -> None:
    """0 is the host, 1 is mic0, as ``scif nodes`` shows them."""
    machine.boot("--disk", "none", "--net", "none")
    for number in (0, 1):
        assert machine.json("scif", "endpoints", str(number))["node"] == number
        assert machine.json("scif", "windows", str(number))["windows"] == []
    for words in ("endpoints", "7"), ("windows", "2"):
        missing = f"micemu: there is no SCIF node {words[1]}; nodes: 0, 1\n"
        assert said(machine, "scif", *words) == (6, missing)


def test_kernel_log_has_the_times_of_the_log(machine: Machine) -> None:
    """For people the clock; the buffer itself stays as it is (COSM-61)."""
    machine.boot("--disk", "none", "--net", "none")

    def whole() -> bool:  # both are written after online, in either order
        said = machine.micemu("dump", "log").stdout
        return "node 0 is online" in said and "card is up" in said

    eventually(whole, 20, "the last lines")
    shown = machine.micemu("dump", "log").stdout.splitlines()
    kept = machine.micemu("sysfs", "cat", "kernel/debug/mic_cosm/mic0/log_buf").stdout.splitlines()
    assert machine.json("dump", "log").splitlines() == kept
    assert [line.partition(" ")[2] for line in shown] == [line.partition(" ")[2] for line in kept]
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} info: ", shown[0])
    assert re.match(r"\[\d{10}\.\d{6}\] info: ", kept[0])


def test_empty_instance_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an empty variable means elsewhere."""
    monkeypatch.setenv("MICEMU_INSTANCE", "")
    assert RunDir().instance == "default"


def test_scif_ports(machine: Machine) -> None:
    """A port that is taken, a port where nobody listens, a node that is not there."""
    machine.boot("--disk", "none", "--net", "none")
    assert said(machine, "scif", "cat", "1", "3000") == (
        1, "micemu: cannot connect to 1:3000: Connection refused: nobody listens there\n"
    )  # fmt: skip
    assert "cannot connect to 1:3000" in said(machine, "scif", "cat", "mic0", "3000")[1]
    assert said(machine, "scif", "cat", "there", "3000")[0] == 2
    assert "the node is not online (micemu scif nodes)" in said(machine, "scif", "cat", "9", "3000")[1]
    taken = machine.micemu("run", "mic0", "--", *MICEMU, "scif", "cat", "-l", "130", check=False)
    assert "somebody listens there (micemu scif endpoints)" in taken.stderr


def test_rings_of_a_device_by_its_name(machine: Machine) -> None:
    """``dump vring --device`` takes the names of ``status``; one that is none is refused."""
    machine.boot("--net", "none")
    (ring,) = machine.json("dump", "vring", "mic0", "--device", "block")
    assert ring["device"].startswith("virtio2@")
    assert machine.json("dump", "vring", "mic0", "--device", ring["device"]) == [ring]
    assert said(machine, "dump", "vring", "mic0", "--device", "tape") == (
        2, "micemu: mic0 has no device 'tape': there is block, console\n"
    )  # fmt: skip
