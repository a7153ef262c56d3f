"""``micemu top``: its figures, its forms without a terminal, and the screen on a real pty."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mic_emu.cli.terminal import set_window_size
from mic_emu.cli.top import ENTER, LEAVE
from mic_emu.cli.top_view import Painter, add_rates, number, plain, rows
from mic_emu.testing.machine import Machine, eventually


def look(time_s: float, *, pid: int = 5, used: int = 0, count: int = 0, **counters: int) -> dict[str, Any]:
    """One card with one disk and one DMA channel."""
    return {
        "schema": 1, "instance": "lab", "time_s": time_s, "uptime_s": 3725.0, "scif": {"nodes": 2, "endpoints": 7},
        "cards": [{
            "name": "mic0", "state": "online", "shutdown_status": "nop", "post_code": "FF", "boots": 1, "crashes": 0,
            "heartbeat": {"enabled": True, "count": 3, "silent_s": 1.25}, "smpt_mapped_bytes": 1 << 20,
            "devices": [{
                "type": "block", "state": "running", "pid": pid, "restarts": 0, "counters": counters,
                "rings": [{"ring": 0, "num": 128, "avail_idx": used + 2, "used_idx": used, "pending": 2}],
            }],
            "dma": [{"channel": 4, "owner": "card", "active": False, "error": 0, "size": 1000, "count": count, "driver": None}],
        }],
    }  # fmt: skip


def device(of: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = of["cards"][0]["devices"][0]
    return found


def test_top_rates_are_per_second_between_two_looks() -> None:
    """Counters, ring indices and DMA counts become rates by the host's clock; the first look has none."""
    first = add_rates(look(10, reads=5, bytes_read=0), None)
    assert device(first)["rates"] == {"requests_s": None, "to_card_bytes_s": None}
    second = add_rates(look(12, reads=25, bytes_read=8192, used=20, count=50), first)
    assert device(second)["rates"] == {"requests_s": 10.0, "to_card_bytes_s": 4096.0}
    assert device(second)["rings"][0]["used_s"] == 10.0
    assert second["cards"][0]["dma"][0]["rates"] == {"descriptors_s": 25.0}


def test_top_shows_scif_bytes_per_second() -> None:
    """Messages always, DMA copies once there were any."""
    looks = []
    for time_s, sent, read in ((10, 0, 0), (12, 8000, 64000)):
        looks.append(look(time_s))
        looks[-1]["cards"][0]["scif"] = {"sent": sent, "received": 0, "dma_written": 0, "dma_read": read}
    first = add_rates(looks[0], None)
    assert not [r for r in rows(first) if "DMA copies" in r.cells]
    second = add_rates(looks[1], first)
    assert second["cards"][0]["scif_rates"]["sent_s"] == 4000.0
    shown = {r.cells[1]: r.cells[3:5] for r in rows(second) if r.cells[0].strip() == "scif"}
    assert shown == {"messages": ("4 kB/s", "0 B/s"), "DMA copies": ("0 B/s", "32 kB/s")}


def test_top_rates_wrap_around_and_new_beginnings() -> None:
    """Ring and DMA indices wrap; a backend that was started again, and a card that came back, have no rate at first."""
    before = add_rates(look(0, used=65530, count=990, reads=100), None)
    now = add_rates(look(1, used=4, count=10, reads=100), before)
    assert device(now)["rings"][0]["used_s"] == 10.0
    assert now["cards"][0]["dma"][0]["rates"]["descriptors_s"] == 20.0
    restarted = add_rates(look(2, pid=6, reads=1), now)
    assert device(restarted)["rates"]["requests_s"] is None
    backwards = add_rates(look(3, pid=6, reads=0), restarted)
    assert device(backwards)["rates"]["requests_s"] is None
    gone = {**look(4), "cards": []}
    assert device(add_rates(look(5, reads=7), add_rates(gone, backwards)))["rates"]["requests_s"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1000, "1 k"), (1234, "1.23 k"), (99_960, "100 k"), (999_600, "1 M"), (5e12, "5000 G")],
)  # fmt: skip
def test_top_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_top_table_says_what_is_wrong() -> None:
    """A crashed card, a failed device and a halted channel stand out, in words and in colour."""
    bad = look(0, reads=1)
    bad["cards"][0] |= {"state": "shutting_down", "shutdown_status": "crashed"}
    device(bad)["state"] = "failed"
    bad["cards"][0]["dma"][0] |= {"error": 4}
    found = rows(add_rates(bad, None))
    assert [r.style for r in found] == ["bold red", "red", "red"]
    text = plain(bad)
    assert "shutting_down (crashed)" in text
    assert "card, error 0x4" in text
    assert "\x1b" not in text


def test_top_screen_fits_the_terminal() -> None:
    """However many cards: never more lines than the terminal has, and the last one is the foot."""
    many = add_rates(look(0, reads=1), None)
    many["cards"] = [many["cards"][0]] * 40
    lines = Painter().lines(many, "foot", 24, 80)
    assert len(lines) == 24
    assert lines[-1] == "foot"
    assert "more lines" in lines[-2]
    assert all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 80 for line in lines)


# --- against an emulator --------------------------------------------------------------------------


@pytest.fixture
def online(machine: Machine) -> Machine:
    machine.boot("--disk", "none", "--net", "none", "--memory", "128M")
    return machine


