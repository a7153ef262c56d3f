"""micctrl, info, check, cp and shell against a whole machine (COSM 10.4, 11, 13)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
QUICK = ("--disk", "none", "--net", "none")


def micctrl(machine: Machine, *args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mic_emu.cli.micctrl", *args], env=machine.env, cwd=machine.home, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_cosm_67_without_driver_and_with_wrong_options(machine: Machine) -> None:
    """`Module unloaded ` and 3; usage and 2; MPSS 3: 150 for a bad option, 2 for a bad name, 1 without daemon."""
    for option in ("-s", "-b", "-r", "-S", "-w"):
        assert micctrl(machine, option) == (3, "Module unloaded \n", "")
    for bad in ((), ("-x",), ("mic0",)):
        code, out, _ = micctrl(machine, *bad)
        assert (code, out.startswith("usage: micctrl")) == (2, True)
    assert micctrl(machine, "--nonsense")[0] == 150
    code, out, _ = micctrl(machine, "-s", "card0")
    assert (code, len(out.splitlines())) == (2, 2)
    code, out, _ = micctrl(machine, "--boot")
    assert (code, out) == (1, "  [Error] Cannot boot cards - mpssd daemon is not running\n")
    assert micctrl(machine, "--status", "-t", "1801")[0] == 3
    assert micctrl(machine, "--useradd=x")[0] == 1


def test_cosm_67_68_69_script_words(machine: Machine) -> None:
    """-s -S -w -b -r for two cards: lines, exit codes; an online card is left alone by -b."""
    machine.boot("-n", "2", *QUICK)
    assert micctrl(machine, "-s") == (
        0, "mic0 state: online shutdown_status: nop\nmic1 state: online shutdown_status: nop\n", "",
    )  # fmt: skip
    pids = machine.card()["pids"]
    code, out, err = micctrl(machine, "-b", "mic0")
    assert (code != 0, out, "Invalid argument" in err) == (True, "", True)
    assert machine.card()["pids"] == pids
    assert micctrl(machine, "-S", "mic1")[:2] == (0, "")
    code, out, _ = micctrl(machine, "-w", "mic1")
    assert (code, set(out.splitlines()) <= {"Waiting for mic1 to go offline"}) == (0, True)
    machine.micemu("wait", "ready", "mic1")
    code, out, err = micctrl(machine, "-b")  # mic0 is online: stops at the first failing one
    assert (code, machine.card("mic1")["state"]) == (1, "ready")
    assert micctrl(machine, "-b", "mic1")[0] == 0
    machine.micemu("wait", "online", "mic1")
    assert micctrl(machine, "-r", "mic1")[0] == 0
    machine.micemu("wait", "ready", "mic1")
    assert micctrl(machine, "-r", "mic1")[0] == 1
    code, out, err = micctrl(machine, "-s", "mic9")
    assert (code, out, "there is no card mic9; cards: mic0, mic1" in err) == (1, "", True)


def test_cosm_65_69_wait_ends_when_the_reset_has_failed(machine: Machine) -> None:
    """The board does not answer: -r succeeds, -w ends, the card has no backend any more and stays as it is; a reset by hand
    brings it back. -w on a card that is online ends at once, on one that boots when it is online."""
    card = machine.boot("--net", "none")["cards"][0]
    assert micctrl(machine, "-w", "mic0") == (0, "", "")
    os.kill(card["pids"]["board"], signal.SIGSTOP)
    for _ in range(2):  # from online, and from reset_failed
        assert micctrl(machine, "-r", "mic0") == (0, "", "")
        code, out, _ = micctrl(machine, "-w", "mic0")
        assert (code, set(out.splitlines()) <= {"Waiting for mic0 to go offline"}) == (0, True)
        assert micctrl(machine, "-s")[1] == "mic0 state: reset_failed shutdown_status: nop\n"
    assert [not Path(f"/proc/{device['pid']}").exists() for device in card["devices"]] == [True, True]
    assert machine.card()["devices"] == []
    code, _, err = micctrl(machine, "-b", "mic0")
    assert (code, "Invalid argument" in err) == (1, True)
    os.kill(card["pids"]["board"], signal.SIGCONT)
    assert [micctrl(machine, option, "mic0")[0] for option in ("-r", "-w")] == [0, 0]
    assert machine.card()["state"] == "ready"
    assert [micctrl(machine, option, "mic0")[0] for option in ("-b", "-w")] == [0, 0]
    assert machine.card()["state"] == "online"


def test_cosm_70_mpss3_words_and_orderly_end(machine: Machine) -> None:
    """Long forms as MPSS 3; a crash reads as lost; shut down, all ready, and `stop` leaves no daemon."""
    image = machine.boot(*QUICK) and json.loads(machine.micemu("status", "--json").stdout)
    assert image
    code, out, _ = micctrl(machine, "--status")
    assert (code, out.startswith("mic0: online (mode: linux image: /")) == (0, True)
    assert micctrl(machine, "--reset", "mic3") == (
        1,
        "  [Error] mic3: Reset aborted - non existent MIC device\n",
        "",
    )
    assert micctrl(machine, "--shutdown", "-w")[1].splitlines()[0] == "mic0: Shutting down"
    machine.micemu("wait", "ready")
    assert micctrl(machine, "--reset") == (1, "  [Error] mic0 Reset failed - card state ready\n", "")
    code, out, _ = micctrl(machine, "-b", "-w", "mic0")
    assert (code, out.splitlines()[1:]) == (0, ["mic0: online"])
    code, out, _ = micctrl(machine, "-R", "-w")
    assert (code, out.splitlines()[0], out.splitlines()[-1]) == (0, "mic0: shutting down", "mic0: online")
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed")
    assert micctrl(machine, "--status")[1] == "mic0: lost\n"
    machine.micemu("reset")
    machine.micemu("stop")
    assert micctrl(machine, "-s")[0] == 3


def test_cosm_40_70_mpss3_exit_codes_count_cards_and_tell_a_time_out(machine: Machine) -> None:
    """COSM 11.5: one for each card that failed, or that is neither online nor ready after a wait; 11 when the wait's time is
    over. -r -f resets a card that is ready, too."""
    cards = machine.boot("-n", "2", *QUICK)["cards"]
    for card in cards:
        os.kill(card["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed", "--timeout", "40")
    assert micctrl(machine, "--wait", "-t", "30") == (2, "mic0: lost\nmic1: lost\n", "")
    lines = "".join(f"  [Error] mic{n} Shutdown failed - card state lost\n" for n in range(2))
    assert micctrl(machine, "--shutdown") == (2, lines, "")
    assert micctrl(machine, "--reset", "-w") == (
        0, "mic0: resetting\nmic1: resetting\nmic0: ready\nmic1: ready\n", "",
    )  # fmt: skip
    assert micctrl(machine, "--reset", "-f", "mic1") == (0, "mic1: resetting\n", "")
    assert machine.card("mic1")["state"] == "ready"
    log = [json.loads(line) for line in (machine.run_dir / "log.jsonl").read_text().splitlines()]
    assert [r["old"] for r in log if (r.get("card"), r.get("state")) == ("mic1", "resetting")] == [
        "shutting_down",
        "ready",
    ]
    assert micctrl(machine, "--wait", "mic7") == (
        1, "  [Error] mic7: Wait aborted - non existent MIC device\n", "",
    )  # fmt: skip
    os.kill(cards[0]["pids"]["board"], signal.SIGSTOP)  # it never comes up
    machine.micemu("sysfs", "write", "mic0/state", "boot")
    timed_out = (11, "Timeout booting MIC, check your installation\n", "")
    assert micctrl(machine, "--wait", "-t", "0.2") == timed_out
    os.kill(cards[0]["pids"]["board"], signal.SIGCONT)
    assert micctrl(machine, "--wait", "-t", "60", "mic0") == (0, "mic0: online\n", "")


def test_cosm_11_6_configuration_is_shown_and_not_set(machine: Machine) -> None:
    """--config, --network and --autoboot show what is in force, also that there is no network; a card that is missing is
    an error of each; what would set is refused with the key that does."""
    (machine.home / "c.toml").write_text(
        '[[card]]\nmemory = "64M"\nnet = "responder"\ndisk = "none"\n'
        '[[card]]\nmemory = "64M"\nnet = "none"\ndisk = "none"\nautoboot = false\ncmdline = "debug"\n'
    )
    machine.micemu("host", "--config", "c.toml")
    code, out, _ = micctrl(machine, "--config")
    first, second = (dict(re.findall(r"^ +([\w ]+): +(.*)$", t, re.M)) for t in out.split("mic1:\n"))
    assert code == 0
    assert (first["BootOnStart"], first["Network"], first["MIC IP"]) == (
        "Enabled",
        "Static Pair",
        "172.31.1.1",
    )
    assert (first["MIC MAC"], first["Host MAC"]) == ("02:4d:49:43:00:01", "02:4d:49:43:00:fe")
    assert (second["BootOnStart"], second["Network"], second["ExtraCommandLine"]) == (
        "Disabled", "Not configured", "debug",
    )  # fmt: skip
    assert "MIC IP" not in second
    assert micctrl(machine, "--autoboot", "mic1") == (0, "mic1:\tBootOnStart: disabled\n", "")
    code, out, _ = micctrl(machine, "--network")
    assert (code, out.splitlines()) == (
        0,
        ["mic0: StaticPair", "    Hostname: mic0", "    Mic (02:4d:49:43:00:01 172.31.1.1)",
         "    Host (02:4d:49:43:00:fe 172.31.1.254)", "mic1: Not configured"],
    )  # fmt: skip
    for command in ("--config", "--autoboot", "--network"):
        missing = "  [Error] mic7: Config aborted - non existent MIC device\n"
        assert micctrl(machine, command, "mic7") == (1, missing, "")
    code, out, _ = micctrl(machine, "--autoboot=no")
    assert (code, "write autoboot = true or false into the card's [[card]] table" in out) == (1, True)
    assert micctrl(machine, "--network=dhcp")[0] == 1
    assert "Device No: 1, Device Name: mic1 [x100]" in machine.micemu("info", "mic1").stdout


def test_cosm_71_72_73_74_info_check_cp_shell(machine: Machine, tmp_path: Path) -> None:
    """All checks pass when every card is online and name the card that is not; info says Not Available; files travel."""
    machine.boot("-n", "2", "--disk", "none", "--net", "responder")
    done = machine.micemu("check", "--ping")
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("Executing default tests for host", "Status: OK")
    assert "  Test 5 (mic1): Check systoolsd is running in device ... pass" in lines
    info = machine.micemu("info").stdout
    assert "Device No: 1, Device Name: mic1 [x100]" in info
    assert "Die Temp                   : Not Available" in info
    assert machine.json("info", "mic0", "-g", "board")["mic0"]["board"]["PCIe Width"] == "x16"

    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "x").write_bytes(os.urandom(100_000))
    (folder / "run me").write_text("#!/bin/sh\necho ran\n")
    (folder / "run me").chmod(0o755)
    machine.micemu("cp", str(folder), "mic0:/tmp/there")
    assert machine.on_card("/tmp/there/run me").stdout == "ran\n"
    machine.micemu("cp", "-r", "mic0:/tmp/there/x", "mic1:/tmp")
    machine.micemu("cp", "mic1:/tmp/x", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (folder / "x").read_bytes()
    missing = machine.micemu("cp", "mic0:/tmp/none", ".", check=False)
    assert (missing.returncode, "cannot read mic0:/tmp/none" in missing.stderr) == (1, True)
    assert machine.micemu("shell", "mic1", "-c", "hostname; exit 3", check=False).stdout == "mic1\n"

    os.kill(machine.card("mic1")["pids"]["os"], signal.SIGKILL)
    eventually(lambda: machine.card("mic1")["shutdown_status"] == "crashed", 20, "the crash of mic1")
    done = machine.micemu("check", check=False)
    assert done.returncode == 1
    assert "Test 4 (mic1)" in done.stdout
    assert "Test 5 (mic1)" not in done.stdout
    assert (
        "Failure: mic1: Check device state and POST code: the device is in state shutting_down (crashed), not online"
        in done.stderr
    )


def test_cosm_74_smc_shows_live_data_and_keeps_settings(machine: Machine) -> None:
    """Sections in micsmc's words; led and turbo are kept per card, ecc is read-only, what silicon has is refused; a card
    that is down is an error and the others are shown."""
    machine.boot("-n", "2", *QUICK)
    shown = machine.micemu("smc", "show-data", "mic0").stdout
    titles = [line.strip() for line in shown.splitlines() if line.startswith("   ") and line[3] != " "]
    assert titles == [
        "Coprocessor Information:", "Thermal Information:", "Observed Frequency and Power Usage:", "Memory Usage:",
        "Core Utilization:",
    ]  # fmt: skip
    assert "Cpu Temp                 : Not Available" in shown
    cores = [line for line in shown.splitlines() if "Core #" in line]
    number = next(line.split()[-1] for line in shown.splitlines() if "Number Of Cores" in line)
    assert len(cores) == int(number)
    assert "Thermal" not in machine.micemu("smc", "show-data", "-m", "-c", "mic0").stdout

    assert machine.micemu("smc", "enable", "led,turbo", "mic1").stdout.count("Successful") == 2
    assert [machine.micemu("smc", "show-settings", "led", m).stdout.split()[-1] for m in ("mic0", "mic1")] == [
        "disabled", "enabled",
    ]  # fmt: skip
    machine.micemu("smc", "disable", "all")
    assert "enabled" not in machine.micemu("smc", "show-settings", "led,turbo").stdout
    for args, code, text in (
        (["enable", "ecc", "mic0"], 1, "ecc can only be read"), (["enable", "pc6"], 2, "real silicon"),
        (["show-settings", "fan"], 2, "no setting"), (["show-data", "mic5"], 6, "no card mic5"),
    ):  # fmt: skip
        done = machine.micemu("smc", *args, check=False)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr

    machine.micemu("shutdown", "mic0")
    assert (
        machine.micemu("smc", "show-data", "--online", "--offline").stdout
        == "Online Cards: mic1\nOffline Cards: mic0\n"
    )
    done = machine.micemu("smc", "show-data", "--mem", check=False)
    assert (done.returncode, "mic0 is ready, not online" in done.stderr, "mic1:" in done.stdout) == (
        1,
        True,
        True,
    )
