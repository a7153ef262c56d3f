"""The kernel's FUSE protocol, as much as a small tree of attribute files needs.

No library: the protocol is a read and a write per request on ``/dev/fuse``, and none of the Python
bindings offers ``poll`` with priority events, which is what ``/sys/class/mic/micN/state`` is about.
Structures are those of the kernel's <linux/fuse.h>, interface version 7.31.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

VERSION = (7, 31)
ROOT = 1
BUFFER = 1 << 17
MAX_WRITE = 1 << 16
INTERRUPT_S = 1.0  # how long a request whose caller was interrupted may go on
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_NOTIFY_POLL, _SCHEDULE_NOTIFY, _DIRECT_IO = 1, 1, 1
(LOOKUP, FORGET, GETATTR, SETATTR, READLINK, OPEN, READ, WRITE, STATFS, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR,
 INTERRUPT, DESTROY, POLL, BATCH_FORGET) = (1, 2, 3, 4, 5, 14, 15, 16, 17, 18, 26, 27, 28, 29, 36, 38, 40, 42)  # fmt: skip
# Making and removing things, as sysfs answers it.
_REFUSED = {
    8: errno.EPERM, 9: errno.EPERM, 10: errno.EPERM, 11: errno.EPERM, 12: errno.EPERM, 6: errno.EPERM,
    13: errno.EPERM, 35: errno.EACCES, 45: errno.EPERM,
}  # fmt: skip


@dataclass(frozen=True)
class Stat:
    """What ``stat`` shows. ``mode`` with the type bits; ``size`` in bytes."""

    mode: int
    size: int = 0


class Tree(Protocol):
    """The files. Paths are relative, "" is the root; every method may raise OSError for the caller.

    ``read`` of a symbolic link is its target.
    """

    async def stat(self, path: str) -> Stat: ...
    async def names(self, path: str) -> dict[str, Stat]: ...
    async def read(self, path: str) -> bytes: ...
    async def write(self, path: str, data: bytes) -> int: ...
    def event(self, path: str) -> int:
        """A number that changes with every wake-up of the file's pollers."""


@dataclass
class Handle:
    """An open file: its content as of the last read from the start, and the event seen then."""

    path: str
    content: bytes = b""
    seen: int = 0
    poller: int = -1  # the kernel's handle of whoever waits


