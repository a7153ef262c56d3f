"""Namespaces of the emulator's own for its network, and which network mode works on this machine.

A namespace pair is held by two descriptors only: no process, no name in the file system, nothing left
behind when the last descriptor is closed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from mic_emu import netif
from mic_emu._native import ffi, lib
from mic_emu.netif import NetError

Mode = Literal["ns", "tap", "responder"]

_STEP_NAMES = {
    lib.MIC_NETNS_FORK: "a helper process",
    lib.MIC_NETNS_USER: "a user namespace",
    lib.MIC_NETNS_MAP: "the uid map of a user namespace",
    lib.MIC_NETNS_NET: "a network namespace",
    lib.MIC_NETNS_ENTER: "entering a namespace",
    lib.MIC_NETNS_OPEN: "/dev/net/tun",
    lib.MIC_NETNS_TAP: "a TAP",
}
_NO_USERNS = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container use a seccomp profile that allows unshare)"
)
_LIMIT = "raise the limits user.max_user_namespaces and user.max_net_namespaces (sysctl)"
_FIXES = {
    errno.EPERM: _NO_USERNS,
    errno.EACCES: _NO_USERNS,
    errno.ENOSPC: _LIMIT,
    errno.EUSERS: _LIMIT,
    errno.EINVAL: "use a kernel with user and network namespaces (CONFIG_USER_NS, CONFIG_NET_NS)",
    errno.ENOSYS: "use a kernel with user and network namespaces (CONFIG_USER_NS, CONFIG_NET_NS)",
}


def _error(err: int, step: int) -> NetError:
    what = _STEP_NAMES.get(step, "a namespace")
    if step in (lib.MIC_NETNS_OPEN, lib.MIC_NETNS_TAP):
        return netif.tap_error(err, what)
    fix = _FIXES.get(err)
    return NetError(err, f"{what}: {os.strerror(err)}" + (f"; {fix}" if fix else ""))


def _maps(uid: int, gid: int) -> tuple[str, str, bool]:
    """uid map, gid map, and whether setgroups must be denied: root keeps all ids, a user becomes 0."""
    if uid == 0:
        return _own_range("uid"), _own_range("gid"), False
    return f"0 {uid} 1\n", f"0 {gid} 1\n", True


def _own_range(kind: str) -> str:
    """The whole range that is mapped here, onto itself (a container's root may not have all of it)."""
    with open(f"/proc/self/{kind}_map") as f:
        return "".join(f"{a} {a} {n}\n" for a, _, n in (line.split() for line in f))


class Namespaces:
    """A user and a network namespace, by descriptor. Context manager.

    ``user_fd`` and ``net_fd`` may be passed to other processes; the namespaces live as long as any
    copy is open or any process is inside.
    """

    def __init__(self, user_fd: int, net_fd: int) -> None:
        self.user_fd = user_fd
        self.net_fd = net_fd

    def enter(self) -> None:
        """Move this process (one thread only) into both. Raises NetError."""
        enter(self.user_fd, self.net_fd)

    def open_tap(self, name: str) -> netif.Tap:
        """A TAP in here, from any process and thread. Raises NetError."""
        step = ffi.new("int *")
        fd = lib.mic_netns_tap(self.user_fd, self.net_fd, name.encode(), step)
        if fd < 0:
            raise _error(-fd, step[0])
        return netif.Tap(fd, name)

    def run(self, call: Callable[[], None]) -> None:
        """Run ``call`` in here, in a forked child, and wait for it. Raises NetError if it raised OSError."""
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.enter()
                call()
                status = 0
            except OSError as e:
                os.write(w, json.dumps([e.errno, e.strerror]).encode())
            finally:
                os._exit(status)
        os.close(w)
        with os.fdopen(r, "rb") as f:
            report = f.read()
        _, status = os.waitpid(pid, 0)
        if report:
            err, text = json.loads(report)
            raise NetError(err, text)
        if status:
            raise NetError(errno.EPROTO, f"a helper process ended with status {status}")

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.user_fd, self.net_fd):
            if fd >= 0:
                os.close(fd)
        self.user_fd = self.net_fd = -1

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def create() -> Namespaces:
    """A new pair. Root keeps its full uid range, another user becomes root inside.

    Raises NetError (EPERM, ENOSPC, ...) with the fix in one sentence.
    """
    uid_map, gid_map, deny = _maps(os.geteuid(), os.getegid())
    user_fd, net_fd, step = ffi.new("int *"), ffi.new("int *"), ffi.new("int *")
    rc = lib.mic_netns_create(uid_map.encode(), gid_map.encode(), deny, user_fd, net_fd, step)
    if rc < 0:
        raise _error(-rc, step[0])
    return Namespaces(user_fd[0], net_fd[0])


def enter(user_fd: int, net_fd: int) -> None:
    """Move this process into namespaces; -1 keeps one. Raises NetError."""
    rc = lib.mic_netns_enter(user_fd, net_fd)
    if rc == -errno.EINVAL:
        raise NetError(errno.EINVAL, "a process with several threads cannot enter a user namespace")
    if rc < 0:
        raise _error(-rc, lib.MIC_NETNS_ENTER)


@dataclass(frozen=True, slots=True)
class Probe:
    """Which mode to use, and why not the better ones.

    ``mode``: the best that works without touching the real network. ``errno``, ``reason``: what stood
    in the way of ``ns`` (0 and empty when nothing did), fix included.
    """

    mode: Mode
    errno: int = 0
    reason: str = ""


def probe() -> Probe:
    """Try namespaces and a TAP inside (5-10 ms); fall back to the responder. Never raises NetError."""
    try:
        with create() as ns, ns.open_tap("probe0"):
            return Probe("ns")
    except NetError as e:
        return Probe("responder", e.errno or errno.EIO, str(e.strerror))
