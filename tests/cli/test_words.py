"""What people type and what they read: no odd word ends a command with a traceback, no card's word commands a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import pytest

from mic_emu import cli, config, faults
from mic_emu.bar import Bus
from mic_emu.cli import check, cp, micctrl_mpss, pcap, stop, wait
from mic_emu.cli.boot import card_index
from mic_emu.errors import MicemuError, NotRunning, UsageError
from mic_emu.host import report
from mic_emu.rundir import ProcessId, RunDir
from mic_emu.sizes import parse_size


@pytest.mark.parametrize(
    "name", ["mic\N{SUPERSCRIPT TWO}", "mic256", "mic99999999999", "mic" + "9" * 5000, "mic"]
)
def test_no_card_name(name: str) -> None:
    """Digits of other scripts, and numbers no card has, are refused in words."""
    with pytest.raises(UsageError):
        card_index(name)
    with pytest.raises(click.BadParameter):
        check.card_list(name.replace("256", "2560"))
    assert cp.split("mic\N{SUPERSCRIPT TWO}:/x")[0] == ""
    with pytest.raises(micctrl_mpss.Refused):
        micctrl_mpss.Mpss(["--boot", name])


@pytest.mark.parametrize("number", ["nan", "inf", "1e300"])
@pytest.mark.parametrize(
    ("command", "args"),
    [
        (wait.command, ["online", "--timeout"]),
        (stop.command, ["--timeout"]),
        (pcap.command, ["mic0", "-w", "x", "--seconds"]),
    ],
)
def test_no_number_of_seconds(command: click.Command, args: list[str], number: str) -> None:
    """A time that no timer takes is wrong usage."""
    with pytest.raises(click.BadParameter):
        command.make_context("x", [*args, number])


def test_time_does_not_run_backwards() -> None:
    """Nor is a negative one."""
    with pytest.raises(click.BadParameter):
        pcap.command.make_context("x", ["mic0", "-w", "x", "--seconds", "-1"])


def test_an_error_is_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error may quote a card's log: its escape sequences are shown."""

    def refuse(**_: object) -> None:
        raise MicemuError("its last words: \x1bc\x07")

    monkeypatch.setattr(cli.cli, "main", refuse)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "micemu: its last words: \\x1bc\\x07\n"


def test_what_a_locale_cannot_say_is_escaped() -> None:
    """Output in a locale without the letter, and names that are no text, are no traceback."""
    code = "import sys; from mic_emu import cli; cli.cli.main = lambda **_: print(sys.argv[1]); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, b"\xff\xc3\xa4"],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"\\udcff\\xe4\n")


def test_a_post_code_is_text() -> None:
    """The register is the card's: what is no letter is a point to those who read the status."""
    bus = cast(Bus, SimpleNamespace(read=lambda _: 0x631B))
    assert report.post_code(bus) == ".c"


@pytest.mark.parametrize("text", ["9" * 5000, "99999999T", "9" * 19 + "K", "\N{SUPERSCRIPT TWO}"])
def test_no_size(text: str) -> None:
    """A size that no file or memory can have is refused in words."""
    with pytest.raises(UsageError):
        parse_size(text, "--memory")


@pytest.mark.parametrize(
    "text", ["bandwidth=" + "9" * 400, "bandwidth=99999999999999999999", "latency=" + "9" * 400 + "ms"]
)
def test_no_fault(text: str) -> None:
    """Nor does a fault take a rate or a time that overflows."""
    name, _, value = text.partition("=")
    with pytest.raises(ValueError, match=r"^use "):
        (faults._bandwidth if name == "bandwidth" else faults.duration_ns)(value)


def test_a_configuration_of_brackets(tmp_path: Path) -> None:
    """Too deep for the reader is wrong configuration."""
    path = tmp_path / "c.toml"
    path.write_text("x = " + "[" * 100000)
    with pytest.raises(UsageError):
        config.load(path)


def test_stop_of_what_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its pids and the signal an emulator may end by itself: stopped all the same."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = ProcessId(ended.pid, 1, "boot")
    where = RunDir("gone")
    monkeypatch.setattr(RunDir, "read_pids", lambda _: {"host": gone, "init": gone})
    assert stop.kill_instance(where)
    with pytest.raises(NotRunning):
        stop.stop_instance(where, orderly=True, limit_s=1)


def test_micctrl_without_a_run_directory(tmp_path: Path) -> None:
    """A sentence, as from micemu."""
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "mic_emu.cli.micctrl", "-s"],
        env={**os.environ, "MICEMU_RUNDIR": str(tmp_path / "file")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
