"""Programs on the card with a terminal: ``micemu run -t`` and the console's shell."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cardlab
import pytest
from cardlab import eventually
from cardrun import Card, booted, one_for_all, running, seconds

from mic_emu.cli.terminal import set_window_size


@pytest.fixture(scope="module", params=["contained", "plain"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """One card for all tests that leave it as it was; with namespaces and without."""
    with one_for_all(plain=request.param == "plain") as c:
        yield c


class Terminal:
    """The user's terminal, with ``micemu run`` on it."""

    def __init__(self, card: Card, argv: Sequence[str], size: tuple[int, int] = (24, 80)) -> None:
        self.master, slave = pty.openpty()
        set_window_size(self.master, size)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = card.client(
            argv, user=card.user, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = ""

    def expect(self, pattern: str, within_s: float = 20) -> re.Match[str]:
        """Wait until the screen shows it; what was before is forgotten."""
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} not seen within {within_s} s in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def resize(self, rows: int, cols: int) -> None:
        set_window_size(self.master, (rows, cols))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


def test_terminal_basics(card: Card) -> None:
    """With a terminal the program gets one: a controlling one, of the right size, that follows ours."""
    with Terminal(card, ["sh", "-c", "tty; stty size; trap 'stty size' WINCH; cat; exit 5"], (40, 100)) as t:
        name = t.expect("/dev/pts/[0-9]+")[0]
        t.expect("40 100")
        t.type("hello\n")
        t.expect("hello\r\nhello\r\n")
        t.resize(50, 132)
        eventually(lambda: card.sh(f"stty size <{name}") == "50 132\n", 20, "the size on the card")
        t.type("\x04")  # end of file for cat; the trap runs when it ends
        t.expect("50 132")
        assert t.process.wait(20) == 5
        assert termios.tcgetattr(t.slave) == t.before


def test_terminal_is_resized_when_the_program_has_let_go_of_it(card: Card, tmp_path: Path) -> None:
    """A program that lives on without its terminal, as each does for a moment at its end: a new size is nobody's, and
    the exit status comes through."""
    os.mkfifo(tmp_path / "end")
    script = "trap '' HUP; echo ready; exec </dev/null >/dev/null 2>&1; read x <end; exit 5"
    os.chdir(tmp_path)
    try:
        with Terminal(card, ["sh", "-c", script]) as t:
            t.expect("ready")
            with (tmp_path / "end").open("w") as end:  # opened by both: it has let go of its terminal
                for rows in range(30, 40):
                    t.resize(rows, 100)
                end.write("\n")
            assert t.process.wait(20) == 5
    finally:
        os.chdir("/")


def test_terminal_ctrl_c_and_job_control(card: Card) -> None:
    """Ctrl-C, Ctrl-Z, jobs, fg in a shell on the card."""
    with Terminal(card, ["bash", "--norc", "--noprofile", "-i"]) as t:
        t.type("PS1='$''> '\n")
        t.expect(r"\$> ")
        t.type(f"sleep {seconds(9)}\n")
        eventually(lambda: running("sleep", seconds(9)), 20, "the sleep started")
        time_limit = time.monotonic() + 60
        t.type("\x03")
        t.expect(r"\$> ")
        t.type("echo st=$?\n")
        t.expect("st=130")
        t.type(f"sleep {seconds(1)}\n")
        t.expect(f"sleep {seconds(1)}\r\n")
        eventually(lambda: running("sleep", seconds(1)), 20, "the sleep started")
        t.type("\x1a")
        t.expect("Stopped")
        t.type("jobs; kill -KILL %1; wait %1; echo done=$((1+1))\n")
        t.expect("Stopped")
        t.expect("done=2")
        # Twice: bash refuses the first time if it has not seen yet that the stopped job died.
        t.type("exit 7\nexit 7\n")
        assert t.process.wait(20) == 7
        assert time.monotonic() < time_limit + 10
        assert termios.tcgetattr(t.slave) == t.before