class Screen:
    """``micemu top`` on a terminal of its own."""

    def __init__(self, machine: Machine, *args: str) -> None:
        self.master, self.slave = pty.openpty()
        set_window_size(self.master, (30, 100))
        self.before = termios.tcgetattr(self.slave)
        self.process = machine.popen(
            "top", *args, stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = ""

    def expect(self, text: str, within_s: float = 20.0) -> None:
        """Wait until ``text`` is painted; forget what came before."""
        deadline = time.monotonic() + within_s
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} not in {self.seen[-3000:]!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536).decode()
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self, within_s: float = 20.0) -> int:
        """Its exit status; the terminal must be as it was."""
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "top does not end"
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536).decode()
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode()
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is not restored"
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def screen(online: Machine) -> Iterator[Screen]:
    s = Screen(online, "--interval", "0.2")
    s.expect(ENTER)
    s.expect("mic0")
    yield s
    s.close()


@pytest.mark.system
def test_top_once_and_json_need_no_terminal(online: Machine) -> None:
    """One table, one object, and a stream of lines; no escape sequences in pipes."""
    text = online.micemu("top", "--once", "--interval", "0.2").stdout
    assert re.search(r"^mic0 +online +heard \d+\.\d s ago +boots 1 +crashes 0 +post FF", text, re.M)
    assert re.search(r"^  console +running +\S+/s +\S+ B/s +\S+ B/s +16/128  0/128$", text, re.M)
    assert re.search(r"^  dma +8 idle$", text, re.M)
    assert "\x1b" not in text
    one = online.json("top", "--once", "--interval", "0.2")
    assert one["schema"] == 1
    assert one["cards"][0]["devices"][0]["rates"]["requests_s"] is not None
    assert one["cards"][0]["heartbeat"]["count"] >= 1
    with online.popen("top", "--json", "--interval", "0.2", stdout=subprocess.PIPE, text=True) as stream:
        assert stream.stdout
        times = [json.loads(stream.stdout.readline())["time_s"] for _ in range(3)]
        stream.send_signal(signal.SIGINT)
        assert stream.wait(10) == 0
    assert times == sorted(times)
    wrong = online.micemu("top", "mic7", check=False)
    assert wrong.returncode == 6
    assert "there is no card mic7" in wrong.stderr


@pytest.mark.system
@pytest.mark.parametrize("keys", [b"q", b"Q", b"\x03"], ids=["q", "Q", "ctrl-c"])
def test_top_leaves_and_restores_the_terminal(screen: Screen, keys: bytes) -> None:
    """q and Ctrl-C end it with status 0; the alternate screen, the cursor and the mode are given back."""
    screen.type(keys)
    assert screen.ended() == 0
    assert screen.seen.endswith(LEAVE)


@pytest.mark.system
def test_top_follows_the_window_and_job_control(screen: Screen) -> None:
    """A smaller window is repainted at once; Ctrl-Z gives the terminal back, and continuing takes it again."""
    set_window_size(screen.master, (4, 60))
    screen.expect("more lines")
    screen.type(b"\x1a")
    screen.expect(LEAVE)
    stat = Path(f"/proc/{screen.process.pid}/stat")
    eventually(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", 10, "top is stopped")
    assert termios.tcgetattr(screen.slave) == screen.before
    screen.process.send_signal(signal.SIGCONT)
    screen.expect(ENTER)
    screen.expect("more lines")
    screen.type(b"q")
    assert screen.ended() == 0


@pytest.mark.system
def test_top_survives_a_crash_and_a_reset_and_ends_with_the_emulator(online: Machine, screen: Screen) -> None:
    """A card that crashes, resets and boots is shown as it goes; a host that stops ends top with status 3 and a word."""
    os.kill(online.card()["pids"]["os"], 9)
    screen.expect("(crashed)")
    online.micemu("reset", "mic0")
    screen.expect("ready")
    online.micemu("boot", "mic0")
    screen.expect("boots 2")
    screen.expect("running")
    online.micemu("stop", "--force")
    assert screen.ended() == 3
    assert screen.seen.rstrip().endswith("micemu: the emulator has stopped (instance default)")
    assert LEAVE in screen.seen


@pytest.mark.system
def test_top_says_so_when_the_host_hangs(online: Machine) -> None:
    """A host process that is stopped: status 5 and a sentence after five seconds, not for ever."""
    pid = online.status()["host"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = online.micemu("top", "--once", check=False, timeout=30)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 5
    assert "does not answer within 5 s" in done.stderr


@pytest.mark.system
def test_top_without_rich_names_the_fix(online: Machine, tmp_path: Path) -> None:
    """The screen needs rich and says how to get it; the other forms do not."""
    (tmp_path / "rich.py").write_text("raise ImportError('not here')\n")
    online.env["PYTHONPATH"] = str(tmp_path)
    s = Screen(online)
    try:
        s.expect("pip install 'micemu[top]', or use micemu top --plain")
        assert s.ended() == 1
    finally:
        s.close()
    assert "mic0" in online.micemu("top", "--plain", "--once", "--interval", "0.2").stdout


def test_top_without_an_emulator(machine: Machine) -> None:
    """Status 3, and what to do."""
    done = machine.micemu("top", check=False)
    assert done.returncode == 3
    assert "start one with micemu boot" in done.stderr
