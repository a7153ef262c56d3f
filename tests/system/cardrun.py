"""A stand-in for the card OS: only an init, and commands for its handle on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cardlab
import needs
from cardlab import Board, board

from mic_emu import runproto, wire
from mic_emu.runproto import RunRequest
from mic_emu.wire import Channel

# The card OS of these tests: init, and words on stdin for its handle.
KERNEL = """
import base64, json, os, resource, select, socket, sys
from mic_emu import namespaces
from mic_emu.card.os import init, rootfs
listener = socket.socket(fileno=int(sys.argv[1]))
options = json.loads(sys.argv[2])
options["ramdisk"] = base64.b64decode(options.get("ramdisk", ""))
contained = os.getpid() == 1
faults = options.pop("faults", [])
if limit := options.pop("limit_nofile", 0):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
class Lib:
    # The native library of an older kernel.
    def __getattr__(self, name): return getattr(real, name)
    def mic_ns_read_only(self, path): return -38 if "no mount_setattr" in faults else real.mic_ns_read_only(path)
    def mic_ns_pivot_root(self, a, b): return -22 if "no pivot_root" in faults else real.mic_ns_pivot_root(a, b)
real, rootfs.lib = rootfs.lib, Lib()
mount = rootfs.mount
def faulty(source, target, fstype, *rest):
    if f"no {fstype}" in faults:
        raise namespaces.NamespaceError(1, f"mount {fstype}: Operation not permitted")
    mount(source, target, fstype, *rest)
rootfs.mount = faulty
env = {"MICEMU_NODE": "1", "MICEMU_CARD": "mic0"}
card = init.start(init.InitConfig("mic0", env, cwd=options.pop("console_cwd", "/")), listener,
                  lambda: rootfs.make_root(contained, rootfs.RootConfig("mic0", **options)))
card.ready()
def say(x): print(json.dumps(x), flush=True)
say({"init": card.pid, "notes": card.notes})
stdin = os.fdopen(0, "rb", buffering=0)
while True:
    ready = select.select([stdin, card.channel], [], [])[0]
    if card.channel in ready:
        sys.exit(71)  # init died: the card has panicked
    line = stdin.readline().decode()
    if not line:
        break
    word, _, rest = line.partition(" ")
    if word.strip() == "shutdown":
        say(card.shutdown(float(rest)))
        break
    elif word == "type":
        os.write(card.console_fd, json.loads(rest).encode())
    elif word.strip() == "read":
        say(os.read(card.console_fd, 65536).decode())
card.close()
"""


class Card:
    """A running stand-in for a card, with a connection per program."""

    def __init__(self, b: Board, path: Path) -> None:
        self.board = b
        self.path = path
        self.user = False
        self.hello = self.answer()

    def answer(self) -> Any:
        """Next line of the kernel."""
        assert self.board.process.stdout
        line = self.board.process.stdout.readline()
        assert line.startswith(("{", "[", chr(34))), self.board.process.communicate()[1]
        return json.loads(line)

    def say(self, text: str) -> None:
        assert self.board.process.stdin
        self.board.process.stdin.write(text + "\n")
        self.board.process.stdin.flush()

    def client(
        self, argv: Sequence[str], user: bool = False, cwd: Path | str | None = None, **kw: Any
    ) -> subprocess.Popen[bytes]:
        """``micemu run mic0 -- argv`` without click."""
        exe, env = cardlab.userland() if user else (sys.executable, dict(os.environ))
        prefix = cardlab.as_user() if user else []
        return subprocess.Popen([*prefix, exe, "-c", CLIENT, str(self.path), *argv], env=env, cwd=cwd, **kw)

    def run(
        self,
        argv: Sequence[str],
        stdin: bytes = b"",
        user: bool = False,
        cwd: Path | str | None = None,
        relay: bool = False,
    ) -> tuple[int, str]:
        """(exit status, output) of a program; through the real ``micemu run`` relay for ``user`` and ``relay``."""
        if not (user or relay):
            return self.ask(RunRequest(list(argv), str(cwd or os.getcwd()), dict(os.environ)), stdin)
        p = self.client(
            argv, user=user, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        out, _ = p.communicate(stdin, timeout=30)
        return p.returncode, out.decode()

    def ask(self, request: RunRequest, stdin: bytes) -> tuple[int, str]:
        """The same by init's protocol, without a process of our own."""
        files = [os.memfd_create(name) for name in ("in", "out")]
        try:
            os.write(files[0], stdin)
            os.lseek(files[0], 0, os.SEEK_SET)
            with self.raw() as channel:
                channel.send(request.message(), [files[0], files[1], files[1]])
                answer, _ = channel.recv(30, "the program started")
                if "error" in answer:
                    return runproto.exit_code(
                        answer["error"], answer["stage"]
                    ), f"mic0: {answer['message']}\n"
                status: int = channel.recv(30, "the program's end")[0]["exited"]
            return status, os.pread(files[1], 1 << 24, 0).decode()
        finally:
            for fd in files:
                os.close(fd)

    def sh(self, script: str, **kw: Any) -> str:
        """Output of a shell script that must succeed."""
        status, out = self.run(["sh", "-c", script], **kw)
        assert status == 0, out
        return out

    def raw(self) -> Channel:
        """A bare connection to init."""
        return Channel(wire.connect_unix(str(self.path)))


