"""The card's init: runs programs for ``micemu run``, the console's shell, and reaps what is left.

The card OS forks it early, before it has threads: one small process with one epoll loop, so that
a fork is clean and nothing of the drivers is in the way. It is the reaper of every orphan. It
ends with the card OS: on request (``shutdown``: everybody gets SIGTERM, a while, SIGKILL), or when
the card OS is gone.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from mic_emu import runproto
from mic_emu._native import lib
from mic_emu.card.os import bootstrap, power, program
from mic_emu.card.os.console_shell import ConsoleShell
from mic_emu.card.os.loop import EventLoop
from mic_emu.card.os.program import Command, Root, Started, kill_all
from mic_emu.peers import admitted
from mic_emu.runproto import BadRequest
from mic_emu.wire import Channel, Message, PeerClosed, WireError, WireTimeout

_ACCEPT_PAUSE_S = 0.2
_REQUEST_LIMIT_S = 10.0  # micemu run asks as soon as it is connected

MakeRoot = Callable[[], tuple[Root, list[str]]]


@dataclass(frozen=True)
class InitConfig:
    """What the card OS tells its init.

    env:      variables of every program: MICEMU_NODE, MICEMU_CARD, MICEMU_SCIF_SOCKET, ...
    console:  run a shell on a terminal of init's own, whose master ``Init.ready`` fetches
    term:     the console shell's TERM
    cwd:      where the console's shell starts; made writable as for a program
    folder:   a folder of the card's, visible to programs under this path, for ``power.install``; "" for none
    group:    whose members may run programs beside our user and root
    """

    hostname: str
    env: dict[str, str] = field(default_factory=dict)
    console: bool = True
    term: str = "xterm"
    cwd: str = "/"
    folder: str = ""
    group: int | None = None


class Init:
    """The card OS's handle of its init."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self.channel = channel
        self.console_fd = -1
        self.notes: list[str] = []

    def ready(self) -> None:
        """Wait until programs can be run; then ``console_fd`` is the master of the console shell's
        terminal (-1 without; it belongs to the caller) and ``notes`` say what the root file system
        could not offer. Raises OSError when init does not come up.
        """
        answer, fds = self.channel.recv(10, "init's word that it is ready")
        if "error" in answer:
            raise OSError(errno.EIO, f"the card's init cannot start: {answer['error']}")
        self.notes = answer["notes"]
        if fds:
            self.console_fd = fds[0]

    def requested(self) -> str | None:
        """What a program asked for, "poweroff", "halt" or "restart", once ``channel`` is readable.

        Raises ConnectionError when init is gone: the card has panicked.
        """
        got = self.channel.try_recv()
        return str(got[0]["request"]) if got and "request" in got[0] else None

    def shutdown(self, grace_s: float = 2.0) -> tuple[int, int]:
        """End every program; (how many processes there were, how many had to be killed).

        Raises ConnectionError when init is gone, WireTimeout.
        """
        self.channel.send({"shutdown": grace_s})
        while True:
            answer, _ = self.channel.recv(grace_s + 10, "init's word that all programs ended")
            if "programs" in answer:
                return answer["programs"], answer["killed"]

    def close(self) -> None:
        """Cut the connection (init kills everything and ends) and reap it."""
        self.channel.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def start(config: InitConfig, listener: socket.socket, make_root: MakeRoot) -> Init:
    """Fork init; it sets itself up while the caller goes on (``Init.ready``).

    listener:   listening Unix socket for ``micemu run``; stays open here
    make_root:  called in init: the programs' root file system, and what it could not offer
    The caller has one thread. Raises OSError.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _main(config, listener, Channel(theirs), make_root)
    theirs.close()
    return Init(pid, Channel(ours))


def _main(config: InitConfig, listener: socket.socket, control: Channel, make_root: MakeRoot) -> NoReturn:
    status = 70
    try:
        lib.mic_proc_set_name(b"init")
        lib.mic_proc_adopt_orphans()
        _close_all_but({listener.fileno(), control.fileno(), bootstrap.archive_fd})
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(sig, signal.SIG_IGN)
        try:
            root, notes = make_root()
        except Exception as e:
            control.send({"error": str(e)})
            raise
        _Loop(config, listener, control, root).run(notes)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        kill_all(program.descendants(os.getpid()), signal.SIGKILL)
        os._exit(status)


def _close_all_but(keep: set[int]) -> None:
    """Let go of the card OS's descriptors: doorbells, memories, logs. 0, 1 and 2 are kept."""
    last = 2
    for fd in sorted(fd for fd in keep if fd > last):
        os.closerange(last + 1, fd)  # never (0, 0): Python would close everything
        last = fd
    os.closerange(last + 1, max(last, 4096) + 4096)