class Server:
    """Answers one mount on ``fd`` until it is unmounted."""

    def __init__(self, fd: int, tree: Tree) -> None:
        self.fd = fd
        self.tree = tree
        self.done = asyncio.Event()
        self.unmounted = False  # by somebody; what is open then may be read to its end
        self._paths: dict[int, str] = {ROOT: ""}
        self._nodes: dict[str, int] = {"": ROOT}
        self._handles: dict[int, Handle] = {}
        self._next = 1
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._handlers: dict[int, Callable[[int, bytes], Awaitable[bytes]]] = {
            LOOKUP: self._lookup, GETATTR: self._getattr, SETATTR: self._getattr, OPEN: self._open, READLINK: self._readlink,
            READ: self._read, WRITE: self._write, STATFS: self._statfs, RELEASE: self._release,
            OPENDIR: self._opendir, READDIR: self._readdir, RELEASEDIR: self._release, INIT: self._init, POLL: self._poll,
        }  # fmt: skip

    def start(self) -> None:
        """Serve in the running loop."""
        os.set_blocking(self.fd, False)
        asyncio.get_running_loop().add_reader(self.fd, self._ready)

    def close(self) -> None:
        """Stop serving; requests in work are cut off."""
        asyncio.get_running_loop().remove_reader(self.fd)
        for task in self._tasks.values():
            task.cancel()
        self.done.set()

    def detach(self) -> None:
        """The mount has been taken away here. Another mount namespace may keep it, a card's say: nobody is served for that."""
        self.unmounted = True
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self.unmounted and not self._handles:
            self.done.set()

    def notify(self) -> None:
        """Wake the pollers whose file has a new event."""
        for handle in self._handles.values():
            if handle.poller >= 0 and handle.seen != self.tree.event(handle.path):
                self._send(_OUT.pack(_OUT.size + 8, _NOTIFY_POLL, 0) + struct.pack("<Q", handle.poller))
                handle.poller = -1

    # --- requests ---------------------------------------------------------------------------------

    def _ready(self) -> None:
        while True:
            try:
                request = os.read(self.fd, BUFFER)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.EINTR):  # the caller was interrupted before we saw it
                    continue
                self.unmounted = True  # ENODEV
                self.close()
                return
            self._dispatch(request)

    def _dispatch(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        body = request[_IN.size :]
        if opcode in (FORGET, BATCH_FORGET):
            return
        if opcode == INTERRUPT:
            # Stopped and continued, a program sees nothing of it, as with sysfs; one that is killed while we hang goes.
            if task := self._tasks.get(struct.unpack_from("<Q", body)[0]):
                asyncio.get_running_loop().call_later(INTERRUPT_S, task.cancel)
            return
        handler = self._handlers.get(opcode)
        if handler is None:
            self._reply(unique, -_REFUSED.get(opcode, errno.ENOSYS))
            return
        task = asyncio.ensure_future(self._serve(unique, handler(node, body)))
        self._tasks[unique] = task
        task.add_done_callback(lambda task: self._ended(unique, task))

    def _ended(self, unique: int, task: asyncio.Task[None]) -> None:
        del self._tasks[unique]
        if task.cancelled():
            # Perhaps before its first step: without an answer the program would wait for ever.
            self._reply(unique, -errno.EINTR)

    async def _serve(self, unique: int, work: Awaitable[bytes]) -> None:
        try:
            self._reply(unique, 0, await work)
        except OSError as e:
            self._reply(unique, -(e.errno or errno.EIO))
        except Exception:
            self._reply(unique, -errno.EIO)
            raise

    def _reply(self, unique: int, error: int, body: bytes = b"") -> None:
        self._send(_OUT.pack(_OUT.size + len(body), error, unique) + body)

    def _send(self, message: bytes) -> None:
        try:
            os.write(self.fd, message)
        except OSError:
            pass  # the caller is gone, or the mount

    def _path(self, node: int) -> str:
        try:
            return self._paths[node]
        except KeyError:
            raise OSError(errno.ESTALE, "unknown node") from None

    def _node(self, path: str) -> int:
        node = self._nodes.get(path)
        if node is None:
            node = self._nodes[path] = len(self._nodes) + ROOT
            self._paths[node] = path
        return node

    def _attr(self, path: str, st: Stat) -> bytes:
        links = 2 if stat.S_ISDIR(st.mode) else 1
        return _ATTR.pack(
            self._node(path),
            st.size,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            st.mode,
            links,
            os.getuid(),
            os.getgid(),
            0,
            4096,
            0,
        )

    def _handle(self, body: bytes) -> Handle:
        try:
            return self._handles[struct.unpack_from("<Q", body)[0]]
        except KeyError:
            raise OSError(errno.EBADF, "unknown handle") from None

    # --- operations: node, body of the request; the body of the answer -----------------------------

    async def _init(self, node: int, body: bytes) -> bytes:
        readahead = struct.unpack_from("<4I", body)[2]
        return struct.pack("<4I2H2I2HI28x", *VERSION, readahead, 0, 16, 12, MAX_WRITE, 1, 0, 0, 0)

    async def _lookup(self, node: int, body: bytes) -> bytes:
        name = os.fsdecode(body.partition(b"\0")[0])
        base = self._path(node)
        path = f"{base}/{name}" if base else name
        st = await self.tree.stat(path)
        return struct.pack("<4Q2I", self._node(path), 0, 0, 0, 0, 0) + self._attr(path, st)

    async def _getattr(self, node: int, body: bytes) -> bytes:
        """Also SETATTR: a truncation by ``>`` changes nothing here."""
        path = self._path(node)
        return struct.pack("<QII", 0, 0, 0) + self._attr(path, await self.tree.stat(path))

    async def _readlink(self, node: int, body: bytes) -> bytes:
        return await self.tree.read(self._path(node))

    async def _open(self, node: int, body: bytes) -> bytes:
        flags, path = struct.unpack_from("<I", body)[0], self._path(node)
        st = await self.tree.stat(path)
        if flags & os.O_ACCMODE != os.O_RDONLY and not st.mode & 0o200:
            raise OSError(errno.EACCES, "read-only, for root too")
        return self._opened(path)

    def _opened(self, path: str) -> bytes:
        number, self._next = self._next, self._next + 1
        self._handles[number] = Handle(
            path, seen=-1
        )  # as sysfs: who polls without having read is woken at once
        return struct.pack("<QII", number, _DIRECT_IO, 0)

    async def _opendir(self, node: int, body: bytes) -> bytes:
        return self._opened(self._path(node))

    async def _release(self, node: int, body: bytes) -> bytes:
        self._handles.pop(struct.unpack_from("<Q", body)[0], None)
        self._end_if_unused()
        return b""

    async def _read(self, node: int, body: bytes) -> bytes:
        """A read from the start takes a fresh content and counts as seen; the rest belongs to it."""
        handle = self._handle(body)
        _, offset, size = struct.unpack_from("<QQI", body)
        if offset == 0:
            handle.seen = self.tree.event(handle.path)
            handle.content = await self.tree.read(handle.path)
        return handle.content[offset : offset + size]

    async def _write(self, node: int, body: bytes) -> bytes:
        size = struct.unpack_from("<QQI", body)[2]
        taken = await self.tree.write(self._handle(body).path, body[40 : 40 + size])
        return struct.pack("<II", taken, 0)

    async def _statfs(self, node: int, body: bytes) -> bytes:
        return struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)

    async def _readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        base = self._path(node)
        here = {".": Stat(stat.S_IFDIR), "..": Stat(stat.S_IFDIR), **await self.tree.names(base)}
        out = b""
        for n, (name, st) in enumerate(here.items(), 1):
            if n <= offset:
                continue
            path = f"{base}/{name}" if base else name
            raw = os.fsencode(name)
            ino = self._node(base if name in (".", "..") else path)
            entry = struct.pack("<QQII", ino, n, len(raw), stat.S_IFMT(st.mode) >> 12) + raw
            entry += b"\0" * (-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    async def _poll(self, node: int, body: bytes) -> bytes:
        """As kernfs: always readable and writable; POLLERR and POLLPRI when there was an event since the
        last read from the start."""
        handle = self._handle(body)
        _, kernel_handle, flags, _ = struct.unpack_from("<QQII", body)
        revents = 0x145  # IN OUT RDNORM WRNORM
        if handle.seen != self.tree.event(handle.path):
            revents |= 0xA  # PRI ERR
        elif flags & _SCHEDULE_NOTIFY:
            handle.poller = kernel_handle
        return struct.pack("<II", revents, 0)
