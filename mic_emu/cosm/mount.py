"""The mounted sysfs tree: a client of the host process's control socket (COSM 6, 7).

One process per mount. It ends when the instance ends or the mount is taken away; a small guardian process
takes away what is left of the mount then, and if the server is killed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mic_emu import namespaces
from mic_emu._native import lib
from mic_emu.cosm.fuse import Server, Stat
from mic_emu.cosm.mounting import Mount, has_no_server, mount_at, mount_table, topmost, unmount
from mic_emu.wire import WireError, connect_unix
from mic_emu.wire_aio import AsyncChannel

LIST_AGE_S = 0.1
PAGE = 4096
SOURCE, FSTYPE = "micemu", "sysfs"
FOLDERS = ("class", "class/mic", "devices", "devices/micemu")  # also without a card


class RemoteTree:
    """The files as the host process tells."""

    def __init__(self, control: Path) -> None:
        self._control = str(control)
        self._files: dict[str, tuple[int, str]] = {}
        self._read_at = float("-inf")
        self._events: dict[str, int] = {}  # card -> count of state changes

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request. Raises OSError with the host's errno; ENODEV when the instance is gone."""
        try:
            channel = AsyncChannel(connect_unix(self._control))
        except OSError as e:
            raise OSError(errno.ENODEV, "the emulator is gone") from e
        async with channel:
            await channel.send({"op": op, **fields})
            msg = await channel.recv_words(None, f"the host's answer to {op!r}")
        if "error" in msg:
            raise OSError(msg.get("errno") or errno.EIO, msg["error"])
        return msg

    async def _list(self) -> dict[str, tuple[int, str]]:
        if time.monotonic() - self._read_at > LIST_AGE_S:
            msg = await self._ask("sysfs_list")
            self._files = {path: (mode, wakes) for path, (mode, wakes) in msg["files"].items()}
            self._read_at = time.monotonic()
        return self._files

    def _file(self, path: str, mode: int) -> Stat:
        return Stat(
            mode if stat.S_IFMT(mode) else stat.S_IFREG | mode,
            0 if path.startswith("kernel/debug") else PAGE,
        )

    async def stat(self, path: str) -> Stat:
        files = await self._list()
        if path in files:
            return self._file(path, files[path][0])
        if path == "" or any(f.startswith(path + "/") for f in files) or path in FOLDERS:
            return Stat(stat.S_IFDIR | 0o755)
        raise OSError(errno.ENOENT, path)

    async def names(self, path: str) -> dict[str, Stat]:
        prefix = path + "/" if path else ""
        found: dict[str, Stat] = {}
        for name, (mode, _) in (await self._list()).items():
            if name.startswith(prefix):
                head, slash, _ = name.removeprefix(prefix).partition("/")
                found[head] = Stat(stat.S_IFDIR | 0o755) if slash else self._file(name, mode)
        return found

    async def read(self, path: str) -> bytes:
        try:
            data: str = (await self._ask("sysfs_read", path=path))["data"]
        except OSError as e:
            raise self._gone(e) from e
        return data.encode("latin-1")

    async def write(self, path: str, data: bytes) -> int:
        try:
            await self._ask("sysfs_write", path=path, data=data[:PAGE].decode("latin-1"))
        except OSError as e:
            raise self._gone(e) if path not in self._files else e from e
        return min(len(data), PAGE)

    def _gone(self, e: OSError) -> OSError:
        """An open file whose card was removed (COSM 5.7)."""
        return OSError(errno.ENODEV, "the card is gone") if e.errno == errno.ENOENT else e

    def event(self, path: str) -> int:
        wakes = self._files.get(path, (0, ""))[1]
        return self._events.get(wakes, 0) if wakes else 0

    async def follow(self, changed: Callable[[], None]) -> None:
        """Keep the event counts up to date until the instance ends."""
        async with AsyncChannel(connect_unix(self._control)) as channel:
            await channel.send({"op": "sysfs_watch"})
            while True:
                msg = await channel.recv_words(None, "a change of a card's state")
                if "card" not in msg:
                    return
                self._events[msg["card"]] = msg["changes"]
                changed()


def _ours(mount: Mount | None) -> bool:
    return mount is not None and (mount.source, mount.fstype) == (SOURCE, f"fuse.{FSTYPE}")


def is_mounted(target: str) -> bool:
    """Is a tree of ours mounted at this (absolute, real) path?"""
    return _ours(topmost(target))


