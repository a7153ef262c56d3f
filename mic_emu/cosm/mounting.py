"""FUSE mounts: make one, look for it in the mount table, take it away."""

from __future__ import annotations

import array
import errno
import os
import re
import select
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass

from mic_emu._native import lib
from mic_emu.namespaces import NamespaceError, mount

DEVICE_FIX = "modprobe fuse, or chmod 666 /dev/fuse, or docker run --device /dev/fuse"
ANSWER_S = 1.0  # what a server is given that may hang


def open_device() -> int:
    """A descriptor of ``/dev/fuse``. Raises OSError."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def mount_helper() -> str | None:
    """The program that mounts for those who may not, where it is installed."""
    return shutil.which("fusermount3") or shutil.which("fusermount")


def mount_at(target: str, source: str, fstype: str) -> int:
    """Mount an empty FUSE file system at ``target``; returns the descriptor to serve.

    Directly where we may (root, or inside our own user namespace), else through fusermount3. Raises OSError
    with a sentence.
    """
    try:
        fd = open_device()
    except OSError as e:
        raise OSError(
            e.errno,
            f"/dev/fuse cannot be opened: {e.strerror} ({DEVICE_FIX}); micemu sysfs ls, cat and write need no FUSE",
        ) from e
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    for extra in (",allow_other", ""):
        try:
            mount(source, target, f"fuse.{fstype}", lib.MIC_MS_NOSUID | lib.MIC_MS_NODEV, options + extra)
            return fd
        except NamespaceError as e:
            refusal = e
    os.close(fd)
    return _fusermount(target, source, fstype, refusal)


def _fusermount(target: str, source: str, fstype: str, refusal: OSError) -> int:
    helper = mount_helper()
    if helper is None:
        raise OSError(
            refusal.errno,
            f"{target}: the kernel refuses the mount ({refusal.strerror}) and there is no fusermount3: install fuse3; "
            "micemu sysfs ls, cat and write need no FUSE",
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [
            helper,
            "-o",
            f"fsname={source},subtype={fstype},default_permissions,nosuid,nodev",
            "--",
            target,
        ]
        done = subprocess.run(
            words, env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, pass_fds=[theirs.fileno()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            why = done.stderr.strip().removeprefix(f"{helper}: ") or f"{helper} failed"
            nameless = "username" in why
            fix = f" (user {os.getuid()} needs a line in /etc/passwd)" if nameless else ""
            raise OSError(
                errno.EPERM,
                f"{target}: fusermount3: {why}{fix}; micemu sysfs ls, cat and write need no mount",
            )
        ours.settimeout(5.0)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(4))
        return array.array("i", ancillary[0][2][:4])[0]


@dataclass(frozen=True)
class Mount:
    """A line of the mount table. ``device`` (``0:45``) is the file system's own as long as anybody has it mounted."""

    target: str
    device: str
    fstype: str
    source: str
    user: int | None  # who made it, of a FUSE mount


def mount_table() -> list[Mount]:
    """The mounts of this process's mount namespace; of two at the same place the upper one comes later."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            place, _, kind = line.rstrip("\n").partition(" - ")
            _, _, device, _, target, *_ = place.split(" ")
            fstype, source, options = kind.split(" ", 2)
            user = re.search(r"(?:^|,)user_id=(\d+)", options)
            target = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), target)
            found.append(Mount(target, device, fstype, source, int(user[1]) if user else None))
    return found


def topmost(target: str) -> Mount | None:
    """What is mounted at ``target``, an absolute, real path."""
    return next((m for m in reversed(mount_table()) if m.target == target), None)


def has_no_server(target: str) -> bool:
    """Has whoever served the FUSE mount at ``target`` gone? A server that hangs is there: asked by a child, with a limit."""
    child = os.fork()
    if child == 0:
        number: int | None = 0
        try:
            os.statvfs(target)
        except OSError as e:
            number = e.errno
        finally:
            os._exit(1 if number == errno.ENOTCONN else 0)
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], ANSWER_S)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ended)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 1


def unmount(target: str) -> None:
    """Take the mount away, busy or not; nothing when there is none."""
    if lib.mic_ns_detach(os.fsencode(target)) < 0:
        helper = mount_helper()
        if helper:
            subprocess.run([helper, "-u", "-z", "-q", target], check=False, capture_output=True)
