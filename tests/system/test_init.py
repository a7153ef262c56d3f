"""Programs on the card: ``micemu run``'s protocol and relay, the console shell, shutdown."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cardlab
import pytest
from cardlab import eventually
from cardrun import CLIENT, Card, booted
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu import namespaces, wire
from mic_emu.cli.terminal import set_window_size
from mic_emu.runproto import RunRequest
from mic_emu.wire import PeerClosed

CONTAINED = not namespaces.refusals()
PIDFD_GETFD = 438  # system call


@pytest.fixture(scope="module", params=["contained", "plain"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """One card for all tests that leave it as it was; with namespaces and without."""
    plain = request.param == "plain"
    if not plain and not CONTAINED:
        pytest.skip("; ".join(namespaces.refusals()))
    if plain and os.geteuid():
        pytest.skip("needs root to forbid namespaces")
    with booted(plain=plain) as c:
        yield c
    cardlab.forget_userland()


def test_exit_statuses(card: Card) -> None:
    """Every exit status 0..255 comes through, a sample of them through the caller's relay, too."""
    for status in range(256):
        assert card.run(["sh", "-c", f"exit {status}"])[0] == status
    for status in (0, 1, 77, 126, 127, 128, 255):
        assert card.run(["sh", "-c", f"exit {status}"], relay=True)[0] == status


@pytest.mark.parametrize("sig", ["TERM", "KILL", "INT", "SEGV", "ABRT", "PIPE", "USR1", "HUP"])
def test_death_by_signal(card: Card, sig: str) -> None:
    """A program that dies by a signal makes the caller die by it."""
    assert card.run(["sh", "-c", f"kill -{sig} $$"], relay=True)[0] == -signal.Signals[f"SIG{sig}"]


def test_start_errors_are_sentences(card: Card, tmp_path: Path) -> None:
    """A program that is missing or cannot be executed: 127 or 126 and one sentence."""
    (tmp_path / "text").write_text("no program")
    (tmp_path / "junk").write_bytes(b"\x01\x02\x03")
    (tmp_path / "junk").chmod(0o755)
    assert card.run(["no-such-program"], relay=True) == (
        127,
        "mic0: no-such-program: not found on the card\n",
    )
    status, out = card.run(["./text"], cwd=tmp_path)
    assert (status, out) == (126, "mic0: ./text: cannot be executed on the card: Permission denied\n")
    status, out = card.run(["./junk"], cwd=tmp_path)
    assert status == 126
    assert "cannot execute this format" in out
    with card.raw() as ch, open("/dev/null") as null:
        ch.send(RunRequest(["true"], "/no/such/folder").message(), [null.fileno()] * 3)
        answer, _ = ch.recv(20, "the refusal")
        assert answer["error"] == errno.ENOENT
        assert answer["message"].startswith(
            "the working directory /no/such/folder cannot be used on the card"
        )


@pytest.mark.parametrize(
    ("msg", "nfds"),
    [
        ({}, 3),
        ({"run": 2, "argv": ["x"]}, 3),
        ({"run": 1, "argv": []}, 3),
        ({"run": 1, "argv": "sh"}, 3),
        ({"run": 1, "argv": [1]}, 3),
        ({"run": 1, "argv": ["a\0b"]}, 3),
        ({"run": 1, "argv": ["x"], "env": []}, 3),
        ({"run": 1, "argv": ["x"], "env": {"A=B": "c"}}, 3),
        ({"run": 1, "argv": ["x"], "env": {"A": 1}}, 3),
        ({"run": 1, "argv": ["x"], "tty": 1}, 3),
        ({"run": 1, "argv": ["x"]}, 2),
        ({"run": 1, "argv": ["x"], "tty": True}, 1),
        ({"run": 1, "argv": ["x"], "rows": -1}, 3),
        ({"run": 1, "argv": ["x"], "umask": 512}, 3),
        ({"run": 1, "argv": ["x"], "limits": {"nice": 1}}, 3),
        ({"run": 1, "argv": ["x"], "limits": {"core": "1"}}, 3),
        ({"run": 1, "argv": ["x"], "cwd": "\ud800"}, 3),
    ],
)
def test_malformed_requests_are_refused(card: Card, msg: dict[str, Any], nfds: int) -> None:
    """Requests that are none get EINVAL, and init goes on."""
    with card.raw() as ch, open("/dev/null") as null:
        ch.send(msg, [null.fileno()] * nfds)
        assert ch.recv(20, "the refusal")[0]["error"] == errno.EINVAL
        with pytest.raises(PeerClosed):
            ch.recv(20, "the end")
    with wire.connect_unix(str(card.path)) as s:
        s.sendall(b"garbage\n")
        assert s.recv(1) == b""
    assert card.run(["true"])[0] == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.text(max_size=5)
    | st.floats(allow_nan=False),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