CLIENT = """
import sys
from mic_emu import runproto, wire
from mic_emu.runproto import RunRequest
from mic_emu.cli import run_client
from mic_emu.errors import MicemuError
try:
    status = run_client.run(wire.connect_unix(sys.argv[1]), sys.argv[2:], where="mic0")
except MicemuError as e:
    print(e, file=sys.stderr, flush=True)
    run_client.leave(e.code)
run_client.leave(status)
"""


@contextmanager
def booted(user: bool = False, plain: bool = False, **options: Any) -> Iterator[Card]:
    """A card whose OS is only an init."""
    where = Path("/tmp") / f"micemu-test-{os.getpid()}-{time.monotonic_ns()}"
    where.mkdir(mode=0o755)
    path = where / "run.sock"
    listener = wire.listen_unix(str(path))
    if user:
        path.chmod(0o666)
    fd = listener.fileno()
    prefix = cardlab.without_userns() if plain else []
    argv = [cardlab.userland()[0] if user else sys.executable, "-c", KERNEL, str(fd), json.dumps(options)]
    try:
        with board(argv, prefix=prefix, user=user, keep=[fd], stdin=True) as b:
            yield Card(b, path)
    finally:
        listener.close()
        path.unlink()
        where.rmdir()


def possible(plain: bool) -> None:
    """Skip where no such card can be had: plain processes take root to forbid namespaces, the others namespaces."""
    if plain:
        needs.root()
    else:
        needs.contained_cards()


@contextmanager
def one_for_all(plain: bool) -> Iterator[Card]:
    """A card for a whole module."""
    possible(plain)
    with booted(plain=plain) as c:
        yield c
    cardlab.forget_userland()


def seconds(n: int) -> str:
    """A long time that no other test run on this machine sleeps: ``running`` looks at all processes."""
    return f"{n}{os.getpid():07}"


def running(*argv: str) -> bool:
    """Is a program with exactly this command line alive?"""
    want = b"\0".join(a.encode() for a in argv) + b"\0"
    return any(_command_line(p) == want for p in Path("/proc").glob("[0-9]*/cmdline"))


def _command_line(p: Path) -> bytes:
    try:
        return p.read_bytes()
    except OSError:
        return b""


def outer(os_pid: int, inner: int) -> int:
    """The pid here of a child of the card OS."""
    for child in Path(f"/proc/{os_pid}/task/{os_pid}/children").read_text().split():
        for line in Path(f"/proc/{child}/status").read_text().splitlines():
            if line.startswith("NSpid:") and int(line.split()[-1]) == inner:
                return int(child)
    raise AssertionError("init is no child of the card OS")
