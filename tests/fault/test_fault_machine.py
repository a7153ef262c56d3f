"""Faults in a whole emulator: what a person notices, from the command line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path

import pytest
from nbdwire import READ, NbdClient

from mic_emu.testing.faults import add_fault, fault_events
from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system


def uri(machine: Machine) -> str:
    return f"nbd+unix:///vda?socket={machine.card()['run_dir']}/vda.nbd"


def ping(machine: Machine, count: int, wait_s: int = 20) -> int:
    """How many of the answers came in time."""
    out = machine.micemu("ping", "mic0", "-c", str(count), "-W", str(wait_s), "--json", check=False).stdout
    return int(json.loads(out)["received"])


def qemu_io(machine: Machine, *commands: str) -> str:
    """qemu-io on the card's disk; what it said."""
    args = [a for c in commands for a in ("-c", c)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *args, uri(machine)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout + done.stderr


def disk_read(machine: Machine, nbytes: int) -> None:
    """Through the card's NBD socket, 128 KiB at a time."""
    with NbdClient(f"{machine.card()['run_dir']}/vda.nbd") as nbd:
        nbd.go(b"vda")
        for at in range(0, nbytes, 128 << 10):
            assert nbd.call(READ, at, min(nbytes - at, 128 << 10))[0] == 0


# --- what is refused ----------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_and_an_exit_status(machine: Machine) -> None:
    """Unknown kind, card, device, number, word or value: status 2 or 6, the fix in the message, no traceback."""
    add = ("fault", "add")
    assert machine.micemu(*add, "mic0", "packet-loss", check=False).returncode == 3  # nothing runs
    machine.boot("--net", "none")
    for args, status, says in [
        ((*add, "mic0", "packet-lost"), 2, "did you mean 'packet-loss'"),
        (
            (*add, "mic0", "doorbell-drop", "--device", "net"),
            2,
            "no device 'net'; devices: console, block, vda, scif",
        ),
        ((*add, "mic0", "disk-error", "--device", "console"), 2, "is for disks"),
        ((*add, "mic0", "disk-error", "--rate", "2"), 2, "use a number from 0 to 1"),
        ((*add, "mic0", "disk-error", "--bandwidth", "2"), 2, "disk-error has no 'bandwidth'"),
        ((*add, "mic0", "disk-delay"), 2, "needs delay"),
        ((*add, "mic0", "disk-error", "--errno"), 2, "requires an argument"),
        ((*add, "mic7", "disk-error"), 6, "there is no card mic7"),
        (("fault", "remove", "mic0", "3"), 2, "has no fault 3; faults: none"),
        (("fault", "remove", "mic0"), 2, "--all"),
        (("fault", "list", "mic7"), 6, "there is no card mic7"),
    ]:
        done = machine.micemu(*args, check=False)
        assert (done.returncode, done.stdout) == (status, ""), args
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert machine.card()["faults"] == []


def test_kinds_and_help_are_there(machine: Machine) -> None:
    """fault kinds names every kind with its words, without an emulator; every command has examples."""
    kinds = machine.json("fault", "kinds")
    assert "bandwidth" in kinds["link"]["parameters"]
    for command in ("add", "list", "remove", "kinds"):
        assert "Example" in machine.micemu("fault", command, "--help").stdout


def test_configuration_with_a_fault_for_a_missing_device_is_refused(machine: Machine) -> None:
    """Before anything starts: exit status 2, nothing is left."""
    path = machine.home / "lab.toml"
    path.write_text('[[card]]\nnet = "none"\n[[card.fault]]\nkind = "doorbell-drop"\ndevice = "net"\n')
    done = machine.micemu("boot", "--config", str(path), check=False)
    assert done.returncode == 2
    assert "mic0 has no device 'net'" in done.stderr


# --- the card OS --------------------------------------------------------------------------------------


def test_cosm_50_os_kill_at_a_time_is_a_crash(machine: Machine) -> None:
    """The card OS dies after the delay: crashed; the filter is spent and gone; the next boot is well."""
    machine.boot("--net", "none")
    begin = time.monotonic()
    fault = add_fault(machine, "os-kill", delay="1s")
    machine.micemu("wait", "crashed", "--timeout", "30")
    assert time.monotonic() - begin >= 1
    assert eventually(lambda: fault.row() is None, 20, "the end of the filter")
    assert fault.hits == 1
    assert machine.boot()["cards"][0]["state"] == "online"


def test_os_kill_by_configuration_counts_boots(machine: Machine) -> None:
    """count = 2: the first two boots die after coming online, the third lives; on_crash boots again."""
    path = machine.home / "lab.toml"
    path.write_text(
        '[[card]]\nnet = "none"\non_crash = "reboot"\n[[card.fault]]\nkind = "os-kill"\ndelay = "200ms"\ncount = 2\n'
    )
    machine.micemu(
        "boot", "--config", str(path), check=False
    )  # the card may die before boot has looked at it
    eventually(lambda: machine.card()["crashes"] == 2, 20, "two crashes")
    eventually(lambda: machine.card()["state"] == "online", 20, "the third boot")
    assert machine.card()["faults"] == []
    assert [e["hits"] for e in fault_events(machine) if e["event"] == "fault-triggered"] == [1, 2]


@pytest.mark.peer("qemu-io")
def test_os_kill_at_a_doorbell_strikes_at_exactly_that_one(machine: Machine) -> None:
    """The card dies in the middle of its N-th doorbell of the disk, not before."""
    machine.boot("--net", "none")
    fault = add_fault(machine, "os-kill", device="vda", after=3)
    for n in range(20):
        qemu_io(machine, f"read {n * 4096} 4096")
        if machine.card()["shutdown_status"] == "crashed":
            break
    machine.micemu("wait", "crashed", "--timeout", "30")
    assert eventually(lambda: fault.row() is None, 20, "the end of the filter")
    assert (fault.seen, fault.hits) == (4, 1)


def test_cosm_50_os_hang_is_found_by_the_watchdog(machine: Machine) -> None:
    """A card OS that stops dead sends no heartbeat: crashed; boot resets it, and the filter goes with it."""
    machine.boot("--timing", "test", "--net", "none")
    pid = machine.card()["pids"]["os"]
    fault = add_fault(machine, "os-hang")
    stat = Path(f"/proc/{pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 20, "the card OS to stop")
    assert machine.card()["state"] == "online"
    machine.micemu("wait", "crashed", "--timeout", "40")
    assert fault.row() is not None
    assert machine.boot()["cards"][0]["state"] == "online"
    eventually(lambda: fault.row() is None, 20, "the end of the filter")


def test_removing_a_hang_lets_the_card_go_on(machine: Machine) -> None:
    """Within the watchdog's time nothing has happened."""
    machine.boot("--net", "none")
    path = f"{machine.card()['run_dir']}/vda.nbd"
    with machine.fault("os-hang") as fault:
        eventually(lambda: fault.hits == 1, 20, "the hang")
        with NbdClient(path, greet=False) as nbd:
            nbd.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                nbd.recv(16)
    disk_read(machine, 4096)
    assert machine.card()["state"] == "online"


@pytest.mark.peer("qemu-io")
def test_os_hang_at_a_doorbell_stops_the_card(machine: Machine) -> None:
    """The card OS stops at its third doorbell of the disk: that request gets no answer until the hang ends."""
    machine.boot("--net", "none")
    with machine.fault("os-hang", device="block", after=2) as fault:
        reader = machine.popen(
            "run", "host", "--", "qemu-io", "-f", "raw", *["-c", "read 0 4k"] * 50, uri(machine)
        )
        try:
            eventually(lambda: fault.hits == 1, 30, "the hang")
            stat = Path(f"/proc/{machine.card()['pids']['os']}/stat")
            eventually(
                lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 20, "the card OS to stop"
            )
            assert reader.poll() is None
            assert fault.seen == 3
            fault.remove()
            assert reader.wait(30) == 0
        finally:
            reader.kill()
            reader.wait()


def test_cosm_50_heartbeat_stop_is_a_crash_of_a_living_card(machine: Machine) -> None:
    """COSM-50: without heartbeats the watchdog fires, although the card OS works; status names the fault."""
    machine.boot("--timing", "test", "--net", "none")
    with machine.fault("heartbeat-stop"):
        assert "heartbeat-stop" in machine.micemu("status").stdout
        machine.micemu("wait", "crashed", "--timeout", "25")
        assert machine.card()["pids"]["os"]


# --- network and disk -----------------------------------------------------------------------------------


def test_ping_loses_packets_and_recovers(machine: Machine) -> None:
    """Half of the frames are lost: so are pings; counts are visible meanwhile; without the filter all answer."""
    machine.boot()
    assert ping(machine, 3) == 3
    with machine.fault("packet-loss", rate=0.5, seed=11) as fault:
        assert ping(machine, 10, wait_s=1) < 10
        assert 0 < fault.hits < fault.seen
        metrics = machine.micemu("metrics").stdout
        assert 'micemu_fault_hits_total{card="mic0",fault="1",kind="packet-loss"}' in metrics
    assert ping(machine, 3) == 3


def test_ping_over_lost_late_and_double_doorbells(machine: Machine) -> None:
    """Double and late doorbells cost time only; a lost one waits for the next: the stack goes on."""
    machine.boot()
    with machine.fault("doorbell-duplicate") as double, machine.fault("doorbell-delay", delay="2ms") as late:
        assert ping(machine, 5) == 5
        assert machine.shell("echo alive").strip() == "alive"
        assert double.hits > 0 < late.hits
    with machine.fault("doorbell-drop", device="net", rate=0.3, seed=2) as lost:
        ping(machine, 10, wait_s=1)
        assert lost.seen > 0
    assert ping(machine, 3) == 3
    assert machine.card()["state"] == "online"


@pytest.mark.parametrize("direction", ["to-host", "to-card"])
def test_a_disk_that_lost_a_doorbell_goes_on_when_the_filter_is_removed(
    machine: Machine, direction: str
) -> None:
    """EVENT_IDX asks for one notification at a time: the request whose doorbell is lost waits, those behind it too,
    until the filter is removed; then all are answered."""
    machine.boot("--net", "none")
    with NbdClient(f"{machine.card()['run_dir']}/vda.nbd") as nbd:
        nbd.go(b"vda")
        with machine.fault("doorbell-drop", device="vda", direction=direction) as lost:
            waiting = nbd.request(READ, 0, 4096)
            while (
                select.select([nbd.sock], [], [], 0.5)[0] or not lost.hits
            ):  # whoever still polls needs no doorbell
                assert nbd.simple(4096)[:2] == (0, waiting)
                waiting = nbd.request(READ, 0, 4096)
        assert nbd.simple(4096)[:2] == (0, waiting)
        assert nbd.call(READ, 0, 4096)[0] == 0


def test_scif_takes_double_and_late_doorbells(machine: Machine) -> None:
    """The link's doorbells twice and late: connections between host and card work all the same."""
    machine.boot("--net", "none")
    with (
        machine.fault("doorbell-duplicate", device="scif") as double,
        machine.fault("doorbell-delay", device="scif", delay="1ms") as late,
    ):
        assert "mic0" in machine.micemu("info").stdout
        assert double.hits > 0 < late.hits
    assert machine.card()["state"] == "online"


@pytest.mark.peer("qemu-io")
def test_disk_fails_and_tears_as_a_program_sees_it(machine: Machine) -> None:
    """EIO where it was asked for, count times; a torn write ends at its sector, also in the image."""
    image = machine.home / "disk.img"
    machine.boot("--net", "none", "--disk", str(image), "--disk-size", "16M")
    machine.micemu("fault", "add", "mic0", "disk-error", "--device", "vda", "--op", "write", "--count", "1")
    said = qemu_io(machine, "read 0 4k", "write -P 5 0 4k", "write -P 5 0 4k", "read -P 5 0 4k")
    assert said.count("Input/output error") == 1
    assert "write failed" in said
    assert "Pattern verification failed" not in said
    with machine.fault("disk-torn", keep=3, report="success"):
        assert "failed" not in qemu_io(machine, "write -P 9 8k 4k")
    assert image.read_bytes()[8192:12288] == b"\x09" * 1536 + bytes(2560)
    kinds = [(e["event"], e["kind"]) for e in fault_events(machine)]
    assert kinds.count(("fault-triggered", "disk-error")) == 1
    assert kinds[:3] == [(f"fault-{w}", "disk-error") for w in ("added", "triggered", "removed")]


@pytest.mark.peer("qemu-io")
def test_filters_survive_backend_card_and_reset(machine: Machine) -> None:
    """A restarted backend, a crashed card and a boot find the filter again, with its counts."""
    machine.boot("--net", "none")
    fault = add_fault(machine, "disk-error", device="block", op="read", seed=4)
    assert "Input/output error" in qemu_io(machine, "read 0 4k")
    first = fault.hits
    old = machine.device("block")["pid"]
    os.kill(old, 9)
    eventually(
        lambda: machine.device("block")["pid"] not in (None, old) and machine.device("block")["state"] == "running",
        20, "a new backend",
    )  # fmt: skip
    assert "Input/output error" in qemu_io(machine, "read 0 4k")
    assert fault.hits > first
    machine.micemu("reboot", "mic0")
    seen = fault.hits
    assert "Input/output error" in qemu_io(machine, "read 0 4k")
    assert fault.hits > seen
    fault.remove()
    assert "Input/output error" not in qemu_io(machine, "read 0 4k")


def test_a_filter_may_wait_for_its_card_and_its_device(machine: Machine) -> None:
    """Added while the card is down it acts from the boot on; its device gone, list says that it waits."""
    machine.boot("--net", "none")
    machine.micemu("shutdown")
    fault = add_fault(machine, "doorbell-duplicate", device="block")
    row = fault.row()
    assert row is not None
    assert row["waits"] is True
    machine.boot("--memory", "512M")  # other hardware in the slot; the filter is the slot's
    row = fault.row()
    assert row is not None
    assert row["waits"] is False
    disk_read(machine, 4096)
    assert fault.seen > 0
    machine.micemu("vop", "remove", "mic0", "block")
    row = fault.row()
    assert row is not None
    assert row["waits"] is True
    assert "waits for its device" in machine.micemu("fault", "list").stdout


def test_the_seed_of_a_filter_can_be_read(machine: Machine) -> None:
    """What repeats a run: the list and the event show the seed, also one that nobody gave."""
    machine.boot("--net", "none")
    machine.micemu("fault", "add", "mic0", "disk-error", "--rate", "0.5")
    machine.micemu("fault", "add", "mic0", "disk-error", "--rate", "0.5", "--seed", "7")
    machine.micemu("fault", "add", "mic0", "disk-error", "--op", "write")
    ends = [line.split()[-1] for line in machine.micemu("fault", "list").stdout.splitlines()]
    assert ends == ["seed=1", "seed=7", "op=write"]  # the last one has nothing to decide
    events = machine.micemu("events", "--recent", "--count", "100").stdout.splitlines()
    assert [e["seed"] for e in map(json.loads, events) if e["event"] == "fault-added"] == [1, 7, 3]


def test_slow_link_slows_the_disk(machine: Machine) -> None:
    """1 MB/s: half a MiB through the disk takes half a second; the preset is accepted as well."""
    machine.boot("--net", "none")
    with machine.fault("link", bandwidth="1M") as link:
        begin = time.monotonic()
        disk_read(machine, 512 << 10)
        assert time.monotonic() - begin >= 0.5
        assert link.hits > 0
    with machine.fault("link", preset="x100"):
        disk_read(machine, 512 << 10)
    assert not [e for e in fault_events(machine) if e["event"] == "fault-triggered"]


def test_events_are_bounded_and_lose_no_hit(machine: Machine) -> None:
    """Thousands of hits make a few events; the numbers in them add up to the count."""
    machine.boot("--net", "none")
    with machine.fault("doorbell-drop", rate=0) as never, machine.fault("doorbell-duplicate") as fault:
        disk_read(machine, 48 << 20)
        assert never.hits == 0
        assert fault.hits > 10
    events = fault_events(machine, number=fault.id)
    times = [e["times"] for e in events if e["event"] == "fault-triggered"]
    (gone,) = [e for e in events if e["event"] == "fault-removed"]
    assert sum(times) == gone["hits"] == fault.hits
    assert len(times) < gone["hits"]
