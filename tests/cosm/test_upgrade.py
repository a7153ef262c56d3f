"""An upgrade of the package while cards run: the instance goes on as it is, the next one is the new one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from drill import PACKAGE, Control, load

from mic_emu.config import CardConfig, Config
from mic_emu.host.admin import Admin
from mic_emu.host.control import Control as Requests
from mic_emu.testing.machine import Machine, eventually
from mic_emu.version import PROTOCOL, VERSION

ROOT = PACKAGE.parent
QUICK = ("--disk", "none", "--net", "none")
# What PROTOCOL 1 promises. Requests may be added: an older host names what it does not know. One that goes or changes
# its meaning, and every change of the settings, raises PROTOCOL once it meets a released micemu; then mend these lists.
OPS = (
    "backend boot capture config dump events force_reset host_ns metrics plug reboot reload reset resume run scif_ask "
    "shutdown status stop suspend sysfs_list sysfs_read sysfs_watch sysfs_write vop vop_add vop_remove vop_swap wait"
)
CARD = (
    "autoboot cmdline device_id devices disk disk_size fault heartbeat image interrupts max_reboots memory namespaces net "
    "on_crash personality ramdisk read_only restart stepping"
)
CONFIG = "cards group host_memory metrics_port timing"


def test_protocol_number_stands_for_these_requests_and_settings() -> None:
    """Nobody takes away what commands and host agree on, or changes the settings, without raising the number."""

    class Nothing:
        rundir = config = log = cards = None

    ops = Requests(Nothing())._requests  # type: ignore[arg-type]
    assert set(Admin(Nothing()).requests) < set(ops)  # type: ignore[arg-type]
    fields = [[f.name for f in dataclasses.fields(c)] for c in (CardConfig, Config)]
    assert PROTOCOL == 3
    assert set(OPS.split()) <= set(ops)
    assert [" ".join(sorted(names)) for names in fields] == [CARD, CONFIG]


@pytest.mark.system
def test_command_of_another_protocol_is_told_what_to_do_and_can_stop(machine: Machine) -> None:
    """One sentence with both versions and the fix; status, stop and the running card are not affected."""
    machine.boot(*QUICK)

    def newer(*args: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import mic_emu.version as v; v.PROTOCOL += 1; v.VERSION = '9.9'; import sys; "
            "from mic_emu.cli import main; sys.argv[0] = 'micemu'; main()"
        )
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(
            command,
            env=machine.env,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=machine.home,
            check=False,
        )

    for command in (["boot"], ["reset"], ["run", "mic0", "--", "true"], ["config", "show"]):
        done = newer(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"micemu: this is micemu 9.9, the emulator that runs is micemu {VERSION} and speaks another protocol: "
            "end it with micemu stop, then micemu boot\n"
        )
    shown = newer("status")
    assert (shown.returncode, f"it is micemu {VERSION}" in shown.stdout) == (0, True)
    assert machine.card()["state"] == "online"
    assert newer("stop").returncode == 0
    machine.check_clean()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_running_instance_needs_no_file_of_its_package(tmp_path: Path) -> None:
    """The package that started it is deleted: programs, a backend's new start, a reboot, a new card and a disk
    swap work, also with the commands of another copy."""
    old = tmp_path / "old"
    copied = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, old / "mic_emu", ignore=copied)
    for side in ("host", "card"):
        shutil.copytree(ROOT / side, old / "mic_emu" / side, ignore=copied, dirs_exist_ok=True)
    with Machine({"PYTHONPATH": str(old)}) as machine:
        status = machine.boot()
        shutil.rmtree(old)
        del machine.env["PYTHONPATH"]
        everything_works(machine, status["host"]["pid"])


def everything_works(machine: Machine, host: int) -> None:
    """New programs, backends, boots and cards of an instance whose package was replaced."""
    assert machine.on_card("echo", "here").stdout == "here\n"
    net = machine.device("net")["pid"]
    os.kill(net, signal.SIGKILL)
    eventually(lambda: machine.device("net")["pid"] not in (None, net), 20, "the new backend")
    eventually(lambda: machine.device("net")["state"] == "running", 20, "the new backend on the card")
    assert machine.micemu("ping", "mic0", "-c", "1", "-W", "20", check=False).returncode == 0
    machine.micemu("reboot", "mic0")
    os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
    machine.micemu("wait", "crashed", "--timeout", "30")
    board = machine.card()["pids"]["board"]
    os.kill(board, signal.SIGKILL)
    eventually(lambda: machine.card()["pids"]["board"] not in (None, board), 30, "the new board")
    cards = machine.boot("-n", "2")["cards"]
    assert [c["state"] for c in cards] == ["online", "online"]
    for command in (["check"], ["info"], ["metrics"], ["dump", "page"], ["sysfs", "cat", "mic1/state"]):
        machine.micemu(*command)
    machine.micemu("vop", "add", "mic1", "rng")
    machine.micemu("suspend")
    assert [c["state"] for c in machine.json("resume")["cards"]] == ["online", "online"]
    assert machine.status()["host"]["pid"] == host
    errors = (machine.run_dir / "stderr.log").read_text()
    assert errors == ""


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.tap
@pytest.mark.timeout(900)
def test_package_is_upgraded_with_pip_while_cards_run(tmp_path: Path) -> None:
    """Two wheels: the instance of the first goes on under the second, with its C programs; then stop and boot."""
    wheels = [wheel(tmp_path, VERSION), wheel(tmp_path, f"{VERSION}.post1")]
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(venv))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run(*pip, str(wheels[0]))
    with Machine(program=[str(venv / "bin" / "micemu")]) as machine:
        status = machine.boot()
        assert status["host"]["version"] == VERSION
        package = next((venv / "lib").glob("python*/site-packages/mic_emu"))
        where = machine.home / "load"
        where.mkdir()
        source = str(Path(__file__).parent / "c" / "load.c")
        library = ["-L", str(package / "lib"), "-lscif", f"-Wl,-rpath,{package / 'lib'}"]
        run("cc", "-O2", "-pthread", source, f"-I{package / 'include'}", "-o", str(where / "load"), *library)
        with load(machine, where) as running:
            run(*pip, "--force-reinstall", "--no-deps", str(wheels[1]))
            machine.micemu("--version")
            shown = machine.micemu("status").stdout
            assert f"it is micemu {VERSION}: micemu stop, then micemu boot takes {VERSION}.post1" in shown
            assert running.host.poll() is None  # the old library's programs go on ...
            assert running.card.poll() is None
            os.kill(machine.card()["pids"]["os"], signal.SIGKILL)
            assert running.ends(40)["stream"] == "ECONNRESET"
        machine.boot()
        with load(machine, where) as running:  # ... and new ones take the new library with the old nodes
            machine.micemu("reset", "mic0")
            assert running.ends(40)["stream"] == "ECONNRESET"
        machine.boot()
        everything_works(machine, status["host"]["pid"])
        assert Control(machine).ask("status")["status"]["host"]["version"] == VERSION
        machine.micemu("stop")
        assert machine.boot()["host"]["version"] == f"{VERSION}.post1"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def wheel(tmp_path: Path, version: str) -> Path:
    """A wheel of this tree that calls itself ``version``."""
    tree, out = tmp_path / f"tree-{version}", tmp_path / f"wheel-{version}"
    for name in ("mic_emu", "host", "card", "native", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns(
                "__pycache__", "*.so*", "_native.c", "lib", "include" if name == "mic_emu" else ""
            )
            shutil.copytree(source, tree / name, ignore=skip)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy2(source, tree)
    stated = tree / "mic_emu" / "version.py"
    stated.write_text(stated.read_text().replace(f'VERSION = "{VERSION}"', f'VERSION = "{version}"'))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(tree))
    return next(out.glob("*.whl"))
