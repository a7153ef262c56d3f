"""The mounted sysfs tree, used with plain system calls and a shell (COSM 6, 7)."""

from __future__ import annotations

import errno
import os
import select
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest

from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system
QUICK = ("--disk", "none", "--net", "none")
PRI = select.POLLPRI | select.POLLERR


def mounted(path: Path) -> bool:
    return str(path) in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def tree(machine: Machine, tmp_path: Path) -> Iterator[Path]:
    """A card, booted and down again, and its tree mounted."""
    machine.boot(*QUICK)
    machine.micemu("shutdown")
    target = tmp_path / "sys"
    needs.fuse_mount(machine, target)
    yield target
    machine.micemu("stop", "--force")
    eventually(lambda: not mounted(target), 30, "the end of the mount")


def put(path: Path, data: bytes) -> int:
    """errno of open and write, 0 when both succeed."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    except OSError as e:
        return e.errno or -1
    try:
        assert os.write(fd, data) == len(data)
    except OSError as e:
        return e.errno or -1
    finally:
        os.close(fd)
    return 0


def read(fd: int) -> str:
    return os.pread(fd, 4096, 0).decode()


def wait_for(fd: int, word: str) -> list[str]:
    """Poll and read as the daemon does until ``word``; the states seen on the way."""
    poller = select.poll()
    poller.register(fd, PRI)
    seen = [read(fd).strip()]
    while seen[-1] != word:
        assert poller.poll(40_000) == [(fd, PRI)], f"no wake-up; seen {seen}"
        seen.append(read(fd).strip())
    return seen


def test_cosm_1_device_is_a_link_to_the_pci_function(machine: Machine, tree: Path) -> None:
    """Scripts take the slot from it; the files behind it are the function's, and micemu sysfs follows it, too."""
    card = tree / "class/mic/mic0"
    function = card / "device"
    assert (function.is_symlink(), function.resolve().name) == (True, "0000:01:00.0")
    assert function.resolve() == tree / "devices/micemu/0000:01:00.0"
    assert [(function / n).read_text() for n in ("vendor", "subsystem_vendor")] == ["0x8086\n"] * 2
    assert "PCI_SLOT_NAME=0000:01:00.0\n" in (function / "uevent").read_text()
    assert (function / "config").read_bytes()[:4] == bytes.fromhex("86805c22")
    assert (card / "subsystem").resolve() == tree / "class/mic"
    assert machine.micemu("sysfs", "cat", "mic0/device/device").stdout == "0x225c\n"
    missing = machine.micemu("sysfs", "cat", "mic7/device/device", check=False)
    assert (missing.returncode, missing.stderr) == (6, "micemu: there is no card mic7; cards: mic0\n")


def test_cosm_1_2_3_9_11_56_files_modes_and_errnos(machine: Machine, tree: Path) -> None:
    """One long look at the tree of a ready card: names, modes, contents, errnos, no wake-up without a change."""
    mic = tree / "class/mic/mic0"
    assert os.listdir(tree / "class/mic") == ["mic0"]
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in mic.iterdir() if p.is_file()}
    for name in ("family", "stepping", "shutdown_status"):
        assert modes[name] == 0o444
    for name in (
        "state",
        "bootmode",
        "cmdline",
        "firmware",
        "ramdisk",
        "heartbeat_enable",
        "log_buf_addr",
        "log_buf_len",
    ):
        assert modes[name] == 0o644
    assert ((mic / "family").read_text(), (mic / "stepping").read_text()) == ("x100\n", "C0\n")
    assert (mic / "state").read_text() == "ready\n"
    for name in ("family", "stepping", "shutdown_status"):
        with pytest.raises(PermissionError):  # at open already, and for root
            os.open(mic / name, os.O_WRONLY)
    for text in (b"Boot\n", b"boot ", b"online", b"shutdown", b"reset"):
        assert put(mic / "state", text) == errno.EINVAL
    assert put(mic / "heartbeat_enable", b"99999999999") == errno.ERANGE
    assert put(mic / "firmware", b"mic/none.img\n") == 0
    assert put(mic / "state", b"boot\n") == errno.ENOENT
    assert put(mic / "nothing", b"x") == errno.ENOENT
    with pytest.raises(PermissionError):
        (mic / "new").mkdir()
    assert (mic / "device/config").read_bytes()[:4] == b"\x86\x80\x5c\x22"
    for name in ("state", "shutdown_status", "family"):
        fd = os.open(mic / name, os.O_RDONLY)
        try:
            poller = select.poll()
            poller.register(fd, PRI)
            assert poller.poll(0) == [(fd, PRI)]  # never read: woken at once, as in sysfs
            read(fd)
            assert not poller.poll(100)
        finally:
            os.close(fd)


def test_what_every_class_device_has(machine: Machine, tree: Path) -> None:
    """COSM 6: uevent, the link to the class, power/ with the values of a device that has no power management."""
    mic = tree / "class/mic/mic0"
    assert (mic / "subsystem").is_symlink()
    assert os.path.basename(os.readlink(mic / "subsystem")) == "mic"
    assert (mic / "subsystem").resolve() == (tree / "class/mic").resolve()
    assert stat.S_ISLNK((mic / "subsystem").lstat().st_mode)
    assert (mic / "uevent").read_bytes() == b""
    assert [put(mic / "uevent", text) for text in (b"change\n", b"add", b"fly")] == [0, 0, errno.EINVAL]
    power = mic / "power"
    assert ((power / "control").read_text(), (power / "runtime_status").read_text()) == (
        "auto\n",
        "unsupported\n",
    )
    assert [put(power / "control", text) for text in (b"on\n", b"off")] == [0, errno.EINVAL]
    assert (power / "control").read_text() == "on\n"
    assert put(power / "runtime_status", b"active") == errno.EACCES
    assert (power / "runtime_active_time").read_text() == "0\n"
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (power / "autosuspend_delay_ms").read_text()
    assert machine.micemu("sysfs", "umount", str(tree)).stderr == ""
    again = machine.micemu("sysfs", "umount", str(tree), check=False)
    assert (again.returncode, "no tree of micemu is mounted there" in again.stderr) == (1, True)
    machine.micemu("sysfs", "mount", str(tree))


