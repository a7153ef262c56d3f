"""The whole machine: crashes, hangs, shutdowns from both sides, the log, several cards (COSM 2 to 9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from drill import signal_tree

from mic_emu.testing.machine import Machine, eventually
from mic_emu.timing import PROFILES

pytestmark = pytest.mark.system
QUICK = ("--disk", "none", "--net", "none")


def words_of(records: list[dict[str, Any]], card: str) -> list[str]:
    """States and shutdown statuses of a card, in order."""
    keys = {"state": "state", "shutdown_status": "status"}
    return [r[keys[r["event"]]] for r in records if r.get("card") == card and r.get("event") in keys]


def words(machine: Machine, card: str = "mic0") -> list[str]:
    """The same from the log."""
    return words_of([json.loads(x) for x in (machine.run_dir / "log.jsonl").read_text().splitlines()], card)


def seen(machine: Machine, card: str = "mic0") -> tuple[str, str]:
    row = machine.card(card)
    return row["state"], row["shutdown_status"]


@pytest.mark.parametrize(("command", "status"), [("poweroff", "poweroff"), ("halt", "halted")])
def test_cosm_32_64_card_goes_down_by_itself_and_is_reset(
    machine: Machine, command: str, status: str
) -> None:
    """`poweroff` and `halt` on the card: shutting_down, the status, then the daemon's reset; no boot."""
    machine.boot(*QUICK)
    assert machine.on_card(command).returncode == 0
    machine.micemu("wait", "ready", "--timeout", "40")
    assert words(machine) == ["booting", "online", "shutting_down", status, "resetting", "nop", "ready"]


def test_cosm_32_64_reboot_on_the_card_boots_it_again(machine: Machine) -> None:
    """`reboot` from a shell: restart, reset, and only then a new boot; the board is the same."""
    before = machine.boot(*QUICK)["cards"][0]["pids"]
    machine.micemu("run", "mic0", "--", "sh", "-c", "reboot; sleep 60", check=False)
    eventually(
        lambda: machine.card()["boots"] == 2 and seen(machine) == ("online", "nop"), 20, "the second boot"
    )
    after = machine.card()["pids"]
    assert (before["board"], before["os"] != after["os"]) == (after["board"], True)
    assert words(machine)[2:] == [
        "shutting_down",
        "restart",
        "resetting",
        "nop",
        "ready",
        "booting",
        "online",
    ]