KEYS = ("run", "argv", "env", "cwd", "tty", "rows", "cols", "umask", "limits", "signal")


@settings(max_examples=150, deadline=None)
@given(noise=st.dictionaries(st.sampled_from(KEYS), JSON), nfds=st.integers(0, 4), second=JSON)
def test_any_request_gets_an_answer_or_the_end(
    card: Card, noise: dict[str, Any], nfds: int, second: Any
) -> None:
    """Whatever a client sends, init answers or hangs up within a moment, and lives."""
    good = RunRequest(["true"], "/").message()
    with card.raw() as ch, open("/dev/null") as null:
        ch.send({**good, **noise}, [null.fileno()] * nfds)
        try:
            ch.send({"signal": second})
            while True:
                for fd in ch.recv(20, "an answer or the end")[1]:
                    os.close(fd)
        except PeerClosed:
            pass
    assert Path(f"/proc/{card.board.os_pid}").exists()


def test_100_mb_through_stdin_to_stdout(card: Card) -> None:
    """100 MB through a program arrive unchanged, straight through the caller's own descriptors."""
    maker = "import sys,random; r=random.Random(7); b=r.randbytes(1<<20); [sys.stdout.buffer.write(b) for _ in range(100)]"
    feed = subprocess.Popen([sys.executable, "-c", maker], stdout=subprocess.PIPE)
    assert feed.stdout
    p = card.client(["cat"], stdin=feed.stdout, stdout=subprocess.PIPE)
    feed.stdout.close()
    assert p.stdout
    got, size = hashlib.sha256(), 0
    while data := p.stdout.read(1 << 20):
        got.update(data)
        size += len(data)
    import random

    want, block = hashlib.sha256(), random.Random(7).randbytes(1 << 20)
    for _ in range(100):
        want.update(block)
    assert (size, got.digest()) == (100 << 20, want.digest())
    assert (p.wait(20), feed.wait(20)) == (0, 0)


def test_environment(card: Card) -> None:
    """The caller's variables and TERM arrive, its session's and foreign MICEMU_ ones do not, the card's do."""
    env = {
        "PATH": os.environ["PATH"],
        "TERM": "vt100",
        "FOO": "ä b",
        "MICEMU_NODE": "9",
        "SSH_AUTH_SOCK": "/x",
    }
    exe = sys.executable
    p = subprocess.run(
        [exe, "-c", CLIENT, str(card.path), "env"], env=env, capture_output=True, text=True, timeout=20
    )
    got = dict(line.split("=", 1) for line in p.stdout.splitlines())
    assert got["TERM"] == "vt100"
    assert got["FOO"] == "ä b"
    assert got["HOME"] == "/"
    assert (got["MICEMU_NODE"], got["MICEMU_CARD"]) == ("1", "mic0")
    assert "SSH_AUTH_SOCK" not in got


def test_descriptors_of_a_program(card: Card) -> None:
    """A program has exactly its three descriptors, no blocked and no ignored signals, its own session."""
    out = card.sh(
        "ls /proc/self/fd | tr '\\n' ' '; grep -E 'SigBlk|SigIgn' /proc/self/status; ps -o sid= -p $$; echo $$"
    )
    fds, _, rest = out.partition("SigBlk")
    assert len(fds.split()) == 4  # ls itself opens one
    words = rest.split()
    internal = 3 << 31  # signals 32 and 33 are the C library's own
    assert int(words[1], 16) & ~internal == 0
    assert int(words[3], 16) & ~internal == 0
    assert words[4] == words[5]


