"""The instance's init: parent of every process on the host side.

It forks the host process and, when the host asks, boards and backends. It has no threads and few
descriptors, so a fork is clean and costs about a millisecond; one child is forked ahead. When the host ends, however it ends,
init kills what is left and removes the run directory; when init itself is killed, the kernel kills
its children (PR_SET_PDEATHSIG) and the next command sweeps up.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mic_emu._native import lib
from mic_emu.log import Log
from mic_emu.proc import kill_descendants
from mic_emu.rundir import RunDir
from mic_emu.wire import SEND_TIMEOUT_S, Channel, PeerClosed, WireError

HOST, SPARE = "micemu-host", "micemu-spare"
ENDING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)  # what a session, a service manager or pkill sends to all at once
Target = Callable[[dict[str, Any], list[int]], int]


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor that is not in ``keep``."""
    last = -1
    for fd in sorted(set(keep)):
        if fd > last + 1:  # an empty range would mean "everything" to closerange
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, max(os.sysconf("SC_OPEN_MAX"), last + 2))


def settle_in(parent: int, name: str, keep: Sequence[int]) -> None:
    """What every forked process does first: its life, its name, its signals, its descriptors.

    Of ``ENDING`` only the host process hears SIGTERM and SIGINT. Boards and backends stay for the orderly end of their
    card; then init kills them.
    """
    lib.mic_proc_die_with_parent(parent)
    lib.mic_proc_set_name(name.encode()[:15])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for sig in ENDING:
        signal.signal(sig, signal.SIG_DFL if name == HOST and sig != signal.SIGHUP else signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    close_all_but([0, 1, 2, *keep])


def live(name: str, log_fd: int, target: Callable[[], int]) -> NoReturn:
    """The rest of a forked process: ``target``, exit status."""
    status = 70
    try:
        status = target()
    except BaseException as e:
        what = traceback.format_exception_only(e)[-1].rstrip()
        Log(log_fd, process=name).error(f"ended by an exception: {what}", traceback=traceback.format_exc())
    finally:
        os._exit(status)


def wait_for_a_name(channel: Channel, log_fd: int, targets: dict[str, Target]) -> int:
    """The life of a spare process: it becomes what init tells it to be."""
    try:
        msg, fds = channel.recv(None, "what to be")
    except (WireError, OSError):
        return 0  # init is going
    channel.close()
    lib.mic_proc_set_name(msg["name"].encode()[:15])
    live(msg["name"], log_fd, lambda: targets[msg["kind"]](msg["args"], fds))


# By name: init powers the slot, whatever sits in it; host code does not import card code.
TARGETS = {
    "board": "mic_emu.card.board.main",
    "block": "mic_emu.host.backends.block",
    "net": "mic_emu.host.backends.net",
    "console": "mic_emu.host.backends.console",
    "python": "mic_emu.host.backends.python",
}


def targets() -> dict[str, Target]:
    """What init can start. Imported before the first fork: children share the pages."""
    return {kind: importlib.import_module(name).main for kind, name in TARGETS.items()}


class Launcher:
    """Init's loop."""

    def __init__(self, rundir: RunDir, log: Log) -> None:
        self.rundir = rundir
        self.log = log
        self.targets = targets()
        self.children: dict[int, str] = {}
        self.spare: tuple[int, Channel] | None = None

    def fork(self, name: str, target: Callable[[], int], fds: Sequence[int]) -> int:
        """Fork a child with exactly ``fds`` (plus stdio and the log). Returns its pid."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:

            def be() -> int:
                settle_in(parent, name, [self.log.fd, *fds])
                return target()

            live(name, self.log.fd, be)
        self.children[pid] = name
        return pid

    def start(self, kind: str, name: str, args: dict[str, Any], fds: list[int]) -> int:
        """A board or backend: the spare becomes it. Returns its pid."""
        args = {**args, "log_fd": self.log.fd}
        if self.spare is not None:
            (pid, channel), self.spare = self.spare, None
            with channel:
                try:
                    channel.send({"kind": kind, "name": name, "args": args}, fds)
                    self.children[pid] = name
                    return pid
                except OSError:
                    pass  # it was killed; the reaper forgets it
        return self.fork(name, lambda: self.targets[kind](args, fds), fds)

    def have_a_spare(self) -> None:
        """Fork the process that becomes the next board or backend: on a busy machine a fresh child waits for its
        first turn longer than one that has waited for a message."""
        try:
            ours, theirs = map(Channel, socket.socketpair())
        except OSError:
            return
        try:
            pid = self.fork(
                SPARE, lambda: wait_for_a_name(theirs, self.log.fd, self.targets), [theirs.fileno()]
            )
            self.spare = (pid, ours)
        except OSError:
            ours.close()  # no process now: the next one is forked when it is asked for
        finally:
            theirs.close()

    def run(self, host_main: Target, args: dict[str, Any], ready_fd: int) -> None:
        """Fork the host and serve it until it ends; then clean up."""
        gc.collect()
        gc.freeze()
        ours, theirs = socket.socketpair()
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        fds = [theirs.fileno(), ready_fd]
        host = self.fork(HOST, lambda: host_main({**args, "log_fd": self.log.fd}, fds), fds)
        theirs.close()
        os.close(ready_fd)
        self.rundir.write_pids({"init": os.getpid(), "host": host})
        channel = Channel(ours)
        self.have_a_spare()
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        poller.register(wake_r, select.POLLIN)
        while host in self.children:
            for fd, _ in poller.poll():
                if fd == wake_r:
                    signals = os.read(wake_r, 4096)
                    self.reap(channel)
                    if signal.SIGTERM in signals and host in self.children:
                        os.kill(host, signal.SIGTERM)  # the end of the session, say: in order
                elif not self.serve(channel):
                    poller.unregister(ours)
                    channel.close()  # a host process that lives all the same hears so, and ends
        self.finish()

    def serve(self, channel: Channel) -> bool:
        """One request of the host. False when it has gone."""
        try:
            msg, fds = channel.recv(SEND_TIMEOUT_S, "the rest of a request of the host process")
        except PeerClosed:
            return False
        except OSError as e:
            self.log.error(f"the host process is heard no more: {e}")
            return False
        try:
            answer: dict[str, Any] = {"spawned": self.start(msg["kind"], msg["name"], msg["args"], fds)}
        except OSError as e:
            answer = {"error": str(e)}
        finally:
            for fd in fds:
                os.close(fd)
        try:
            channel.send({**answer, "id": msg["id"]})
        except OSError:
            return False  # it was killed meanwhile: what we have started goes with it
        if self.spare is None:
            self.have_a_spare()
        return True

    def reap(self, channel: Channel | None) -> None:
        """Collect what ended, adopted orphans included, and tell the host."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self.children.pop(pid, None)
            if name == SPARE:
                if self.spare is not None and self.spare[0] == pid:
                    self.spare[1].close()
                    self.spare = (
                        None  # the next process is forked when it is asked for, and then a spare again
                    )
                continue
            if name == HOST and status != 0:
                self.log.error("the host process died", status=os.waitstatus_to_exitcode(status))
                self.rundir.save_logs()
            if name is not None and channel is not None:
                try:
                    channel.send({"exited": pid, "name": name, "status": os.waitstatus_to_exitcode(status)})
                except OSError:
                    pass  # the host is the one that ended

    def finish(self) -> None:
        """Kill everything below us, wait for it, remove the run directory."""
        kill_descendants()
        with self.rundir.locked(patient=True):
            owner = self.rundir.read_pids().get("init")
            if owner is None or owner.pid == os.getpid():  # not a successor's
                self.rundir.remove()


def start(rundir: RunDir, args: dict[str, Any]) -> int:
    """Start init and the host process in the background.

    Returns a descriptor: the host writes one JSON line to it when it serves its control socket, or
    an error and closes it.
    """
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(ready_w)
        os.waitpid(pid, 0)
        return ready_r
    try:
        os.close(ready_r)
        os.setsid()
        if os.fork():
            os._exit(0)
        _daemon(rundir, args, ready_w)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(70)


def _daemon(rundir: RunDir, args: dict[str, Any], ready_w: int) -> None:
    os.chdir("/")
    # Members of a group read files; what sockets let in, their directory says (peers.restrict).
    os.umask(0o027 if args["config"].get("group") else 0o077)
    null = os.open("/dev/null", os.O_RDWR)
    crash = os.open(rundir / "stderr.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for fd, src in ((0, null), (1, crash), (2, crash)):
        os.dup2(src, fd)
    log = Log.open(rundir.log)
    close_all_but([0, 1, 2, log.fd, ready_w])
    lib.mic_proc_set_name(b"micemu-init")
    lib.mic_proc_adopt_orphans()
    lib.mic_proc_no_core()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a card takes some 60 descriptors
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from mic_emu.host.daemon import main as host_main

    Launcher(rundir, log.bind(process="init")).run(host_main, args, ready_w)
    os._exit(0)
