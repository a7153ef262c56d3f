"""Backends in C: the header and library that users get, as C and as C++, against a booted card."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import mic_emu
from mic_emu.testing.machine import Machine, eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ROOT = Path(mic_emu.__file__).parents[1]
EXAMPLE, TESTS = ROOT / "examples" / "vop", ROOT / "tests" / "vop" / "c"
STRICT = ["-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]  # a finding is an exit status

UPPER = """
from mic_emu.vop import Driver

class Upper(Driver):
    device_type = 42

    def run(self):
        self.device.log("the answer is " + self.request(data=b"abc", room=64).decode())
        while True:
            self.wait()

    def config_changed(self):
        self.device.log("the greeting is " + self.device.read_config(0, 7).decode())
"""

COUNT = """
from mic_emu.vop import Driver

class Count(Driver):
    device_type = 42

    def run(self):
        for n in range(3):
            self.device.log(f"{n} became " + self.request(data=bytes([n] * 4), room=4).hex())
        while True:
            self.wait()
"""


def sanitized(source: Path, to: Path) -> str:
    """Compile program and library under ASan, LeakSanitizer and UBSan, the library as setup.py does."""
    libraries = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["LIBRARIES"]
    library = to.with_name("libmicvop.so.0")
    subprocess.run(
        next(lib for lib in libraries if lib.name == "micvop").command(library, *SANITIZE), check=True
    )
    subprocess.run(
        ["cc", *STRICT, *SANITIZE, "-g", f"-I{ROOT / 'native' / 'include'}", str(source), str(library),
            f"-Wl,-rpath,{library.parent}", "-o", str(to)],
        check=True,
    )  # fmt: skip
    return str(to)


def build(source: Path, to: Path, compiler: str = "cc") -> str:
    """Compile with the flags that the CLI prints."""
    if compiler == "sanitized":
        return sanitized(source, to)
    flags = subprocess.check_output(
        [sys.executable, "-m", "mic_emu.cli", "vop", "--cflags", "--libs"], text=True
    ).split()
    language = ["-x", "c++"] if compiler != "cc" else []
    subprocess.run(
        [compiler, *STRICT, *language, str(source), "-x", "none", *flags, "-o", str(to)], check=True
    )
    return str(to)


def prepare(machine: Machine, folder: Path, name: str, text: str) -> str:
    """A card with a driver; the path of its vop.sock."""
    (folder / f"{name.lower()}_driver.py").write_text(text)
    card = machine.boot("--disk", "none", "--net", "none")["cards"][0]
    machine.micemu("vop", "driver", "mic0", f"{name.lower()}_driver:{name}", cwd=folder)
    return f"{card['run_dir']}/vop.sock"


def says(machine: Machine, text: str) -> None:
    """The card's driver has written a line."""
    eventually(lambda: text in machine.micemu("log").stdout, 30, f"{text!r} in the log")


def slots(machine: Machine) -> list[int]:
    """Types of live devices in the device page."""
    return [s["type"] for s in machine.json("dump", "page")["slots"] if s["type"] > 0]


def run_alone(code: str) -> None:
    """Python code, after ``f`` was made mic_vop_open(), in a process of its own."""
    library = Path(mic_emu.__file__).parent / "lib" / "libmicvop.so.0"
    start = (
        "import array, ctypes, errno, os, resource, socket, sys, threading\n"
        f"f = ctypes.CDLL({str(library)!r}, use_errno=True).mic_vop_open\n"
        "f.restype = ctypes.c_void_p\n"
    )
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_vop_c_open_without_a_descriptor_left_closes_none() -> None:
    """EMFILE, and the program's standard input is still open."""
    run_alone(
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n"
        "    while True: os.dup(0)\n"
        "except OSError: pass\n"
        "assert f(b'/nonexistent') is None and ctypes.get_errno() == errno.EMFILE\n"
        "os.fstat(0)\n"
    )