class _Client:
    """One ``micemu run`` and its program."""

    def __init__(self, channel: Channel) -> None:
        self.channel: Channel | None = channel
        self.started: Started | None = None
        self.request: runproto.RunRequest | None = None
        self.master = -1
        self.running = False
        self.status: int | None = None

    @property
    def pid(self) -> int:
        return self.started.pid if self.started else 0


class _Loop(EventLoop):
    def __init__(self, config: InitConfig, listener: socket.socket, control: Channel, root: Root) -> None:
        super().__init__()
        self.config = config
        self.listener = listener
        self.control = control
        self.card_os = os.getppid()
        self.root = root
        self.clients: dict[int, _Client] = {}  # by pid
        self.ending = False
        self.going_down = False
        self.console: ConsoleShell | None = None

    # --- the loop ---

    def run(self, notes: list[str]) -> None:
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self.listener.setblocking(False)
        self.watch(wake_r, lambda: self.reap(wake_r))
        self.watch(self.control.fileno(), self.on_control)
        self.listen()
        self.watch_power()
        fds = []
        if self.config.console:
            self.console = ConsoleShell(self, self.root, self.config.cwd, self.shell_environment)
            fds = [self.console.master]
        self.control.send({"ready": True, "notes": notes}, fds)
        if self.console:
            self.console.opened()
        while not self.ending:
            self.turn()

    def reap(self, wake_r: int) -> None:
        try:
            os.read(wake_r, 4096)
        except BlockingIOError:
            pass
        self.collect()

    def collect(self) -> None:
        """Everything that ended, adopted orphans included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if self.console and pid == self.console.pid:
                self.console.ended()
            elif pid in self.clients:
                client = self.clients[pid]
                client.status = code
                if client.running:
                    self.finish(client)

    # --- the card OS ---

    def watch_power(self) -> None:
        """Hear programs that want the card to go down."""
        pipes = [self.root.initctl] if self.root.initctl else []
        if self.config.folder:
            power.install(self.config.folder)
            pipes.append(os.path.join(self.config.folder, power.PIPE))
        for path in pipes:
            fd = power.open_pipe(path)
            self.watch(fd, lambda fd=fd: self.on_power(fd))  # type: ignore[misc]

    def on_power(self, fd: int) -> None:
        for word in power.requests(fd):
            try:
                self.control.send({"request": word}, timeout_s=1)
            except OSError:
                return  # a card OS that is gone or hangs cannot go down in order

    def environment(self, caller: dict[str, str]) -> dict[str, str]:
        """Variables of a program."""
        env = runproto.card_environment(caller, self.config.env)
        if self.config.folder:
            env["PATH"] = power.search_path(self.config.folder, env["PATH"])
        return env

    def shell_environment(self, shell: str) -> dict[str, str]:
        """Variables of the console's shell."""
        caller = {"TERM": self.config.term, "SHELL": shell, "HOME": os.environ.get("HOME", "/")}
        return self.environment(caller)

    def on_control(self) -> None:
        try:
            got = self.control.try_recv()
        except OSError:
            self.ending = True  # the card OS is gone: _main kills what is left
            return
        if got and "shutdown" in got[0]:
            self.shut_down(float(got[0]["shutdown"]))

    def shut_down(self, grace_s: float) -> None:
        self.going_down = True
        self.unwatch(self.listener.fileno())
        if self.console:
            self.console.stop()
        me = os.getpid()
        programs = program.descendants(me)
        kill_all(programs, signal.SIGTERM, signal.SIGCONT)
        kill_all(program.terminal_leaders(programs), signal.SIGHUP)  # interactive shells ignore SIGTERM
        deadline = time.monotonic() + grace_s
        while program.descendants(me) and time.monotonic() < deadline:
            self.turn(min(deadline, time.monotonic() + 0.05))
        killed: set[int] = set()
        deadline = time.monotonic() + 5
        while (left := program.descendants(me)) and time.monotonic() < deadline:
            killed |= left
            kill_all(left, signal.SIGKILL)
            self.turn(time.monotonic() + 0.05)
        self.collect()
        try:
            self.control.send({"programs": len(programs), "killed": len(killed)})
        except OSError:
            pass
        self.ending = True

    # --- clients ---

    def listen(self) -> None:
        if not self.going_down:
            self.watch(self.listener.fileno(), self.on_connect)

    def on_connect(self) -> None:
        try:
            conn, _ = self.listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            # No descriptor left: the listener would stay readable, so look away for a while.
            self.unwatch(self.listener.fileno())
            self.after(_ACCEPT_PAUSE_S, self.listen)
            return
        if not admitted(conn, self.config.group):
            conn.close()
            return
        client = _Client(Channel(conn))
        self.watch(conn.fileno(), lambda: self.on_client(client))
        self.after(_REQUEST_LIMIT_S, lambda: self.expect_request(client))

    def expect_request(self, client: _Client) -> None:
        """Who connects and asks for nothing does not keep a descriptor of ours for as long as it likes."""
        if client.request is None and client.channel:
            self.drop(client)

    def on_client(self, client: _Client) -> None:
        try:
            while client.channel and (got := client.channel.try_recv()):
                self.on_message(client, *got)
        except (PeerClosed, WireError):
            self.drop(client)

    def on_message(self, client: _Client, msg: Message, fds: list[int]) -> None:
        try:
            if client.request is None:
                client.request = runproto.parse_run(msg, len(fds))
                self.launch(client, client.request, fds)
            elif "signal" in msg and client.running and client.status is None:
                self.forward(client, msg["signal"])
        except BadRequest as e:
            self.refuse(client, errno.EINVAL, str(e))
        except OSError as e:
            self.refuse(client, e.errno or errno.EIO, f"no process for the program: {e.strerror}")
        finally:
            for fd in fds:
                os.close(fd)

    def launch(self, client: _Client, request: runproto.RunRequest, stdio: list[int]) -> None:
        slave = None
        if request.tty:
            client.master, slave = self.root.open_terminal()
            program.set_size(client.master, request.rows, request.cols)
        env = self.environment(request.env)
        command = Command(request.argv, env, request.cwd, stdio, slave, request.umask, request.limits)
        client.started = program.start(self.root, command)
        self.clients[client.pid] = client
        self.watch(client.started.ready_fd, lambda: self.on_started(client))

    def on_started(self, client: _Client) -> None:
        """The child has executed its program, or failed to."""
        if client.started is None or client.request is None:
            return
        self.unwatch(client.started.ready_fd)
        failed = client.started.result()
        if failed:
            number = failed.errno or errno.EIO
            text = runproto.start_error(number, client.request.argv[0], client.request.cwd, failed.stage)
            self.clients.pop(client.pid, None)
            self.refuse(client, number, text, failed.stage)
            return
        client.running = True
        fds = [client.master] if client.master >= 0 else []
        self.tell(client, {"started": client.pid}, fds)
        self.close_master(client)
        if client.channel is None:
            self.hang_up(client)
        if client.status is not None:
            self.finish(client)

    def forward(self, client: _Client, number: object) -> None:
        if type(number) is not int or number not in signal.valid_signals():
            raise BadRequest(f"{number!r:.20} is no signal")
        try:
            os.killpg(client.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def finish(self, client: _Client) -> None:
        """The program ended: tell, forget.

        A program may end because it has seen the card OS go, before we have: then the card went down under it,
        and the connection, which closes without a word, says so.
        """
        self.clients.pop(client.pid, None)
        if not self.card_os_gone():
            self.tell(client, {"exited": client.status})
        self.release(client)

    def card_os_gone(self) -> bool:
        """Does the card OS end, or has it? A process that dies closes its descriptors one after the other, and
        ours may come long after the one that the program looked at."""
        return os.getppid() != self.card_os or program.ends(self.card_os)

    def refuse(self, client: _Client, number: int, text: str, stage: str = "exec") -> None:
        self.tell(client, {"error": number, "stage": stage, "message": text})
        self.release(client)

    def tell(self, client: _Client, msg: Message, fds: list[int] | None = None) -> None:
        """Send without waiting: a client that does not read is dropped."""
        try:
            if client.channel:
                client.channel.send(msg, fds or (), timeout_s=0)
        except (PeerClosed, WireTimeout):
            self.drop(client)

    def release(self, client: _Client) -> None:
        self.close_master(client)
        if client.channel:
            self.unwatch(client.channel.fileno())
            client.channel.close()
            client.channel = None

    def close_master(self, client: _Client) -> None:
        if client.master >= 0:
            os.close(client.master)
            client.master = -1

    def drop(self, client: _Client) -> None:
        """The client has gone: so goes its program."""
        self.release(client)
        if client.running and client.status is None:
            self.hang_up(client)

    def hang_up(self, client: _Client) -> None:
        pid = client.pid
        for sig in (signal.SIGHUP, signal.SIGCONT):
            try:
                os.killpg(pid, sig)
            except (ProcessLookupError, PermissionError):
                pass
        self.after(runproto.HANGUP_GRACE_S, lambda: kill_all(self.left_of(client), signal.SIGKILL))

    def left_of(self, client: _Client) -> list[int]:
        """Processes of a program's session, while its number cannot be somebody else's."""
        members = program.session_members(client.pid)
        return members if client.status is None or client.pid not in members else []