def test_hw_54_debug_files_have_the_drivers_texts_and_switches(machine: Machine, tree: Path) -> None:
    """COSM 7: every file of the table, its mode, and the two switches of SCIF with their errnos."""
    debug = tree / "kernel/debug"
    files = {
        str(p.relative_to(debug)): stat.S_IMODE(p.stat().st_mode) for p in debug.rglob("*") if p.is_file()
    }
    shown = {
        "mic_cosm/mic0/log_buf",
        "mic_cosm/mic0/force_reset",
        "mic_card/mic0/intr_test",
        "scif/scif_dev",
        "vop1/dp",
        "vop1/vdev_info",
        "mic_x100_dma/mbus-dev0/mic_dma_reg",
    }
    shown |= {f"mic_host/mic0/{name}" for name in ("smpt", "post_code", "msi_irq_info")}
    switches = {"scif/en_msg_log", "scif/p2p_enable"}
    assert files == dict.fromkeys(shown, 0o444) | dict.fromkeys(switches, 0o666)
    smpt = (debug / "mic_host/mic0/smpt").read_text().splitlines()
    assert smpt[0].split("|")[0].split() == ["MIC", "0"]
    assert len(smpt) == 1 + 2 + 32
    assert (debug / "mic_host/mic0/msi_irq_info").read_text().startswith("irq: 0 entry: 0 MXAR[0]: ")
    assert (debug / "scif/scif_dev").read_text().startswith("Total Nodes")
    # HW-54: the card is ready, whatever GDDR holds.
    assert (debug / "mic_cosm/mic0/log_buf").read_text() == ""
    switch = debug / "scif/en_msg_log"
    assert switch.read_text() == "0\n"
    assert put(switch, b"1\n") == 0
    assert switch.read_text() == "1\n"
    assert [put(switch, text) for text in (b"256", b"-1", b"x", b"99999999999")] == [
        errno.ERANGE, errno.ERANGE, errno.EINVAL, errno.ERANGE,
    ]  # fmt: skip
    assert put(debug / "mic_host/mic0/smpt", b"1") == errno.EACCES


def test_cosm_17_31_56_57_shell_boots_and_shuts_down_with_poll(machine: Machine, tree: Path) -> None:
    """echo and cat only; a poller on state is woken by each change and sees the last one, one on shutdown_status by none."""
    mic = tree / "class/mic/mic0"
    fd, status = (os.open(mic / name, os.O_RDONLY) for name in ("state", "shutdown_status"))
    try:
        assert (read(fd), read(status)) == ("ready\n", "nop\n")
        quiet = select.poll()
        quiet.register(status, PRI)
        script = (
            "cd $0; echo linux >bootmode; echo mic/uos.img >firmware; echo mic/mic0.image >ramdisk; "
            "echo boot >state && cat state"
        )
        out = subprocess.run(
            ["sh", "-c", script, str(mic)], capture_output=True, text=True, check=True
        ).stdout
        assert out in ("booting\n", "online\n")
        assert set(wait_for(fd, "online")) <= {"booting", "online"}
        log = tree / "kernel/debug/mic_cosm/mic0/log_buf"
        eventually(lambda: "card is up" in log.read_text(), 30, "the card's log in debugfs")
        assert (tree / "kernel/debug/mic_host/mic0/post_code").read_text() == "FF"
        (mic / "state").write_text("shutdown")
        assert set(wait_for(fd, "ready")) <= {"online", "shutting_down", "resetting", "ready"}
        assert not quiet.poll(0)
        assert (mic / "shutdown_status").read_text() == "nop\n"
    finally:
        os.close(fd)
        os.close(status)


def test_cosm_40_58_hw_54_force_reset_by_reading_and_the_end_of_the_instance(
    machine: Machine, tree: Path
) -> None:
    """Reading force_reset resets, in ready too, and is empty; files of an ended instance give ENODEV or are gone."""
    assert (tree / "kernel/debug/mic_cosm/mic0/force_reset").read_text() == ""
    events = (machine.run_dir / "log.jsonl").read_text()
    assert '"old": "ready", "state": "resetting"' in events
    fd = os.open(tree / "class/mic/mic0/state", os.O_RDONLY)
    machine.micemu("stop")
    eventually(lambda: not mounted(tree), 30, "the end of the mount")
    with pytest.raises(OSError) as e:
        os.pread(fd, 10, 0)
    assert e.value.errno in (
        errno.ENODEV,
        errno.ENOTCONN,
    )  # answered by the server, or by the kernel without it
    os.close(fd)
    assert os.listdir(tree) == []


def test_program_finds_the_tree_at_its_real_place(machine: Machine, tree: Path) -> None:
    """`micemu sysfs exec`: /sys/class/mic beside the machine's own classes, in a namespace of the program's own."""
    mic = "/sys/class/mic/mic0"
    script = f"cat {mic}/state {mic}/family; ls /sys/class/net; echo boot >{mic}/state; exit 7"
    done = machine.micemu("sysfs", "exec", "--", "sh", "-c", script, check=False)
    assert done.stdout.splitlines()[:2] == ["ready", "x100"], done.stderr
    assert "lo" in done.stdout.split()
    assert done.returncode == 7
    machine.micemu("wait", "online", "--timeout", "20")
    assert not Path("/sys/class/mic").exists()
