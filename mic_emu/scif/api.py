"""SCIF for Python programs: endpoints, windows, RMA, fences, poll.

The same calls as ``scif.h``, with exceptions, context managers and buffers instead of errno, cleanup
and pointers; every ``ScifError`` carries the errno of the real API. Buffers are any object with a
contiguous buffer (bytes, bytearray, memoryview, numpy array); they are never copied on the way.

An ``Endpoint`` is a file descriptor (``fileno``): it works with select, poll, epoll and asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import mmap as _mmap
import os
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from mic_emu._native import ffi, lib
from mic_emu.memory import PAGE, page_align
from mic_emu.scif.errors import ScifError

PROT_READ, PROT_WRITE = 1, 2
MAP_FIXED = 0x10
RMA_USECPU, RMA_USECACHE, RMA_SYNC, RMA_ORDERED = 1, 2, 4, 8
FENCE_INIT_SELF, FENCE_INIT_PEER, SIGNAL_LOCAL, SIGNAL_REMOTE = 1, 2, 0x10, 0x20
POLLIN, POLLOUT, POLLERR, POLLHUP, POLLNVAL = 1, 4, 8, 0x10, 0x20
INT_MAX = 2**31 - 1

T = TypeVar("T")
_scif_send = lib.scif_send  # send is the call that is made most: one look-up less


class PortID(NamedTuple):
    """A port on a node; node 0 is the host, node n + 1 the card micn."""

    node: int
    port: int


def _fail(what: str) -> ScifError:
    return ScifError(ffi.errno, what)


def _check(rc: int, what: str) -> int:
    if rc < 0:
        raise _fail(what)
    return rc


def _check_open(rc: int, what: str) -> int:
    """``_check`` of a call that begins with the node's socket: the fix, when nobody listens there."""
    if rc < 0 and ffi.errno == errno.ENOENT:
        what += ": no emulator runs here, start one with micemu boot"
    return _check(rc, what)


def _retry(call: Callable[..., int], endpoint: Endpoint, *args: Any) -> int:
    """Call again when only a signal interrupted it; Python's handlers run in between (PEP 475).

    EINTR is also how ``accept`` ends when another thread closes: the number may be another endpoint's by now.
    """
    while True:
        rc = call(endpoint.fileno(), *args)
        if rc >= 0 or ffi.errno != errno.EINTR:
            return rc


def alloc(nbytes: int) -> _mmap.mmap:
    """Page-aligned zeroed memory of at least ``nbytes``, for windows."""
    return _mmap.mmap(-1, page_align(nbytes), flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS)


class Window:
    """A registered window: ``offset`` and ``length`` in bytes, in the address space of ``endpoint``."""

    def __init__(self, endpoint: Endpoint, buffer: object, offset: int, length: int) -> None:
        self.endpoint = endpoint
        self.buffer = buffer  # kept alive: windows outlive names
        self.offset = offset
        self.length = length

    def unregister(self) -> None:
        """Remove the window. Raises ScifError (SCIF 2.11)."""
        _check(lib.scif_unregister(self.endpoint.fileno(), self.offset, self.length), "unregister")

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self.endpoint.closed:
            try:
                self.unregister()
            except ScifError as e:
                if e.errno != errno.ECONNRESET:  # the peer has closed: it goes with the endpoint
                    raise