def abandoned() -> list[str]:
    """Where trees of this user are mounted that nobody serves: server and guardian were killed together."""
    mine = {m.target for m in mount_table() if _ours(m) and m.user == os.getuid()}
    return sorted(target for target in mine if has_no_server(target))


def clear(target: str) -> None:
    """Make room at ``target``: a tree of ours that nobody serves any more is taken away."""
    if is_mounted(target) and has_no_server(target):
        unmount(target)


async def serve(fd: int, control: Path, device: str = "") -> bool:
    """Answer until the instance ends, False, or the mount is taken away, True: from this mount namespace, by ``device``
    (``Mount.device``), or from all."""
    tree = RemoteTree(control)
    server = Server(fd, tree)
    server.start()
    follow = asyncio.ensure_future(tree.follow(server.notify))
    end = asyncio.ensure_future(server.done.wait())
    loop = asyncio.get_running_loop()
    with open("/proc/self/mountinfo", "rb") as table, select.epoll() as changes:

        def look() -> None:
            changes.poll(0)  # takes the event
            if not any(m.device == device for m in mount_table()):
                loop.remove_reader(changes.fileno())
                server.detach()

        if device:
            changes.register(table, select.EPOLLPRI)
            loop.add_reader(changes.fileno(), look)
            look()  # it may be gone already
        try:
            await asyncio.wait({follow, end}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(changes.fileno())
            for task in (follow, end):
                task.cancel()
            await asyncio.gather(follow, end, return_exceptions=True)
            server.close()
    return server.unmounted


def _remove(device: str) -> None:
    """Take the mount away, wherever it is now; what lies above it, or in its place, is somebody else's."""
    for mount in mount_table():
        if mount.device == device and topmost(mount.target) == mount:
            unmount(mount.target)


def run(target: str, control: Path, foreground: bool) -> None:
    """Mount the tree at ``target`` and serve it, in the background unless ``foreground``. Raises OSError."""
    fd = mount_at(target, SOURCE, FSTYPE)
    mount = topmost(target)
    device = mount.device if mount else ""
    if not foreground:
        if os.fork():
            os.close(fd)
            return
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for n in range(3):
            os.dup2(null, n)
    server = os.fork()
    if (
        server
    ):  # this is the guardian; it holds nothing of the mount and outlives whatever happens to the server
        os.close(fd)
        _, status = os.waitpid(server, 0)
        if status != 0:
            _remove(device)
        if not foreground:
            os._exit(0)
        return
    unmounted = False
    try:
        os.chdir("/")
        unmounted = asyncio.run(serve(fd, control, device))
    except (OSError, WireError, KeyboardInterrupt):
        pass
    finally:
        os._exit(0 if unmounted else 1)


def _make_room(path: str) -> None:
    """An empty directory at ``path``, where sysfs has none: a tmpfs takes its parent's place, with what is in it."""
    parent, own = os.path.split(path)
    was = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    names = [n for n in os.listdir(parent) if n != own]
    namespaces.mount("micemu", parent, "tmpfs", lib.MIC_MS_NOSUID | lib.MIC_MS_NODEV, "mode=755")
    for name in names:
        os.mkdir(f"{parent}/{name}")
        namespaces.mount(
            f"/proc/self/fd/{was}/{name}", f"{parent}/{name}", None, lib.MIC_MS_BIND | lib.MIC_MS_REC
        )
    os.close(was)
    os.mkdir(path)


def become(argv: list[str], control: Path) -> NoReturn:
    """Become ``argv`` in a mount namespace of its own that has the tree at /sys/class/mic and /sys/kernel/debug.

    The server is a child that dies with the program. Raises OSError, NamespaceError.
    """
    if lib.mic_ns_unshare(lib.MIC_NS_MNT) < 0:
        namespaces.create(("user", "mnt"))  # not root: of our own user namespace
    namespaces.mount(None, "/", None, lib.MIC_MS_REC | lib.MIC_MS_PRIVATE)
    staging, ours = "/sys/class/.micemu", {"class/mic", "devices/micemu"}
    for path in ours:
        _make_room(f"/sys/{path}")
    os.mkdir(staging)
    fd = mount_at(staging, SOURCE, FSTYPE)
    me = os.getpid()
    if os.fork() == 0:
        try:
            lib.mic_proc_die_with_parent(me)
            asyncio.run(serve(fd, control))
        finally:
            os._exit(0)
    os.close(fd)
    if os.path.isdir("/sys/kernel/debug"):
        ours.add("kernel/debug")
    for path in ours:
        namespaces.mount(f"{staging}/{path}", f"/sys/{path}", None, lib.MIC_MS_BIND)
    os.execvp(argv[0], argv)