def test_vop_c_open_at_a_host_of_another_version(tmp_path: Path) -> None:
    """More descriptors than this library knows: EPROTO, and exactly those are closed."""
    run_alone(
        f"path = {str(tmp_path / 'vop.sock')!r}\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()\n"
        "served = []\n"
        "def serve():\n"
        "    peer, _ = listener.accept(); served.append(peer)\n"
        "    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 60))\n"
        '    peer.sendmsg([b\'{"op":"hello","fds":60,"page":0}\\n\'], [rights])\n'
        "t = threading.Thread(target=serve); t.start()\n"
        "before = len(os.listdir('/proc/self/fd'))  # accept(2) has a number in hand: only how many\n"
        "assert f(path.encode()) is None and ctypes.get_errno() == errno.EPROTO\n"
        "t.join(); served[0].close()\n"
        "assert len(os.listdir('/proc/self/fd')) == before\n"
    )


@pytest.mark.parametrize("compiler", ["cc", "c++", "sanitized"])
def test_vop_c_example_serves_a_driver(machine: Machine, tmp_path: Path, compiler: str) -> None:
    """examples/vop/upper.c: announced, answers, changes its configuration, goes with its program."""
    program = build(EXAMPLE / "upper.c", tmp_path / "upper", compiler)
    path = prepare(machine, tmp_path, "Upper", UPPER)
    with subprocess.Popen([program, path], stdout=subprocess.PIPE, text=True) as running:
        says(machine, "the answer is hello: ABC")
        running.send_signal(signal.SIGHUP)
        assert running.stdout
        assert running.stdout.readline() == "acknowledged: 1\n"
        says(machine, "the greeting is again: ")
        (row,) = [d for d in machine.card("mic0")["devices"] if d.get("program")]
        assert (row["pid"], row["state"]) == (running.pid, "running")
        assert (
            f"{row['type']} running    pid {running.pid}  a program's own" in machine.micemu("status").stdout
        )
        assert row["type"] in machine.micemu("vop", "list", "mic0").stdout
        shown = machine.json("top", "--once")["cards"][0]["devices"]
        assert [len(d["rings"]) for d in shown if d["type"] == row["type"]] == [1]
        refused = machine.micemu("vop", "remove", "mic0", row["type"], check=False)
        assert (refused.returncode, f"it goes when process {running.pid} ends" in refused.stderr) == (2, True)
        running.terminate()
        assert running.wait(20) == 0
    eventually(lambda: 42 not in slots(machine), 20, "the end of the device")
    with subprocess.Popen([program, path]) as running:  # VOP-20
        eventually(lambda: 42 in slots(machine), 20, "the device again")
        running.kill()
    eventually(lambda: 42 not in slots(machine), 20, "the end of the device")
    with subprocess.Popen([program, path]) as running:  # VOP-19
        eventually(lambda: 42 in slots(machine), 20, "the device again")
        machine.micemu("reset", "mic0")
        assert running.wait(20) == 0


@pytest.mark.parametrize(("compiler", "dma"), [("cc", True), ("sanitized", False), ("sanitized", True)])
def test_vop_c_copy_desc(machine: Machine, tmp_path: Path, compiler: str, dma: bool) -> None:
    """The calls of the character device from C, with their errors (VOP 6); its bytes in vdev_info (VOP-31)."""
    program = build(TESTS / "copy.c", tmp_path / "copy", compiler)
    path = prepare(machine, tmp_path, "Count", COUNT)
    with subprocess.Popen([program, path, *(["dma"] if dma else [])], stdin=subprocess.PIPE) as running:
        for n in range(3):
            says(machine, f"{n} became " + f"{n + 1:02x}" * 4)
        text = machine.micemu("sysfs", "cat", "kernel/debug/vop1/vdev_info").stdout
        device = text[text.index("VDEV type 42") :].splitlines()
        assert device[0].endswith("state UP")
        words = device[1].split()
        moved = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        by_dma, by_cpu = moved.pop("in_dma"), moved.pop("tx_dst_unaligned") + moved.pop("tx_len_unaligned")
        assert moved == {"in": 12, "out": 12, "out_dma": 0}
        # Four bytes to the card are never a whole line; from the card DMA fetches whole lines, and counts from the line on.
        assert (by_dma >= 12, by_cpu) == (True, 12) if dma else (by_dma, by_cpu) == (0, 0)
        assert device[2] == "VRING 0 num 8 info.avail_idx 3 raw 3"
        assert "used flags 0x0 idx 3 raw 3" in device
        assert running.stdin
        running.stdin.close()
        assert running.wait(60) == 0


