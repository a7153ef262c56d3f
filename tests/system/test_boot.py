"""The main job: a card boots, carries data, goes down and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system


def test_boot_ends_online_with_three_devices(machine: Machine) -> None:
    """`micemu boot` ends with the card online and console, net and block running; the text names next commands."""
    out = machine.micemu("boot").stdout
    assert "mic0  online" in out
    assert "micemu console mic0" in out
    card = machine.card()
    assert {d["type"]: d["state"] for d in card["devices"]} == {
        "console": "running",
        "net": "running",
        "block": "running",
    }


def test_status_json_is_the_contract(machine: Machine) -> None:
    """schema, host pid, cards with name, state, shutdown_status, pids, net, devices with type, pid, state."""
    machine.boot()
    status = machine.status()
    assert status["schema"] == 1
    os.kill(status["host"]["pid"], 0)
    (card,) = status["cards"]
    assert (card["name"], card["state"], card["shutdown_status"]) == ("mic0", "online", "nop")
    for pid in (*card["pids"].values(), *(d["pid"] for d in card["devices"])):
        os.kill(pid, 0)
    assert card["net"] in ("ns", "responder")


def test_status_without_emulator_is_exit_3_and_valid_json(machine: Machine) -> None:
    """Nothing runs: exit status 3, and --json still prints the schema."""
    out = machine.micemu("status", "--json", check=False)
    assert out.returncode == 3
    assert json.loads(out.stdout) == {"schema": 1, "host": {"pid": None}, "cards": []}


def test_cosm_31_shutdown_then_boot_ten_times(machine: Machine) -> None:
    """Four cards come up, go down in order and come up again, ten times; each has its own disk and address."""
    status = machine.boot("-n", "4")
    disks = {d["path"] for c in status["cards"] for d in c["devices"] if d["type"] == "block"}
    assert len(disks) == 4
    for _ in range(10):
        down = machine.json("shutdown")
        assert {c["state"] for c in down["cards"]} == {"ready"}
        assert {c["shutdown_status"] for c in down["cards"]} == {"nop"}
        up = machine.boot()
        assert [c["state"] for c in up["cards"]] == ["online"] * 4


def test_events_tell_the_whole_story_of_a_shutdown(machine: Machine) -> None:
    """The event stream shows shutting_down, poweroff, resetting, ready in that order (COSM 5.6)."""
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("shutdown")
    out = machine.popen("events", "--recent", stdout=subprocess.PIPE, text=True)
    try:
        wanted = ["booting", "online", "shutting_down", "poweroff", "resetting", "nop", "ready"]
        seen: list[str] = []
        assert out.stdout
        for line in out.stdout:
            event = json.loads(line)
            assert event["schema"] == 1
            word = {"state": "state", "shutdown_status": "status"}.get(event["event"])
            if word:
                seen.append(event[word])
            if seen == wanted:
                break
            assert seen == wanted[: len(seen)]
    finally:
        out.kill()
        out.wait()
        if out.stdout:
            out.stdout.close()


@pytest.mark.parametrize("victim", ["board", "os"])
def test_hw_50_killed_card_is_crashed_at_once_and_boots_again(machine: Machine, victim: str) -> None:
    """kill -9 of the board or the card OS: shutting_down and crashed together, long before its silence would tell, no
    reset by itself, boot works."""
    card = machine.boot()["cards"][0]
    os.kill(card["pids"][victim], signal.SIGKILL)
    machine.micemu("wait", "crashed", "--timeout", "30")
    assert machine.card()["state"] == "shutting_down"
    log = (machine.run_dir / "log.jsonl").read_text().splitlines()
    (why,) = [r["why"] for r in map(json.loads, log) if r.get("event") == "crash"]
    assert "no heartbeat" not in why
    assert machine.boot()["cards"][0]["state"] == "online"


@pytest.mark.parametrize("kind", ["console", "net", "block"])
def test_vop_20_killed_backend_is_unplugged_and_plugged_again(machine: Machine, kind: str) -> None:
    """kill -9 of a backend: the card sees its device go and come back; the other devices keep their processes."""
    card = machine.boot()["cards"][0]
    before = {d["type"]: d["pid"] for d in card["devices"]}
    os.kill(before[kind], signal.SIGKILL)
    eventually(
        lambda: machine.device(kind)["state"] == "running" and machine.device(kind)["pid"] != before[kind], 30,
        f"a new {kind} backend",
    )  # fmt: skip
    now = {d["type"]: d["pid"] for d in machine.card()["devices"]}
    assert {k: v for k, v in now.items() if k != kind} == {k: v for k, v in before.items() if k != kind}
    assert machine.card()["state"] == "online"
    assert machine.on_card("true").returncode == 0


@pytest.mark.parametrize("victim", ["host", "init"])
def test_killed_host_takes_everything_along_and_boot_works_at_once(machine: Machine, victim: str) -> None:
    """kill -9 of the host process or of init: nothing is left running, status says so, boot works at once."""
    status = machine.boot()
    os.kill(status["host"]["pid" if victim == "host" else "init"], signal.SIGKILL)
    assert machine.boot()["cards"][0]["state"] == "online"
    machine.micemu("stop")
    machine.check_clean()


def test_stop_sweeps_what_a_killed_init_left(machine: Machine) -> None:
    """kill -9 of init, and nobody boots again: stop says that nothing runs, and nothing is left."""
    status = machine.boot()
    os.kill(status["host"]["init"], signal.SIGKILL)
    eventually(lambda: not machine.processes(), 30, "the end of all processes")
    assert machine.run_dir.is_dir()
    assert machine.micemu("stop", check=False).returncode == 3
    assert not machine.run_dir.exists()
    machine.check_clean()


def test_second_boot_of_an_online_card_is_refused(machine: Machine) -> None:
    """One clear sentence with the fix, exit status 4, the card unharmed (COSM-18)."""
    pids = machine.boot()["cards"][0]["pids"]
    again = machine.micemu("boot", check=False)
    assert again.returncode == 4
    assert again.stderr.strip().splitlines() == [
        "micemu: mic0 is online already: micemu reboot mic0 restarts it"
    ]
    assert machine.card()["pids"] == pids


def test_commands_show_the_cards_that_they_were_given(machine: Machine) -> None:
    """Without names all cards that are down boot, and those that are up stay as they are."""
    before = machine.boot("-n", "2", "--disk", "none", "--net", "none")["cards"]

    def shown(*words: str) -> list[tuple[str, str]]:
        return [(c["name"], c["state"]) for c in machine.json(*words)["cards"]]

    assert shown("reset", "mic1") == [("mic1", "ready")]
    assert shown("boot", "mic1") == [("mic1", "online")]
    assert shown("shutdown", "mic1") == [("mic1", "ready")]
    assert shown("boot", "-n", "3") == [("mic0", "online"), ("mic1", "online"), ("mic2", "online")]
    assert shown("reboot", "mic1", "mic2") == [("mic1", "online"), ("mic2", "online")]
    assert machine.card()["pids"] == before[0]["pids"]


def test_cosm_20_27_reboot_of_a_card_that_hangs_in_booting(machine: Machine) -> None:
    """A board that is stopped boots nothing; run says what to do, and reboot resets before it boots. All that time the files
    can be read."""
    # By the card's own times a reset waits 45 s for the board: long enough to see it.
    status = machine.boot("--timing", "x100", "--disk", "none", "--net", "none")
    board = status["cards"][0]["pids"]["board"]
    machine.micemu("reset")
    os.kill(board, signal.SIGSTOP)
    machine.micemu("sysfs", "write", "mic0/state", "boot")
    refused = machine.micemu("run", "mic0", "--", "true", check=False)
    assert (refused.returncode, refused.stderr) == (
        4, "micemu: mic0 is booting: micemu wait online mic0 waits for it\n",
    )  # fmt: skip
    rebooting = machine.popen("reboot", "mic0")
    machine.micemu("wait", "resetting")
    names = ("state", "shutdown_status", "bootmode")
    read = [machine.micemu("sysfs", "cat", f"mic0/{name}").stdout for name in names]
    assert read == ["resetting\n", "nop\n", "linux\n"]
    os.kill(board, signal.SIGCONT)
    assert rebooting.wait(60) == 0
    assert machine.card()["state"] == "online"


def test_cosm_38_a_reset_that_fails_is_named_by_whoever_wanted_it(machine: Machine) -> None:
    """reset_failed: exit status 1 and why, also of boot and reboot; the board works again, and so does boot."""
    board = machine.boot("--disk", "none", "--net", "none")["cards"][0]["pids"]["board"]
    os.kill(board, signal.SIGSTOP)
    for command in ("reset", "boot", "reboot"):
        failed = machine.micemu(command, "mic0", check=False)
        assert (failed.returncode, failed.stderr) == (
            1, "micemu: mic0: the firmware did not become ready after the reset\n",
        )  # fmt: skip
        assert machine.card()["state"] == "reset_failed"
    os.kill(board, signal.SIGCONT)
    assert machine.boot()["cards"][0]["state"] == "online"


def test_reboot_gives_a_new_card_os_on_the_same_board(machine: Machine) -> None:
    """reboot: the board outlives the card OS, which is a new process."""
    before = machine.boot()["cards"][0]["pids"]
    after = machine.json("reboot")["cards"][0]["pids"]
    assert before["board"] == after["board"]
    assert before["os"] != after["os"]
