"""Programs on the card: the protocol of ``micemu run``, and what a program has of its caller."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardlab import eventually
from cardrun import CLIENT, Card, booted, one_for_all, outer
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu import wire
from mic_emu.runproto import RunRequest
from mic_emu.wire import PeerClosed


@pytest.fixture(scope="module", params=["contained", "plain"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """One card for all tests that leave it as it was; with namespaces and without."""
    with one_for_all(plain=request.param == "plain") as c:
        yield c


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
    | st.floats(allow_nan=False, allow_infinity=False),  # JSON has neither
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

    init = outer(card.board.os_pid, card.hello["init"])

    def zombies() -> list[str]:
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return [pid for pid in children if "State:\tZ" in Path(f"/proc/{pid}/status").read_text()]

    eventually(lambda: not zombies(), 20, "no zombies")


def test_a_caller_that_says_nothing() -> None:
    """It is hung up on, and does not keep a descriptor of init's; one whose program runs is not."""
    with booted() as c, c.raw() as silent, c.raw() as busy, open("/dev/null") as null:
        busy.send(RunRequest(["sleep", "100"], "/", dict(os.environ)).message(), [null.fileno()] * 3)
        assert "started" in busy.recv(20, "the start")[0]
        with pytest.raises(PeerClosed):
            silent.recv(30, "the end")
        busy.send({"signal": signal.SIGTERM})
        assert busy.recv(20, "the end of the program")[0] == {"exited": -signal.SIGTERM}
