"""User namespaces and what they permit: create, map ids, enter, and find out beforehand.

Creating a user namespace gives its creator all capabilities inside it, so neither side of the
emulator needs root. Kernels, containers and security modules may refuse; ``refusals`` says which
namespace and why, without changing this process.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence

from mic_emu._native import ffi, lib

FLAGS: dict[str, int] = {
    "user": lib.MIC_NS_USER,
    "mnt": lib.MIC_NS_MNT,
    "uts": lib.MIC_NS_UTS,
    "ipc": lib.MIC_NS_IPC,
    "net": lib.MIC_NS_NET,
    "pid": lib.MIC_NS_PID,
}
CARD = ("user", "mnt", "uts", "ipc", "net", "pid")
HOST = ("user", "net")

_WHY = {
    errno.ENOSPC: "the limit /proc/sys/user/max_{name}_namespaces is reached or 0",
    errno.EPERM: "forbidden by the kernel's settings, a security module or this container",
    errno.EINVAL: "this kernel does not have them",
    errno.EUSERS: "too many nested namespaces",
}


class NamespaceError(OSError):
    """A namespace could not be created, mapped or entered."""


def check(rc: int, what: str) -> None:
    """Raise NamespaceError for a native ``-errno``."""
    if rc < 0:
        raise NamespaceError(-rc, f"{what}: {os.strerror(-rc)}")


def mask(names: Sequence[str]) -> int:
    """Flags of namespaces by name."""
    return functools.reduce(lambda m, n: m | FLAGS[n], names, 0)


def mount(
    source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2). Raises NamespaceError naming the target."""

    def c(s: str | None) -> object:
        return ffi.NULL if s is None else os.fsencode(s)

    rc = lib.mic_ns_mount(c(source), os.fsencode(target), c(fstype), flags, c(data))
    check(rc, f"mount {fstype or source or ''} at {target}")


# --- Create ------------------------------------------------------------------------------------


def _identity_map(path: str) -> str:
    """Map lines that give every id of this namespace the same number in a child namespace."""
    with open(path) as f:
        rows = [line.split() for line in f]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in rows)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class _Mapper:
    """A helper that stays in the parent namespace and maps all ids of this process when told.

    A process that has left a namespace may not map more than itself.
    """

    def __init__(self) -> None:
        pid = os.getpid()
        read, self._go = os.pipe2(os.O_CLOEXEC)
        self._helper = os.fork()
        if self._helper == 0:
            status = 1
            try:
                os.close(self._go)
                if os.read(read, 1):
                    _write(f"/proc/{pid}/uid_map", _identity_map("/proc/self/uid_map"))
                    _write(f"/proc/{pid}/gid_map", _identity_map("/proc/self/gid_map"))
                    status = 0
            except OSError:
                pass
            finally:
                os._exit(status)
        os.close(read)

    def finish(self, go: bool) -> bool:
        """Map, or give up; True when the ids are mapped."""
        if go:
            os.write(self._go, b"1")
        os.close(self._go)
        return os.waitpid(self._helper, 0)[1] == 0


def _map_self(uid: int, gid: int) -> None:
    """Become root of the new namespace; no other id exists in it."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1\n")
    _write("/proc/self/gid_map", f"0 {gid} 1\n")


def create(names: Sequence[str]) -> None:
    """Move this process, which has one thread, into new namespaces in one step.

    With "user" among them: root keeps all ids, anybody else becomes root of a namespace that knows
    only them. A new pid namespace begins with the next fork. Raises NamespaceError.
    """
    if "user" not in names:
        return check(lib.mic_ns_unshare(mask(names)), f"new {' '.join(names)} namespaces")
    uid, gid = os.geteuid(), os.getegid()
    mapper = _Mapper() if uid == 0 else None
    rc = lib.mic_ns_unshare(mask(names))
    mapped = mapper is not None and mapper.finish(go=rc == 0)
    check(rc, f"new {' '.join(names)} namespaces")
    if not mapped:
        try:
            _map_self(uid, gid)
        except OSError as e:
            raise NamespaceError(e.errno, f"ids of the new user namespace: {e.strerror}") from e


# --- Find out ----------------------------------------------------------------------------------


def _try_each(names: Sequence[str]) -> list[str]:
    """What is refused, in a process that may be thrown away."""
    refused: list[str] = []
    for name in names:
        try:
            create([name])
        except OSError as e:
            why = _WHY.get(e.errno or 0, "").format(name=name)
            refused.append(f"{name}: {os.strerror(e.errno or 0)}" + (f" ({why})" if why else ""))
            if name == "user":
                break
    if "mnt" in names and not refused:
        try:
            mount(None, "/", None, lib.MIC_MS_REC | lib.MIC_MS_PRIVATE)
            mount("micemu", "/", "tmpfs")
        except OSError as e:
            refused.append(f"mnt: {e.strerror}")
    return refused


def refusals(names: Sequence[str] = CARD) -> tuple[str, ...]:
    """Which of the namespaces this machine refuses to us, and why; empty when all are granted.

    Tried in a child process, once per process and set of names (some milliseconds).
    """
    return _refusals(tuple(names))


@functools.lru_cache(maxsize=8)
def _refusals(names: tuple[str, ...]) -> tuple[str, ...]:
    r, w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(r)
            os.write(w, "\n".join(_try_each(names)).encode() + b"\0")
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as f:
        text = f.read()
    os.waitpid(pid, 0)
    if not text.endswith(b"\0"):
        return ("user: the attempt ended without an answer",)
    return tuple(text[:-1].decode().splitlines())


# --- Enter -------------------------------------------------------------------------------------


def join(fds: Sequence[tuple[str, int]]) -> None:
    """Enter existing namespaces, given as (name, descriptor); "user" is entered first.

    This process has one thread. Raises NamespaceError.
    """
    for name, fd in sorted(fds, key=lambda row: row[0] != "user"):
        check(lib.mic_ns_enter(fd, FLAGS[name]), f"entering the {name} namespace")
