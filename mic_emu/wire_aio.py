"""The asyncio side of ``wire``: channels and servers of processes with an event loop.

Apart from ``wire`` so that a short command does not pay for the import of asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from mic_emu.clock import wait_for
from mic_emu.peers import admitted, group_of
from mic_emu.wire import (
    SEND_TIMEOUT_S,
    BaseChannel,
    Message,
    PeerClosed,
    WireError,
    WireTimeout,
    encode,
    listen_unix,
)


class AsyncChannel(BaseChannel):
    """Channel for asyncio: one task receives, any number of tasks send."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._sending = asyncio.Lock()

    async def __aenter__(self) -> AsyncChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def send(
        self, msg: Message, fds: Sequence[int] = (), timeout_s: float | None = SEND_TIMEOUT_S
    ) -> None:
        """As ``Channel.send``. A send that was cut short (time-out, cancelled) ends the connection,
        because the peer could not tell where the next message begins."""
        rest = memoryview(encode(msg, len(fds)))
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        why = f"the peer did not read a message of ours within {timeout_s} s"
        async with self._sending:
            begun = False
            try:
                while rest:
                    n = self._push(rest, fds)
                    if n:
                        rest, fds, begun = rest[n:], (), True
                    else:
                        await self._ready(True, deadline, why)
            except (WireTimeout, asyncio.CancelledError):
                if begun:
                    with contextlib.suppress(OSError):  # closed meanwhile
                        self.sock.shutdown(socket.SHUT_RDWR)
                raise

    async def recv(self, timeout_s: float | None, what: str) -> tuple[Message, list[int]]:
        """As ``Channel.recv``; a cancelled call loses nothing."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (got := self._inbox.take()) is None:
            if not self._inbox.fill(self.sock):
                await self._ready(False, deadline, f"{what}: nothing came within {timeout_s} s")
        return got

    async def recv_words(self, timeout_s: float | None, what: str) -> Message:
        """As ``recv``, of a peer who has no reason to send descriptors: those that come along are closed."""
        msg, fds = await self.recv(timeout_s, what)
        for fd in fds:
            os.close(fd)
        return msg

    async def _ready(self, writing: bool, deadline: float | None, why: str) -> None:
        loop = asyncio.get_running_loop()
        fd = self.sock.fileno()
        if fd < 0:
            raise PeerClosed("the connection was closed on this side")
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        (loop.add_writer if writing else loop.add_reader)(fd, wake)
        try:
            await wait_for(ready, None if deadline is None else deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise WireTimeout(why) from None
        finally:
            if self.sock.fileno() == fd:
                (loop.remove_writer if writing else loop.remove_reader)(fd)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took; wakes nobody, may be repeated."""
        fd = self.sock.fileno()
        if fd >= 0:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                pass
            else:
                loop.remove_reader(fd)
                loop.remove_writer(fd)
        super().close()


Handler = Callable[[AsyncChannel], Awaitable[None]]


class UnixServer:
    """Accepts connections of permitted users and runs one handler task for each."""

    def __init__(self, sock: socket.socket, path: str | None, handler: Handler) -> None:
        self.sock = sock
        self.path = path
        self._handler = handler
        self._group = None if path is None else group_of(path)
        self._tasks: set[asyncio.Task[None]] = set()
        self._short = False  # no descriptor for whoever waits
        self._loop = asyncio.get_running_loop()
        self._id = os.fstat(sock.fileno()).st_ino if path is None else os.lstat(path).st_ino
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            conn, _ = self.sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as e:
            # No descriptor left: look again when the connections that hold them may have gone. Said once per shortage.
            self._loop.remove_reader(self.sock.fileno())
            self._loop.call_later(0.1, self._resume)
            if not self._short:
                self._short = True
                self._loop.call_exception_handler(
                    {"message": f"{self.path}: accept: {e.strerror}", "exception": e}
                )
            return
        self._short = False
        if not admitted(conn, self._group):
            conn.close()
            return
        task = self._loop.create_task(self._serve(AsyncChannel(conn)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _resume(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.add_reader(self.sock.fileno(), self._accept)

    async def _serve(self, channel: AsyncChannel) -> None:
        async with channel:
            try:
                await self._handler(channel)
            except (PeerClosed, WireError, WireTimeout):
                pass  # a peer that dies, talks nonsense, says nothing or does not read ends its own connection only

    async def close(self) -> None:
        """Stop listening, remove the socket's name, end the handlers; may be repeated."""
        if self.sock.fileno() < 0:
            return
        self._loop.remove_reader(self.sock.fileno())
        self.sock.close()
        if self.path is not None:
            try:
                if os.lstat(self.path).st_ino == self._id:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve_unix(path: str, handler: Handler) -> UnixServer:
    """Listen at ``path`` in the running event loop; ``handler`` gets a channel per connection.

    Connections of users who are not ``peers.admitted`` are closed at once.
    Raises OSError as ``listen_unix``.
    """
    return UnixServer(listen_unix(path), path, handler)