class Mapping:
    """The peer's pages in this process: ``view`` is a memoryview of them, live in both directions.

    They are unmapped when nothing refers to them any more: neither ``view`` nor an array made of it.
    """

    def __init__(self, pointer: Any, length: int, writable: bool) -> None:
        buffer = ffi.buffer(pointer, length)
        weakref.finalize(buffer, lib.scif_munmap, pointer, length).atexit = False  # type: ignore[misc]  # a property
        view = memoryview(buffer)
        self.view = view if writable else view.toreadonly()

    def close(self) -> None:
        """Release ``view`` and unmap; arrays made of it, as by ``numpy.frombuffer``, keep the pages until they go."""
        view, self.view = self.view, memoryview(b"")
        self.view.release()
        with contextlib.suppress(BufferError):  # held by an object of ctypes, for one: it goes with that
            view.release()

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Endpoint:
    """A SCIF endpoint. ``fd``: take over a descriptor (accepted, inherited) instead of opening one.

    Like a socket it is closed with its last reference, with a ResourceWarning: better use ``with``.
    """

    _fd = -1  # also when __init__ fails

    def __init__(self, fd: int | None = None) -> None:
        self._waiting: tuple[list[asyncio.Future[None]], list[asyncio.Future[None]]] = ([], [])
        self._given_up = False  # aconnect was cancelled
        self._sending: tuple[object, asyncio.Lock] = (None, asyncio.Lock())  # an event loop's turns to send
        self._fd = _check_open(lib.scif_open(), "open") if fd is None else fd

    def fileno(self) -> int:
        """The descriptor."""
        if self._fd < 0:
            raise ScifError(errno.EBADF, "closed endpoint")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close; twice is fine. Tasks that wait for the endpoint get ScifError EBADF."""
        if self._fd < 0:
            return
        for writable, waiting in enumerate(self._waiting):
            for task in waiting:
                self._unwatch(task.get_loop(), bool(writable))
                _finish(task)
        fd, self._fd = self._fd, -1
        if self._given_up:
            os.close(fd)  # scif_close waits for a connect that nobody has accepted yet
        else:
            _check(lib.scif_close(fd), "close")

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            os.close(self._fd)  # never waits

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<scif endpoint, descriptor {self._fd}>"

    def __getstate__(self) -> None:
        """A copy would close the same descriptor."""
        raise TypeError(
            "cannot copy or pickle a scif endpoint: it is a descriptor; Endpoint(os.dup(e.fileno()))"
        )

    # --- connections ------------------------------------------------------------------------------

    def bind(self, port: int = 0) -> int:
        """Take ``port``, 0 = any; returns it. Raises ScifError EACCES, EINVAL, EISCONN, ENOSPC."""
        return _check(lib.scif_bind(self.fileno(), port), f"bind port {port}")

    def listen(self, backlog: int = 16) -> None:
        """Accept connections, at most ``backlog`` waiting."""
        _check(lib.scif_listen(self.fileno(), backlog), "listen")

    def accept(self, *, block: bool = True) -> tuple[Endpoint, PortID]:
        """The next connection and its peer. Raises ScifError EAGAIN (not ``block``), EINVAL."""
        peer, new = ffi.new("struct scif_portID *"), ffi.new("int *")
        _check(_retry(lib.scif_accept, self, peer, new, int(block)), "accept")
        return Endpoint(new[0]), PortID(peer.node, peer.port)

    def connect(self, address: tuple[int, int]) -> int:
        """Connect to ``(node, port)``; returns the local port once the peer has accepted.

        Raises ScifError ECONNREFUSED, ENODEV; EINPROGRESS after ``setblocking(False)``: call again
        when the endpoint is writable.
        """
        to = ffi.new("struct scif_portID *", address)
        return _check(lib.scif_connect(self.fileno(), to), f"connect to {address[0]}:{address[1]}")

    def setblocking(self, flag: bool) -> None:
        """Whether ``connect`` waits; the other calls have their own ``block``."""
        os.set_blocking(self.fileno(), flag)

    # --- messages ---------------------------------------------------------------------------------

    def send(self, data: Any, *, block: bool = True) -> int:
        """Send a buffer; returns the bytes taken: all of them, or with ``block`` False what fits now."""
        buf = data if type(data) is bytes else ffi.from_buffer(data)  # bytes go as they are: half the cost
        n: int = _scif_send(self._fd, buf, len(buf), 1 if block else 0)
        if n >= 0:
            return n
        if ffi.errno == errno.EINTR:
            return _check(_retry(lib.scif_send, self, buf, len(buf), int(block)), "send")
        raise _fail("send")

    def recv_into(self, buffer: Any, *, block: bool = True) -> int:
        """Fill a writable buffer; returns the bytes received: all of it, or with ``block`` False what is
        there, 0 when nothing is. Raises ScifError ECONNRESET once everything is drained."""
        buf = ffi.from_buffer(buffer, require_writable=True)
        return _check(_retry(lib.scif_recv, self, buf, len(buf), int(block)), "recv")

    def recv(self, nbytes: int, *, block: bool = True) -> bytes:
        """Up to ``nbytes`` as bytes; the same rules as ``recv_into``."""
        out = bytearray(nbytes)
        return bytes(out[: self.recv_into(out, block=block)]) if nbytes else b""

    # --- windows ----------------------------------------------------------------------------------

    def register(self, buffer: Any, offset: int | None = None, prot: int = PROT_READ | PROT_WRITE) -> Window:
        """Expose page-aligned memory, whole pages, to the peer.

        offset: fixed window offset in bytes, or None to let the node choose.
        Raises ScifError EINVAL (alignment), EADDRINUSE, ENOTCONN, ENOMEM, EFAULT (SCIF 2.10).
        """
        buf = ffi.from_buffer(buffer, require_writable=bool(prot & PROT_WRITE))
        flags = 0 if offset is None else MAP_FIXED
        at = lib.scif_register(self.fileno(), buf, len(buf), offset or 0, prot, flags)
        if at < 0:
            hint = (
                " (memory in whole pages: scif.alloc)" if ffi.errno == errno.EINVAL and offset is None else ""
            )
            raise _fail(f"register{hint}")
        return Window(self, buf, at, len(buf))

    def mmap(self, offset: int, length: int, prot: int = PROT_READ | PROT_WRITE) -> Mapping:
        """Map the peer's windows at ``offset``. Raises ScifError ENXIO, EPERM (SCIF 2.12)."""
        pointer = lib.scif_mmap(ffi.NULL, length, prot, 0, self.fileno(), offset)
        if int(ffi.cast("intptr_t", pointer)) == -1:
            raise _fail("mmap")
        return Mapping(pointer, length, bool(prot & PROT_WRITE))

    def readfrom(self, loffset: int, length: int, roffset: int, flags: int = RMA_SYNC) -> None:
        """Copy from the peer's window at ``roffset`` into our own at ``loffset`` (SCIF 2.13).

        flags 0: a large copy may still be under way on return; ``fence_mark`` and ``fence_wait`` tell when not.
        """
        _check(lib.scif_readfrom(self.fileno(), loffset, length, roffset, flags), "readfrom")

    def writeto(self, loffset: int, length: int, roffset: int, flags: int = RMA_SYNC) -> None:
        """Copy from our window at ``loffset`` into the peer's at ``roffset``; flags as for ``readfrom``."""
        _check(lib.scif_writeto(self.fileno(), loffset, length, roffset, flags), "writeto")

    def vreadfrom(self, buffer: Any, offset: int, flags: int = RMA_SYNC) -> None:
        """Fill a writable buffer from the peer's window at ``offset``."""
        buf = ffi.from_buffer(buffer, require_writable=True)
        _check(lib.scif_vreadfrom(self.fileno(), buf, len(buf), offset, flags), "vreadfrom")

    def vwriteto(self, buffer: Any, offset: int, flags: int = RMA_SYNC) -> None:
        """Copy a buffer into the peer's window at ``offset``."""
        buf = ffi.from_buffer(buffer)
        _check(lib.scif_vwriteto(self.fileno(), buf, len(buf), offset, flags), "vwriteto")

    # --- fences -----------------------------------------------------------------------------------

    def fence_mark(self, flags: int = FENCE_INIT_SELF) -> int:
        """A mark for everything copied so far by us (INIT_SELF) or by the peer (INIT_PEER)."""
        mark = ffi.new("int *")
        _check(lib.scif_fence_mark(self.fileno(), flags, mark), "fence_mark")
        return int(mark[0])

    def fence_wait(self, mark: int) -> None:
        """Wait until what ``mark`` stands for is complete. Raises ScifError ETIMEDOUT, EINVAL."""
        _check(_retry(lib.scif_fence_wait, self, mark), "fence_wait")

    def fence_signal(self, loff: int, lval: int, roff: int, rval: int, flags: int) -> None:
        """Write 64-bit values once everything before is complete; see the table of SCIF 2.15."""
        _check(lib.scif_fence_signal(self.fileno(), loff, lval, roff, rval, flags), "fence_signal")

    # --- asyncio ----------------------------------------------------------------------------------

    async def _ready(self, writable: bool) -> None:
        """Until the descriptor is ready; of several tasks each may then find that another was faster."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        waiting = self._waiting[writable]
        waiting.append(done)
        if len(waiting) == 1:
            (loop.add_writer if writable else loop.add_reader)(self.fileno(), _finish_all, waiting)
        try:
            await done
        finally:
            waiting.remove(done)
            if not waiting and not self.closed:
                self._unwatch(loop, writable)

    def _unwatch(self, loop: asyncio.AbstractEventLoop, writable: bool) -> None:
        (loop.remove_writer if writable else loop.remove_reader)(self._fd)

    async def aconnect(self, address: tuple[int, int]) -> int:
        """``connect`` in an event loop. Close the endpoint after a cancellation: the attempt goes on meanwhile."""
        self.setblocking(False)
        try:
            while True:
                try:
                    return self.connect(address)
                except ScifError as e:
                    if e.errno != errno.EINPROGRESS:
                        raise
                await self._ready(writable=True)
        except asyncio.CancelledError:
            self._given_up = True
            raise
        finally:
            if not self.closed:
                self.setblocking(True)

    async def aaccept(self) -> tuple[Endpoint, PortID]:
        """``accept`` in an event loop."""
        while True:
            try:
                return self.accept(block=False)
            except ScifError as e:
                if e.errno != errno.EAGAIN:
                    raise
            await self._ready(writable=False)

    async def asend(self, data: Any) -> int:
        """``send`` of everything in an event loop; what several tasks send stays in one piece each (SCIF-68)."""
        view, done = memoryview(data).cast("B"), 0
        loop = asyncio.get_running_loop()
        if self._sending[0] is not loop:
            self._sending = loop, asyncio.Lock()
        async with self._sending[1]:
            while done < len(view):
                n = self.send(view[done:], block=False)
                done += n
                if not n:
                    await self._ready(writable=True)
        return done

    async def arecv(self, nbytes: int) -> bytes:
        """At least one and up to ``nbytes`` bytes in an event loop; b"" once the peer has closed."""
        while True:
            try:
                data = self.recv(nbytes, block=False)
            except ScifError as e:
                if e.errno == errno.ECONNRESET:
                    return b""
                raise
            if data or not nbytes:
                return data
            await self._ready(writable=False)


def _finish(task: asyncio.Future[None]) -> None:
    if not task.done():
        task.set_result(None)


def _finish_all(waiting: list[asyncio.Future[None]]) -> None:
    for task in waiting:
        _finish(task)


def poll(items: Sequence[tuple[Endpoint | int, int]], timeout_s: float | None = None) -> list[int]:
    """``scif_poll``: exact masks, one per (endpoint or descriptor, events); all 0 after the time-out."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    epds = ffi.new("struct scif_pollepd[]", len(items))
    while True:
        for e, (target, events) in zip(epds, items, strict=True):
            e.epd = target if isinstance(target, int) else target.fileno()
            e.events = events
        left = (
            0 if deadline is None else max(0, math.ceil((deadline - time.monotonic()) * 1000))
        )  # never early
        n = lib.scif_poll(epds, len(items), -1 if deadline is None else min(left, INT_MAX))
        if n > 0 or (n == 0 and left <= INT_MAX):
            return [int(e.revents) for e in epds]
        if n < 0 and ffi.errno != errno.EINTR:  # as _retry, with the time that is left
            raise _fail("poll")


def get_node_ids() -> tuple[list[int], int]:
    """(online nodes ascending, this one included; our own id). Raises ScifError ENOENT: no emulator."""
    ids, own = ffi.new("uint16_t[256]"), ffi.new("uint16_t *")
    n = _check_open(lib.scif_get_nodeIDs(ids, 256, own), "get_node_ids")
    return [int(i) for i in ids[0 : min(n, 256)]], int(own[0])


__all__ = ["PAGE", "Endpoint", "Mapping", "PortID", "ScifError", "Window", "alloc", "get_node_ids", "poll"]