def test_terminal_large_output_and_paste(card: Card) -> None:
    """A megabyte of output arrives whole, and a long paste into a program that does not read blocks nobody."""
    with Terminal(
        card, ["sh", "-c", "stty raw -echo; echo ready; sleep 0.2; seq 100000; echo end-$((6*7)); exit 3"]
    ) as t:
        t.expect("ready")
        os.set_blocking(t.master, False)
        try:
            os.write(t.master, b"x" * 100000)
        except BlockingIOError:
            pass
        os.set_blocking(t.master, True)
        t.expect("99999\n?\r?\n?100000")
        t.expect("end-42")
        assert t.process.wait(20) == 3


@pytest.mark.peer("vi")
def test_terminal_full_screen_program(card: Card, tmp_path: Path) -> None:
    """vi on the card edits a file in the caller's directory."""
    file = tmp_path / "note.txt"
    file.write_text("one\n")
    os.chdir(tmp_path)
    try:
        with Terminal(card, ["env", "TERM=xterm", "vi", "-u", "NONE", "note.txt"]) as t:
            t.expect("one")
            t.type("otwo\x1b:wq\r")
            assert t.process.wait(20) == 0
    finally:
        os.chdir("/")
    assert file.read_text() == "one\ntwo\n"


def test_terminal_signals_and_hangup(card: Card) -> None:
    """SIGTERM for the caller ends the program and restores the terminal; a lost terminal hangs it up."""
    with Terminal(card, ["sh", "-c", "echo ready; exec sleep 1002"]) as t:
        t.expect("ready")
        t.process.send_signal(signal.SIGTERM)
        assert t.process.wait(20) == -signal.SIGTERM
        assert termios.tcgetattr(t.slave) == t.before
    t = Terminal(card, ["sh", "-c", f"echo ready; exec sleep {seconds(3)}"])
    t.expect("ready")
    eventually(lambda: running("sleep", seconds(3)), 20, "the program")
    os.close(t.slave)
    os.close(t.master)
    eventually(lambda: not running("sleep", seconds(3)), 30, "the program ended with the terminal")
    assert t.process.wait(20) != 0


@pytest.mark.parametrize("cwd", ["/", "/no/such/folder"])
def test_console_shell(cwd: str) -> None:
    """The console runs a shell with job control, which comes back when it ends; its folder may be gone."""
    with booted(console_cwd=cwd) as c:
        seen = ""

        def until(pattern: str) -> None:
            nonlocal seen
            deadline = time.monotonic() + 30
            while not re.search(pattern, seen):
                assert time.monotonic() < deadline, f"{pattern!r} not in {seen!r}"
                c.say("read")
                seen += c.answer()
            seen = ""

        c.say("type " + json.dumps("PS1='con''> '; unset PROMPT_COMMAND\n"))
        until("con> ")
        c.say("type " + json.dumps(f"tty; sleep {seconds(4)}\n"))
        until("/dev/pts/")
        eventually(lambda: running("sleep", seconds(4)), 20, "the sleep started")
        c.say("type " + json.dumps("\x03"))
        until("con> ")
        c.say("type " + json.dumps("exit\n"))
        c.say("type " + json.dumps("echo again-$((40+2))\n"))
        until("again-42")


@pytest.mark.contained
def test_terminal_of_an_ordinary_user() -> None:
    """Terminal, its size and job control for a user who is root on the card only."""
    with booted(user=True) as c:
        c.user = True
        with Terminal(c, ["sh", "-c", "tty; stty size; id -u; cat; exit 6"], (30, 90)) as t:
            t.expect("/dev/pts/[0-9]+")
            t.expect("30 90")
            t.expect("0\r\n")
            t.type("x\n\x04")
            t.expect("x\r\nx\r\n")
            assert t.process.wait(20) == 6
    cardlab.forget_userland()