def test_vop_16_c_close_waits_for_the_card(machine: Machine, tmp_path: Path) -> None:
    """VOP-16: mic_vop_close returns when the device has left the card, not before."""
    program = build(EXAMPLE / "upper.c", tmp_path / "upper")
    path = prepare(machine, tmp_path, "Upper", UPPER)
    with subprocess.Popen([program, path]) as running:
        says(machine, "the answer is hello: ABC")
        with machine.fault("os-hang", delay="0s"):
            eventually(lambda: os_is_stopped(machine), 10, "the card OS to stand still")
            running.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(0.5)
        assert running.wait(20) == 0
        assert 42 not in slots(machine)


def os_is_stopped(machine: Machine) -> bool:
    pid = machine.card()["pids"]["os"]
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_vop_driver_loaded_again(machine: Machine, tmp_path: Path) -> None:
    """vop driver takes the module's present text; one that cannot be loaded says why and harms nothing."""
    program = build(EXAMPLE / "upper.c", tmp_path / "upper")
    path = prepare(machine, tmp_path, "Upper", UPPER.replace("the answer", "the first answer"))
    for text in ("the first answer is hello: ABC", "another answer is hello: ABC"):
        with subprocess.Popen([program, path]) as running:
            says(machine, text)
            running.terminate()
        (tmp_path / "upper_driver.py").write_text(UPPER.replace("the answer", "another answer"))
        machine.micemu("vop", "driver", "mic0", "upper_driver:Upper", cwd=tmp_path)
    for name, why in (("nothing:X", "no module"), ("upper_driver:Y", "Y"), ("os:getcwd", "subclass")):
        refused = machine.micemu("vop", "driver", "mic0", name, cwd=tmp_path, check=False)
        assert refused.returncode == 1
        assert why in refused.stderr
    assert machine.card()["state"] == "online"


CHURNING = """
from mic_emu.vop import Driver

class Churning(Driver):
    device_type = 42
    rings = 2

    def run(self):
        while True:
            self.wait()
"""
PYTHON_CHURN = """
import sys
from mic_emu import layout as L
from mic_emu.vop.device_file import ADD_DEVICE, CONFIG_CHANGE, DeviceFile

block = L.DEVICE_DESC.pack(type=42, num_vq=2, feature_len=8, config_len=4) + L.VQCONFIG.pack(num=8) * 2
block += (1 << 32).to_bytes(8, "little") + bytes(8) + b"conf"
for n in range(int(sys.argv[2])):
    with DeviceFile.open(sys.argv[1]) as f:
        f.ioctl(ADD_DEVICE, bytearray(block))
        f.ioctl(CONFIG_CHANGE, bytearray(n.to_bytes(4, "little")))
"""
# On the card: datagrams to the host, for ever.
NET_LOAD = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.1)\n"
    "while True:\n    try: s.sendto(bytes(1400), ('172.31.1.254', 9999))\n    except OSError: pass\n"
)

# On the host: the card OS reads its disk, a second at a time, and the rates come out.
DISK_LOAD = """
import sys
from mic_emu.wire import Channel, connect_unix

while True:
    with Channel(connect_unix(sys.argv[1])) as c:
        c.send({"op": "bench", "block": 4096, "depth": 4, "random": True, "write": False, "seconds": 1, "spin_us": 0})
        print(c.recv(60, "bench")[0]["result"]["iops"], flush=True)
"""