def test_cosm_32_plain_processes_power_off_only_their_card(machine: Machine, tmp_path: Path) -> None:
    """Without namespaces the card's own `poweroff` comes first too; the host's is never reached by name."""
    config = tmp_path / "plain.toml"
    config.write_text('[[card]]\nnamespaces = false\ndisk = "none"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    found = machine.shell("command -v poweroff halt reboot shutdown").split()
    assert {os.path.dirname(p) for p in found} == {str(machine.run_dir / "mic0" / "bin")}
    assert machine.on_card("shutdown", "-h", "now").returncode == 0
    machine.micemu("wait", "ready", "--timeout", "40")
    assert "poweroff" in words(machine)


def test_cosm_50_hung_card_is_found_by_the_watchdog(machine: Machine) -> None:
    """SIGSTOP of the card OS: no process ends, only the heartbeat; after the window crashed; reset needs no help."""
    pids = machine.boot("--timing", "test", *QUICK)["cards"][0]["pids"]
    signal_tree(pids["os"], signal.SIGSTOP)
    machine.micemu("wait", "crashed", "--timeout", "40")
    assert seen(machine) == ("shutting_down", "crashed")
    machine.micemu("reset")
    assert seen(machine) == ("ready", "nop")
    assert machine.boot(*QUICK)["cards"][0]["state"] == "online"


def test_program_that_fails_on_a_card_that_was_lost_keeps_its_status_and_run_says_so(
    machine: Machine,
) -> None:
    """The card OS hangs and is declared crashed; a program on it ends by itself: its status, and what became of the card."""
    pid = machine.boot(*QUICK)["cards"][0]["pids"]["os"]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with machine.popen("run", "mic0", "--", "sh", "-c", "echo go; read x; exit 3", **pipes) as program:
        assert program.stdout
        assert program.stdout.readline() == "go\n"
        os.kill(pid, signal.SIGSTOP)
        machine.micemu("wait", "crashed", "--timeout", "40")
        _, err = program.communicate("\n", timeout=20)
    assert (program.returncode, err) == (3, "micemu: mic0 went down while sh was running\n")
    assert machine.on_card("true", check=False).returncode == 4


def test_cosm_51_heartbeat_off_keeps_a_hung_card_online(machine: Machine, tmp_path: Path) -> None:
    """heartbeat = false: longer than the watchdog's window nothing happens; a reset works."""
    config = tmp_path / "mic.toml"
    config.write_text('timing = "test"\n[[card]]\nheartbeat = false\ndisk = "none"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    window = 40 * PROFILES["test"].limit
    assert machine.micemu("wait", "crashed", "--timeout", f"{window + 0.5}", check=False).returncode == 5
    assert seen(machine) == ("online", "nop")
    machine.micemu("reset")
    assert seen(machine) == ("ready", "nop")


def test_cosm_60_one_failing_card_does_not_disturb_others(machine: Machine) -> None:
    """mic0 hangs in the middle and is reset; mic1 goes on and can be used meanwhile."""
    cards = machine.boot("-n", "2", *QUICK)["cards"]
    signal_tree(cards[0]["pids"]["os"], signal.SIGSTOP)
    reset = machine.popen("reset", "mic0", stdout=subprocess.DEVNULL)
    eventually(lambda: seen(machine)[0] == "resetting", 30, "the reset")
    assert machine.on_card("echo", "here", card="mic1").stdout == "here\n"
    signal_tree(cards[0]["pids"]["os"], signal.SIGCONT)
    assert reset.wait(timeout=30) == 0
    assert [c["state"] for c in machine.status()["cards"]] == ["ready", "online"]
    assert words(machine, "mic1") == ["booting", "online"]


def test_cosm_58_70_stop_with_cards_online_leaves_nothing(machine: Machine) -> None:
    """Cards that are online power off, one that has crashed is reset: all end ready; the directories are gone (also: what
    ``machine`` checks)."""
    crashed = machine.boot("-n", "3", *QUICK)["cards"][2]
    os.kill(crashed["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed", "mic2", "--timeout", "40")
    with (machine.run_dir / "log.jsonl").open() as log:  # it can be read when it has gone
        machine.micemu("stop")
        records = [json.loads(line) for line in log]
    assert not machine.run_dir.exists()
    machine.check_clean()
    down = ["shutting_down", "poweroff", "resetting", "nop", "ready"]
    assert [words_of(records, f"mic{n}")[2:] for n in range(2)] == [down, down]
    assert words_of(records, "mic2")[2:] == ["crashed", "shutting_down", "resetting", "nop", "ready"]


def test_cosm_64_crash_policy_reset_leaves_the_card_ready(machine: Machine, tmp_path: Path) -> None:
    """on_crash = "reset": crashed, reset, not booted."""
    config = tmp_path / "mic.toml"
    config.write_text('[[card]]\non_crash = "reset"\ndisk = "none"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "ready", "--timeout", "40")
    assert words(machine)[2:] == ["crashed", "shutting_down", "resetting", "nop", "ready"]
    assert machine.card()["boots"] == 1


def test_cosm_64_crash_policy_reboot_gives_up_after_its_limit(machine: Machine, tmp_path: Path) -> None:
    """on_crash = "reboot", max_reboots = 1: the first crash boots it again, the second leaves it ready."""
    config = tmp_path / "mic.toml"
    config.write_text('[[card]]\non_crash = "reboot"\nmax_reboots = 1\ndisk = "none"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    eventually(lambda: machine.card()["boots"] == 2 and seen(machine)[0] == "online", 20, "the second boot")
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    eventually(
        lambda: "left in ready" in (machine.run_dir / "log.jsonl").read_text(), 20, "the end of its patience"
    )
    assert seen(machine) == ("ready", "nop")


def test_cosm_64_card_that_restarts_again_and_again_is_left(machine: Machine, tmp_path: Path) -> None:
    """max_reboots = 1: its first `reboot` boots it again, the second leaves it ready, and the event stream says why."""
    config = tmp_path / "mic.toml"
    config.write_text('[[card]]\nmax_reboots = 1\ndisk = "none"\nnet = "none"\n')
    machine.micemu("boot", "--config", str(config))
    machine.on_card("reboot", check=False)
    eventually(lambda: machine.card()["boots"] == 2 and seen(machine)[0] == "online", 20, "the second boot")
    machine.on_card("reboot", check=False)
    log = machine.run_dir / "log.jsonl"
    eventually(lambda: '"gave_up"' in log.read_text(), 20, "the end of its patience")
    assert seen(machine) == ("ready", "nop")
    (end,) = [r for r in map(json.loads, log.read_text().splitlines()) if r.get("event") == "gave_up"]
    assert "it restarted itself: 2 times down in a row without 15 s online" in end["message"]


def test_cosm_21_66_command_line_reaches_the_card_and_is_cut(machine: Machine) -> None:
    """` mem=<MiB>M`, the daemon's network words, the administrator's text with stray quotes; 2047 characters."""
    cards = machine.boot("-n", "2", "--memory", "256M", "--cmdline", "don't=panic " + "x" * 3000, *QUICK)[
        "cards"
    ]
    for n, card in enumerate(cards, 1):
        log = machine.micemu("dump", "log", card["name"]).stdout
        line = next(row for row in log.splitlines() if "Command line: " in row).partition("Command line: ")[2]
        assert line.startswith(" mem=256M ")
        assert f" ifcfg=static;address,172.31.{n}.1;netmask,255.255.255.0 " in f" {line}"
        assert " don't=panic xxx" in line
        assert (len(line), line[-1]) == (2047, "x")
        addresses = card["addresses"]
        assert (addresses["host"], addresses["card"]) == (f"172.31.{n}.254", f"172.31.{n}.1")


def test_cosm_61_62_log_of_a_crashed_card_is_readable_until_the_reset(machine: Machine) -> None:
    """The kernel log lies in GDDR: it outlives the card OS and goes with the reset."""
    pids = machine.boot(*QUICK)["cards"][0]["pids"]
    eventually(
        lambda: "card is up" in machine.micemu("dump", "log").stdout, 20, "its last line"
    )  # after online
    os.kill(pids["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed", "--timeout", "30")
    assert "card is up" in machine.micemu("dump", "log", "mic0").stdout
    machine.micemu("reset")
    assert "card is up" not in machine.micemu("dump", "log", "mic0").stdout


def test_cosm_1_2_3_12_74_cards_that_never_booted(machine: Machine) -> None:
    """Four steppings: directories without gaps, the initial values, unset strings as zero bytes; tools find no error in it."""
    config = machine.home / "cards.toml"
    card = '[[card]]\nautoboot = false\nmemory = "64M"\nstepping = "{}"\nheartbeat = {}\n'
    steppings = {"mic0": "A0", "mic1": "B0", "mic2": "B1", "mic3": "C0"}
    config.write_text("".join(card.format(s, str(s != "C0").lower()) for s in steppings.values()))
    machine.micemu("host", "--config", str(config))
    files = machine.micemu("sysfs", "ls", "class/mic").stdout.split()
    assert sorted(f.split("/")[2] for f in files if f.endswith("/state")) == list(steppings)
    for name, stepping in steppings.items():
        row = {f: sysfs(machine, f"{name}/{f}") for f in ("family", "stepping", "state", "shutdown_status")}
        assert row == {
            "family": "x100\n", "stepping": f"{stepping}\n", "state": "ready\n", "shutdown_status": "nop\n",
        }  # fmt: skip
        assert [sysfs(machine, f"{name}/{f}") for f in ("cmdline", "firmware", "ramdisk", "bootmode")] == [
            ""
        ] * 4
        assert sysfs(machine, f"{name}/heartbeat_enable") == f"{int(stepping != 'C0')}\n"  # as configured
    info = machine.micemu("info", "mic2").stdout
    assert "Coprocessor Stepping       : B1" in info
    assert "Flash Version              : Not Available" in info
    failed = put(machine, "mic0/state", "boot")
    assert "bootmode is not set" in failed
    assert sysfs(machine, "mic0/state") == "ready\n"


def sysfs(machine: Machine, path: str) -> str:
    return machine.micemu("sysfs", "cat", path).stdout


def put(machine: Machine, path: str, text: str) -> str:
    """Write; the error text, "" when it succeeds."""
    return machine.micemu("sysfs", "write", path, text, check=False).stderr


def test_cosm_1_3_12_13_14_16_17_40_59_administrators_day(machine: Machine) -> None:
    """Attributes of a real card by the control socket: errnos of a boot by strings, boot, suspend, resume, force_reset."""
    machine.boot("-n", "2", *QUICK)
    machine.micemu("shutdown")
    files = machine.micemu("sysfs", "ls").stdout
    assert [f"class/mic/mic{n}/state" in files for n in range(3)] == [True, True, False]
    assert (sysfs(machine, "mic0/family"), sysfs(machine, "mic0/stepping")) == ("x100\n", "C0\n")
    assert put(machine, "mic0/family", "x") != ""
    put(machine, "mic0/firmware", "mic/missing.img")
    assert "No such file" in put(machine, "mic0/state", "boot")
    put(machine, "mic0/firmware", "mic/uos.img")
    put(machine, "mic0/ramdisk", "mic/missing.image")
    assert "No such file" in put(machine, "mic0/state", "boot")
    put(machine, "mic0/ramdisk", "mic/mic0.image")
    put(machine, "mic0/bootmode", "flash")
    assert "flash" in put(machine, "mic0/state", "boot")
    put(machine, "mic0/bootmode", "linux")
    put(machine, "mic0/cmdline", "hello=world")
    assert words(machine)[-1] == "ready"
    assert put(machine, "mic0/state", "boot") == ""
    machine.micemu("wait", "online", "mic0", "--timeout", "40")
    eventually(  # it writes that when it hears that it is online
        lambda: "card is up" in sysfs(machine, "kernel/debug/mic_cosm/mic0/log_buf"), 30, "the end of the card's boot in its log"
    )  # fmt: skip
    assert sysfs(machine, "kernel/debug/mic_host/mic0/post_code") == "FF"
    assert json.loads(machine.micemu("suspend", "--json").stdout)["suspended"] == ["mic0"]
    assert [c["state"] for c in machine.status()["cards"]] == ["ready", "ready"]
    assert sysfs(machine, "kernel/debug/mic_cosm/mic0/log_buf") == ""
    assert [c["state"] for c in machine.json("resume")["cards"]] == ["online", "ready"]
    assert sysfs(machine, "kernel/debug/mic_cosm/mic0/force_reset") == ""
    assert sysfs(machine, "mic0/state") == "ready\n"
    text = machine.micemu("metrics").stdout
    assert 'micemu_card_state{card="mic0",state="ready"} 1\n' in text
    assert 'micemu_card_boots_total{card="mic1"} 1\n' in text


def test_cosm_59_suspend_resets_what_hangs_or_has_crashed_and_is_never_refused(machine: Machine) -> None:
    """mic0 hangs in booting, and its board does not answer the reset; mic1 has crashed; mic2 is online and does not answer.
    Only mic2 was up: resume boots it, and nothing else."""
    names = ("mic0", "mic1", "mic2")
    cards = machine.boot("-n", "3", *QUICK)["cards"]
    machine.micemu("shutdown", "mic0")
    os.kill(cards[0]["pids"]["board"], signal.SIGSTOP)
    machine.micemu("sysfs", "write", "mic0/state", "boot")
    os.kill(cards[1]["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed", "mic1", "--timeout", "40")
    signal_tree(cards[2]["pids"]["os"], signal.SIGSTOP)
    before = [("booting", "nop"), ("shutting_down", "crashed"), ("online", "nop")]
    assert [seen(machine, c) for c in names] == before
    assert machine.json("suspend", "--timeout", "0.2")["suspended"] == ["mic2"]
    down = [("reset_failed", "nop"), ("ready", "nop"), ("ready", "nop")]
    assert [seen(machine, c) for c in names] == down
    machine.micemu("suspend")  # T24: nothing is done to a card that is down
    assert [seen(machine, c) for c in names] == down
    machine.micemu("resume")
    assert [seen(machine, c) for c in names] == [*down[:2], ("online", "nop")]
    assert words(machine).count("resetting") == 2  # after the shutdown, and at the first suspend
    os.kill(cards[0]["pids"]["board"], signal.SIGCONT)


def test_cosm_59_devices_and_disks_come_back_on_resume(machine: Machine) -> None:
    """Those of the configuration, those that were added or swapped since; what was removed stays the configuration's. Ends
    that were asked for are no warnings."""
    for name in ("one", "two", "three"):
        os.truncate(os.open(machine.home / f"{name}.img", os.O_CREAT | os.O_RDWR), 4 << 20)
    machine.boot("--disk", "one.img", "--net", "none")
    machine.micemu("vop", "add", "mic0", "block", "path=two.img", "name=data")
    machine.micemu("vop", "add", "mic0", "rng")
    machine.micemu("vop", "swap", "mic0", "block", "path=three.img")

    def devices() -> set[tuple[str, str, str]]:
        return {(d["type"], d["state"], Path(d.get("path", "")).name) for d in machine.card()["devices"]}

    before = devices()
    assert before == {
        ("console", "running", ""), ("block", "running", "three.img"), ("data", "running", "two.img"), ("rng", "running", ""),
    }  # fmt: skip
    for _ in range(2):
        machine.micemu("suspend")
        assert devices() == set()
        machine.micemu("resume")
        assert devices() == before
    assert "warning" not in machine.micemu("log", "--level", "warning").stdout
    machine.micemu("reboot")  # an ordinary boot is what the configuration says
    assert devices() == {("console", "running", ""), ("block", "running", "one.img")}
