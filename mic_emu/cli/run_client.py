"""``micemu run``: the caller's side of a program that runs elsewhere.

With a terminal on both ends, the program gets one on the card and this process relays between the
two. Otherwise the program inherits our stdin, stdout and stderr themselves, and no byte passes
through here. Signals go to the program; it ends when we are gone.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NoReturn

from mic_emu import runproto
from mic_emu.cli import terminal
from mic_emu.errors import MicemuError
from mic_emu.runproto import RunRequest
from mic_emu.wire import Channel, PeerClosed

_PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGTSTP,
)
_START_TIMEOUT_S = 30.0
_BUFFER = 64 << 10
_DRAIN_S = 0.2  # how long output may be silent after the program ended while others hold its terminal


class StartFailed(MicemuError):
    """The program was never started; ``code`` is 127 (not found) or 126, as in shells."""

    def __init__(self, message: str, number: int, stage: str = "exec") -> None:
        super().__init__(message, number)
        self.code = runproto.exit_code(number, stage)


def run(
    sock: socket.socket,
    argv: Sequence[str],
    *,
    where: str = "the card",
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    tty: bool | None = None,
) -> int:
    """Run ``argv`` at the other end of ``sock`` (an init's socket; closed afterwards) until it ends.

    where:  the card's name, for messages
    cwd:    working directory there, ours by default
    env:    environment, ours by default
    tty:    give the program a terminal; by default when stdin and stdout are terminals
    Returns the exit status, 0..255, or minus the signal that ended it (``leave`` ends like that).
    Raises StartFailed, MicemuError (the card went down).
    """
    with_tty = terminal.is_terminal(0) and terminal.is_terminal(1) if tty is None else tty
    rows, cols = terminal.window_size(0) if with_tty else (0, 0)
    request = RunRequest(
        list(argv),
        _cwd() if cwd is None else cwd,
        dict(os.environ if env is None else env),
        with_tty,
        rows,
        cols,
        _umask(),
        runproto.soft_limits(),
    )
    wanted = _PASSED_ON + ((signal.SIGWINCH,) if with_tty else ())
    with Channel(sock) as channel, terminal.caught(wanted) as signals:
        try:
            master = _start(channel, request, where)
            return _Relay(channel, signals, master).run()
        except PeerClosed:
            raise MicemuError(f"{where} went down while {argv[0]} was running", errno.ECONNRESET) from None


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _start(channel: Channel, request: RunRequest, where: str) -> int:
    """Send the request; the terminal's master, or -1."""
    with ExitStack() as stack:
        fds = [] if request.tty else [_standard(n, stack) for n in range(3)]
        channel.send(request.message(), fds)
    answer, got = channel.recv(_START_TIMEOUT_S, f"start of {request.argv[0]} on {where}")
    if "started" in answer and len(got) == int(request.tty):
        return got[0] if got else -1
    for fd in got:
        os.close(fd)
    if "error" in answer:
        stage = str(answer.get("stage", "exec"))
        raise StartFailed(f"{where}: {answer.get('message')}", int(answer["error"]), stage)
    raise MicemuError(f"{where} answered something unexpected to a request to run a program", errno.EPROTO)


def _standard(n: int, stack: ExitStack) -> int:
    """Descriptor 0, 1 or 2, or /dev/null where the caller closed it."""
    try:
        os.fstat(n)
        return n
    except OSError:
        f = stack.enter_context(open(os.devnull, "rb" if n == 0 else "wb"))
        return f.fileno()


class _Relay:
    """Moves bytes between two terminals and signals to the program, until it ends."""

    def __init__(self, channel: Channel, signals: int, master: int) -> None:
        self.channel = channel
        self.signals = signals
        self.master = master
        self.input = b""  # typed, not yet taken by the program's terminal
        self.typing = master >= 0
        self.raw: terminal.Raw | None = None

    def run(self) -> int:
        if self.master < 0:
            return self.wait()
        os.set_blocking(self.master, False)
        try:
            if not terminal.is_terminal(0):
                return self.wait()
            with terminal.Raw(0) as self.raw:
                return self.wait()
        finally:
            self.close()

    def wait(self) -> int:
        while True:
            events = self.poll(None)
            if self.signals in events:
                self.pass_signals()
            if 0 in events and self.typing:
                self.read_input()
            if self.master in events:
                self.relay()
            if self.channel.fileno() in events and (got := self.channel.try_recv()) and "exited" in got[0]:
                self.drain()
                return int(got[0]["exited"])

    def poll(self, timeout_ms: int | None) -> set[int]:
        poller = select.poll()
        poller.register(self.signals, select.POLLIN)
        poller.register(self.channel.fileno(), select.POLLIN)
        if self.typing and len(self.input) < _BUFFER:
            poller.register(0, select.POLLIN)
        if self.master >= 0:
            poller.register(self.master, select.POLLIN | (select.POLLOUT if self.input else 0))
        return {fd for fd, _ in poller.poll(timeout_ms)}

    def pass_signals(self) -> None:
        for number in terminal.read_signals(self.signals):
            if number == signal.SIGWINCH:
                self.resize()
            elif number == signal.SIGTSTP:
                # The program's group has no parent in its session, so SIGTSTP would be ignored there.
                self.send_signal(signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                if number == signal.SIGCONT and self.raw:
                    self.raw.again()
                    self.resize()
                self.send_signal(number)

    def resize(self) -> None:
        """The program's terminal gets our size; it may be closed already while the program goes on."""
        if self.master >= 0:
            terminal.set_window_size(self.master, terminal.window_size(0))

    def send_signal(self, number: int) -> None:
        """To the program. When it has ended meanwhile, what it left in the channel tells how."""
        try:
            self.channel.send({"signal": int(number)})
        except PeerClosed:
            pass

    def read_input(self) -> None:
        try:
            typed = os.read(0, 4096)
        except OSError:
            typed = b""
        if typed:
            self.input += typed
        else:
            self.typing = False
            self.send_signal(signal.SIGHUP)  # our terminal has gone

    def relay(self) -> bool:
        """Move what can be moved; False when the program's side has nothing (more)."""
        try:
            if self.input:
                self.input = self.input[os.write(self.master, self.input) :]
        except BlockingIOError:
            pass
        except OSError:
            self.input = b""
        try:
            shown = os.read(self.master, _BUFFER)
        except BlockingIOError:
            return True
        except OSError:
            shown = b""
        if not shown:  # every process has closed the terminal: only the exit status is missing
            self.close()
            return False
        try:
            terminal.write_all(1, shown)
        except OSError:  # nobody sees it any more: hang up
            self.send_signal(signal.SIGHUP)
            self.close()
            return False
        return True

    def close(self) -> None:
        """Close the program's terminal."""
        if self.master >= 0:
            os.close(self.master)
        self.master, self.typing = -1, False

    def drain(self) -> None:
        """Show what the program wrote before it ended."""
        end = time.monotonic() + 10
        while self.master >= 0 and time.monotonic() < end:
            poller = select.poll()
            poller.register(self.master, select.POLLIN)
            if not poller.poll(_DRAIN_S * 1000) or not self.relay():
                return


def leave(status: int) -> NoReturn:
    """End this process as the program ended: by the same signal, without a core, or with its status."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
        status += 256 if status < -128 else 128 - 2 * status  # its default does not kill: 128 + signal
    os._exit(status)


def run_on_host(
    argv: Sequence[str], namespaces: Sequence[tuple[str, int]], env: Mapping[str, str]
) -> NoReturn:
    """Become ``argv`` inside the instance's own namespaces, given as (name, descriptor).

    env:  variables beyond ours (MICEMU_NODE, MICEMU_SCIF_SOCKET ...)
    Raises StartFailed, NamespaceError.
    """
    from mic_emu.namespaces import join

    join(namespaces)
    try:
        os.execvpe(argv[0], list(argv), {**os.environ, **env})
    except OSError as e:
        number = e.errno or errno.EIO
        text = "not found" if number == errno.ENOENT else f"cannot be executed: {os.strerror(number)}"
        raise StartFailed(f"host: {argv[0]}: {text}", number) from None