class Load:
    """Net, block and console of a card at work; ``check`` says whether each still moves."""

    def __init__(self, machine: Machine, run_dir: str) -> None:
        self.net = machine.popen(
            "run", "mic0", "--", sys.executable, "-c", NET_LOAD, stdin=subprocess.DEVNULL
        )
        self.console = machine.popen("console", "mic0", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.console.stdin
        self.console.stdin.write(b"yes console-load\n")
        self.console.stdin.flush()
        self.disk = subprocess.Popen(
            [sys.executable, "-c", DISK_LOAD, f"{run_dir}/os.sock"], stdout=subprocess.PIPE, text=True
        )
        self.console_bytes = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.console.stdout
        while data := self.console.stdout.read1(1 << 16):
            self.console_bytes += len(data)

    def check(self) -> None:
        """Each device still does its work."""
        assert self.net.poll() is None
        before = self.console_bytes
        eventually(lambda: self.console_bytes > before, 20, "more from the console")
        assert self.disk.stdout
        assert float(self.disk.stdout.readline()) > 0

    def close(self) -> None:
        for p in (self.net, self.console, self.disk):
            p.kill()
            p.wait()
        self._reader.join(5)
        for p in (self.console, self.disk):
            for stream in (p.stdin, p.stdout):
                if stream:
                    stream.close()


def churn(machine: Machine, folder: Path, mode: str, rounds: int, compiler: str = "cc") -> None:
    """Python, C and the CLI add, reconfigure and remove devices while the card works.

    msi: side by side. msix: one after the other, because each device takes one of nine vectors (HW-16), and SCIF,
    four DMA channels, console, net and block leave one.
    """
    (folder / "churning_driver.py").write_text(CHURNING)
    (folder / "lab.toml").write_text(f'[[card]]\ninterrupts = "{mode}"\n')
    card = machine.boot("--config", str(folder / "lab.toml"))["cards"][0]
    machine.micemu("vop", "driver", "mic0", "churning_driver:Churning", cwd=folder)
    path = f"{card['run_dir']}/vop.sock"
    program = build(TESTS / "churn.c", folder / "churn", compiler)
    host = machine.status()["host"]
    pids = {"host": host["pid"], "card OS": card["pids"]["os"]}

    def held() -> dict[str, int]:
        """What a leak would add to: descriptors, processes, KiB of host memory and GDDR."""
        found = {f"descriptors of {name}": len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}
        found["processes"] = len(
            Path(f"/proc/{host['init']}/task/{host['init']}/children").read_text().split()
        )
        for fd in Path(f"/proc/{host['pid']}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                for memory in ("-host-", "-gddr-"):
                    if "/dev/shm/" in (to := os.readlink(fd)) and memory in to:
                        found[memory] = fd.stat().st_blocks // 2
        return found

    python = [sys.executable, "-c", PYTHON_CHURN]

    def run(count: int) -> None:
        at_work = []
        for command in ([program], python, [program]):
            at_work.append(subprocess.Popen([*command, path, str(count)]))
            if mode == "msix":
                assert at_work[-1].wait(30 + count) == 0
        for _ in range(max(1, count // 50)):
            machine.micemu("vop", "add", "mic0", "rng")
            machine.micemu("vop", "remove", "mic0", "rng")
        assert [p.wait(30 + count) for p in at_work] == [0, 0, 0]

    load = Load(machine, card["run_dir"])
    try:
        run(2)  # what is opened once is open now
        eventually(
            lambda: 42 not in slots(machine), 20, "the end of the devices"
        )  # after that of their programs
        before, live = held(), slots(machine)
        end = max(s["offset"] for s in machine.json("dump", "page")["slots"])
        run(rounds)
        load.check()
        eventually(lambda: slots(machine) == live, 20, "the end of the devices")
        # Slots are used again: four devices at a time at most, beside those that stay.
        assert max(s["offset"] for s in machine.json("dump", "page")["slots"]) <= end + 4 * 128
        # GDDR: the kernel's log grows up to 1 MiB, and the load uses some. One device takes 150 KiB, and 20 of the host's.
        slack = {"processes": 0, "-host-": 64, "-gddr-": 4096}
        eventually(
            lambda: all(n <= before[what] + slack.get(what, 2) for what, n in held().items()),
            15,
            f"everything as before: {before}",
        )
    finally:
        load.close()
    assert machine.card()["pids"]["os"] == card["pids"]["os"]


@pytest.mark.parametrize(("mode", "compiler"), [("msi", "cc"), ("msix", "cc"), ("msi", "sanitized")])
def test_vop_churn_short(machine: Machine, tmp_path: Path, mode: str, compiler: str) -> None:
    """Ring-3 programs add, reconfigure and remove devices under load: no leak, no hang (short form)."""
    churn(machine, tmp_path, mode, 25, compiler)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["msi", "msix"])
def test_vop_churn_thousands(machine: Machine, tmp_path: Path, mode: str) -> None:
    """The same, thousands of times."""
    churn(machine, tmp_path, mode, 2000)
