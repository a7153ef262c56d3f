"""The card OS's own namespaces, and the process that stands for it outside.

    board ── shim ── pid 1 of the card (the image) ── everything else on the card

The shim stays in the board's pid namespace, passes signals on and ends as the card OS ended. Each
level dies with the one above it (PR_SET_PDEATHSIG), and the kernel kills a pid namespace whose first
process died, so nothing on the card outlives the board, whatever is killed.

Where the machine refuses namespaces, the image runs as a plain process: leader of a session and
reaper of its orphans.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from mic_emu import namespaces
from mic_emu._native import lib
from mic_emu.namespaces import NamespaceError, mount

_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@dataclass(frozen=True)
class Containment:
    """How a card OS is contained. ``refused`` holds a sentence per namespace that was not granted."""

    namespaces: tuple[str, ...]
    refused: tuple[str, ...]

    def report(self, pid: int) -> bytes:
        """JSON line for the board; ``pid`` is the card OS's, as the board sees it."""
        row = {"pid": pid, "namespaces": list(self.namespaces), "refused": list(self.refused)}
        return json.dumps(row).encode() + b"\n"


def enter(
    hostname: str,
    report_fd: int = -1,
    refused: Sequence[str] | None = None,
    parent: int = 0,
) -> Containment:
    """Contain this process, the board's forked child, before it executes the image.

    hostname:   the card's host name
    report_fd:  where the report goes (``Containment.report``, then closed), or -1
    refused:    what ``namespaces.refusals()`` said in the board; None asks it here
    parent:     the board's pid, to notice that it died before we could bind to its death; 0 skips that

    Returns in the process that shall exec; the shim never returns. Descriptors stay open in the
    returning process only. Raises OSError (ESRCH: the board is gone).
    """
    namespaces.check(lib.mic_proc_die_with_parent(parent), "the board died")
    why = namespaces.refusals() if refused is None else tuple(refused)
    if not why:
        try:
            namespaces.create(namespaces.CARD)
        except NamespaceError as e:
            why = (f"user: {e.strerror}",)
    if why:
        return _plain(Containment((), why), report_fd)
    # Changing credentials may have cleared it.
    namespaces.check(lib.mic_proc_die_with_parent(parent), "the board died")
    mount(None, "/", None, lib.MIC_MS_REC | lib.MIC_MS_PRIVATE)
    socket.sethostname(hostname)
    lib.mic_ns_loopback_up()
    return _first_process(Containment(namespaces.CARD, ()), report_fd)


def _plain(how: Containment, report_fd: int) -> Containment:
    _new_session()
    lib.mic_proc_adopt_orphans()
    _report(how, os.getpid(), report_fd)
    return how


def _new_session() -> None:
    try:
        os.setsid()
    except PermissionError:
        pass  # a session leader already


def _report(how: Containment, pid: int, report_fd: int) -> None:
    if report_fd >= 0:
        os.write(report_fd, how.report(pid))
        os.close(report_fd)


def _first_process(how: Containment, report_fd: int) -> Containment:
    """Fork pid 1 of the new pid namespace; this process becomes the shim."""
    alive_r, alive_w = os.pipe2(os.O_CLOEXEC)
    # Blocked across the fork, so that no signal for the card is lost or kills the shim.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    pid = os.fork()
    if pid:
        try:
            _report(how, pid, report_fd)
        finally:
            _shim(pid, alive_w)
    os.close(alive_w)
    if report_fd >= 0:
        os.close(report_fd)
    for sig in (*_FORWARDED, signal.SIGCHLD):
        signal.signal(sig, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_FORWARDED, signal.SIGCHLD})
    lib.mic_proc_die_with_parent(0)
    # The parent's pid is not visible from in here; the pipe tells whether it lived when we bound to it.
    if select.select([alive_r], [], [], 0)[0]:
        os._exit(1)
    os.close(alive_r)
    _new_session()
    try:
        mount("proc", "/proc", "proc", lib.MIC_MS_NOSUID | lib.MIC_MS_NODEV | lib.MIC_MS_NOEXEC)
    except NamespaceError:
        pass  # a container that masks parts of /proc refuses it: the host's then stays visible
    return how


def _shim(pid: int, alive_w: int) -> NoReturn:
    """Pass signals on; end as ``pid`` ends."""
    status = 70
    try:
        signal.set_wakeup_fd(-1)
        lib.mic_proc_set_name(b"micos-shim")
        lib.mic_proc_no_core()
        if alive_w:  # (0, 0) would close everything
            os.closerange(0, alive_w)
        os.closerange(alive_w + 1, os.sysconf("SC_OPEN_MAX") if alive_w > 4096 else 4096)
        while True:
            sig = signal.sigwait({*_FORWARDED, signal.SIGCHLD})
            if sig != signal.SIGCHLD:
                os.kill(pid, sig)
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
        status = os.waitstatus_to_exitcode(status)
        if status < 0:
            _die_by(-status)
    finally:
        os._exit(status if 0 <= status < 256 else 70)


def _die_by(sig: int) -> None:
    if sig not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(sig, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {sig})
    os.kill(os.getpid(), sig)