@pytest.mark.parametrize(
    "sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
def test_signals_for_the_caller_reach_the_program(card: Card, sig: signal.Signals) -> None:
    """Signals are passed to the program, whose end is the caller's."""
    name = sig.name.removeprefix("SIG")
    script = f"trap 'echo got; exit 9' {name}; echo ready; while :; do sleep 0.02; done"
    p = card.client(["sh", "-c", script], stdout=subprocess.PIPE)
    assert p.stdout
    assert p.stdout.readline() == b"ready\n"
    p.send_signal(sig)
    assert p.stdout.readline() == b"got\n"
    assert p.wait(20) == 9
    p.stdout.close()


def test_stop_and_continue(card: Card) -> None:
    """SIGTSTP stops program and caller, SIGCONT continues both."""
    p = card.client(["sh", "-c", "while echo x; do sleep 0.01; done"], stdout=subprocess.PIPE)
    assert p.stdout
    p.stdout.readline()
    p.send_signal(signal.SIGTSTP)
    eventually(lambda: Path(f"/proc/{p.pid}/stat").read_text().split()[2] == "T", 20, "the caller stopped")
    os.set_blocking(p.stdout.fileno(), False)

    def silent() -> bool:
        while p.stdout and p.stdout.read(65536):
            pass
        return not select.select([p.stdout], [], [], 0.1)[0]

    eventually(silent, 20, "the program stopped")
    p.send_signal(signal.SIGCONT)
    assert select.select([p.stdout], [], [], 20)[0]
    p.terminate()
    assert p.wait(20) == -signal.SIGTERM
    p.stdout.close()


def test_death_of_the_caller_ends_the_program(card: Card, tmp_path: Path) -> None:
    """kill -9 of the caller: the program gets SIGHUP, and SIGKILL when it ignores that."""
    mark = tmp_path / "hup"
    polite = card.client(["sh", "-c", f"trap 'echo > {mark}; exit' HUP; echo go; while :; do sleep 0.02; done"],
                         stdout=subprocess.PIPE, cwd=tmp_path)  # fmt: skip
    stubborn = card.client(
        ["sh", "-c", "trap '' HUP TERM; echo go; sleep 1000 & wait"], stdout=subprocess.PIPE
    )
    for p in (polite, stubborn):
        assert p.stdout
        assert p.stdout.readline() == b"go\n"
        p.kill()
        p.wait()
    eventually(mark.exists, 20, "the hang-up seen")
    for p in (polite, stubborn):
        assert p.stdout
        assert select.select([p.stdout], [], [], 20)[0], "the program still holds its output"
        assert p.stdout.read() == b""
        p.stdout.close()


def test_umask_and_files_are_the_callers(card: Card, tmp_path: Path) -> None:
    """A file that a program makes has the caller's umask and owner."""
    before = os.umask(0o027)
    try:
        card.sh("echo x > file; mkdir sub", cwd=tmp_path, relay=True)
    finally:
        os.umask(before)
    st = (tmp_path / "file").stat()
    assert (st.st_mode & 0o777, st.st_uid) == (0o640, os.getuid())
    assert (tmp_path / "sub").stat().st_mode & 0o777 == 0o750


def test_many_at_once(card: Card) -> None:
    """Twenty programs at the same time, each with its own status and output."""
    ps = [card.client(["sh", "-c", f"echo {n}; exit {n}"], stdout=subprocess.PIPE) for n in range(20)]
    for n, p in enumerate(ps):
        out, _ = p.communicate(timeout=30)
        assert (out, p.returncode) == (f"{n}\n".encode(), n)


def test_resource_limits_are_the_callers(card: Card) -> None:
    """Soft limits of the caller hold for the program."""
    script = 'ulimit -S -s 4096; ulimit -S -n 77; ulimit -S -c 1234; exec "$@"'
    argv = ["bash", "-c", "ulimit -s; ulimit -n; ulimit -c"]
    run = ["bash", "-c", script, "bash", sys.executable, "-c", CLIENT, str(card.path), *argv]
    done = subprocess.run(run, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["4096", "77", "1234"], done.stderr


def test_init_survives_running_out_of_descriptors() -> None:
    """Clients beyond init's descriptor limit wait or are dropped; later ones are served."""
    with booted(limit_nofile=40) as c:
        crowd = [c.raw() for _ in range(60)]
        for ch in crowd:
            ch.close()
        assert c.run(["sh", "-c", "exit 3"])[0] == 3


def test_orphans_are_reaped(card: Card) -> None:
    """A program that forks twice leaves no zombie with init."""
    card.sh("(sh -c 'exit 3' &) ; (sleep 0.01 &) ; true")

    init = _outer(card.board.os_pid, card.hello["init"])

    def zombies() -> list[str]:
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return [pid for pid in children if "State:\tZ" in Path(f"/proc/{pid}/status").read_text()]

    eventually(lambda: not zombies(), 20, "no zombies")


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
        t.type("sleep 100009\n")
        eventually(lambda: _running("sleep", "100009"), 20, "the sleep started")
        time_limit = time.monotonic() + 60
        t.type("\x03")
        t.expect(r"\$> ")
        t.type("echo st=$?\n")
        t.expect("st=130")
        t.type("sleep 1001\n")
        t.expect("sleep 1001\r\n")
        eventually(lambda: _running("sleep", "1001"), 20, "the sleep started")
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


def _running(*argv: str) -> bool:
    want = b"\0".join(a.encode() for a in argv) + b"\0"
    return any(_cmdline(p) == want for p in Path("/proc").glob("[0-9]*/cmdline"))


def _cmdline(p: Path) -> bytes:
    try:
        return p.read_bytes()
    except OSError:
        return b""


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


def test_terminal_full_screen_program(card: Card, tmp_path: Path) -> None:
    """vi on the card edits a file in the caller's directory."""
    if not any(os.access(f"{d}/vi", os.X_OK) for d in os.environ["PATH"].split(":")):
        pytest.skip("vi is missing")
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
    t = Terminal(card, ["sh", "-c", "echo ready; exec sleep 1003"])
    t.expect("ready")
    eventually(lambda: _running("sleep", "1003"), 20, "the program")
    os.close(t.slave)
    os.close(t.master)
    eventually(lambda: not _running("sleep", "1003"), 30, "the program ended with the terminal")
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
        c.say("type " + json.dumps("tty; sleep 1004\n"))
        until("/dev/pts/")
        eventually(lambda: _running("sleep", "1004"), 20, "the sleep started")
        c.say("type " + json.dumps("\x03"))
        until("con> ")
        c.say("type " + json.dumps("exit\n"))
        c.say("type " + json.dumps("echo again-$((40+2))\n"))
        until("again-42")


@pytest.mark.parametrize("plain", [False, True])
def test_shutdown_waits_for_who_ends_in_order(plain: bool) -> None:
    """Shutdown sends SIGTERM; nobody is killed who ends within the limit, and the limit is not sat out."""
    if (plain and os.geteuid()) or (not plain and not CONTAINED):
        pytest.skip("not on this machine")
    with booted(plain=plain) as c:
        polite = c.client(["sh", "-c", "trap 'echo bye; exit 4' TERM; echo go; while :; do sleep 0.02; done"],
                          stdout=subprocess.PIPE)  # fmt: skip
        assert polite.stdout
        assert polite.stdout.readline() == b"go\n"
        begin = time.monotonic()
        c.say("shutdown 60")
        programs, killed = c.answer()
        assert time.monotonic() - begin < 60
        assert (programs >= 2, killed) == (True, 0)  # with the console's shell
        assert polite.communicate(timeout=20)[0] == b"bye\n"
        assert polite.returncode == 4


@pytest.mark.parametrize("plain", [False, True])
def test_shutdown_ends_everything(plain: bool) -> None:
    """Shutdown kills who ignores SIGTERM, daemons included, and says how many."""
    if (plain and os.geteuid()) or (not plain and not CONTAINED):
        pytest.skip("not on this machine")
    with booted(plain=plain) as c:
        stubborn = c.client(["sh", "-c", "trap '' TERM HUP; setsid sleep 1005 & sleep 1006"])
        for seconds in ("1005", "1006"):
            eventually(lambda seconds=seconds: _running("sleep", seconds), 20, "the stubborn programs")
        c.say("shutdown 0.3")
        programs, killed = c.answer()
        assert programs >= 3
        assert killed >= 3
        stubborn.communicate(timeout=20)
        # The shell may see its child's death before its own.
        assert stubborn.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert not _running("sleep", "1005")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("victim", ["os", "init"])
def test_kill_9_of_card_os_or_init(plain: bool, victim: str) -> None:
    """When card OS or init are killed, every program goes with them and the caller is told."""
    if (plain and os.geteuid()) or (not plain and not CONTAINED):
        pytest.skip("not on this machine")
    with booted(plain=plain) as c:
        p = c.client(["sh", "-c", "echo go; sleep 1007"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert p.stdout
        assert p.stdout.readline() == b"go\n"
        inner = c.hello["init"]
        pid = c.board.os_pid if victim == "os" else _outer(c.board.os_pid, inner)
        os.kill(pid, signal.SIGKILL)
        _, err = p.communicate(timeout=10)
        assert p.returncode == 1
        assert err == b"mic0 went down while sh was running\n"
        eventually(lambda: not _running("sleep", "1007"), 20, "the program gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to forbid namespaces")
def test_program_that_sees_the_loss_before_init_does() -> None:
    """The card OS is dead, but its connection to init not closed yet, when a program ends: the caller hears of the card."""
    with booted(plain=True) as c:
        p = c.client(["sh", "-c", "echo go; read x; exit 3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)  # fmt: skip
        assert p.stdin
        assert p.stdout
        assert p.stdout.readline() == b"go\n"
        held = _sockets_of(c.board.os_pid)
        parent = int(_fields(c.board.os_pid)[1])
        os.kill(parent, signal.SIGSTOP)  # it would end everything itself
        eventually(lambda: _letter(parent) == "T", 20, "it stopped")
        try:
            os.kill(c.board.os_pid, signal.SIGKILL)
            eventually(lambda: _letter(c.board.os_pid) == "Z", 20, "the card OS dead")
            p.stdin.close()
            assert p.wait(20) == 1
            assert p.stderr
            assert p.stderr.read() == b"mic0 went down while sh was running\n"
        finally:
            os.kill(parent, signal.SIGCONT)
            for fd in held:
                os.close(fd)


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _letter(pid: int) -> str:
    """State of a process, as ps shows it."""
    return _fields(pid)[0]


def _sockets_of(pid: int) -> list[int]:
    """Our duplicates of its sockets: they do not close with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        numbers = [int(p.name) for p in Path(f"/proc/{pid}/fd").iterdir() if "socket" in os.readlink(p)]
        found = [libc.syscall(PIDFD_GETFD, pidfd, n, 0) for n in numbers]
    finally:
        os.close(pidfd)
    assert found
    assert min(found) >= 0, os.strerror(ctypes.get_errno())
    return found


def _outer(os_pid: int, inner: int) -> int:
    """The pid here of a child of the card OS."""
    for child in Path(f"/proc/{os_pid}/task/{os_pid}/children").read_text().split():
        for line in Path(f"/proc/{child}/status").read_text().splitlines():
            if line.startswith("NSpid:") and int(line.split()[-1]) == inner:
                return int(child)
    raise AssertionError("init is no child of the card OS")


@pytest.mark.skipif(not CONTAINED, reason="; ".join(namespaces.refusals()))
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
