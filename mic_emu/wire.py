"""Messages between the emulator's own processes: JSON lines and descriptors over Unix sockets.

A message is one JSON object on one line, at most ``MAX_MESSAGE`` bytes. Descriptors travel with the
first byte of their message, which says in ``"fds"`` how many they are; they arrive close-on-exec.
``Channel`` blocks with named deadlines, ``AsyncChannel`` is the same for asyncio; neither changes
the socket's blocking mode, which other processes may share.

Bytes of a peer that is broken or hostile end in ``WireError``: every descriptor that it sent and
nobody took is closed, and the channel is of no more use.
"""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import secrets
import select
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

MAX_MESSAGE = 16 << 20  # bytes of one line, the newline included
MAX_FDS = 253  # descriptors of one message: the kernel's SCM_MAX_FD
SEND_TIMEOUT_S = 10.0

_CHUNK = 256 << 10
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
_RECV_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

Message = dict[str, Any]


class WireError(OSError):
    """The peer's bytes are not messages (EPROTO)."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPROTO, why)


class PeerClosed(ConnectionError):
    """The peer closed the connection or died (ECONNRESET)."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.ECONNRESET, why)


class WireTimeout(TimeoutError):
    """What was awaited did not come in time (ETIMEDOUT)."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.ETIMEDOUT, why)


def encode(msg: Message, nfds: int = 0) -> bytes:
    """One line. Raises WireError when it is too long, ValueError when it is not a message."""
    if "fds" in msg:
        raise ValueError('"fds" is the wire\'s own word')
    if nfds > MAX_FDS:
        raise WireError(f"{nfds} descriptors in one message, at most {MAX_FDS} are possible")
    line = json.dumps({**msg, "fds": nfds} if nfds else msg, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise WireError(f"a message of {len(line)} bytes, at most {MAX_MESSAGE} are possible")
    return line


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Inbox:
    """Bytes and descriptors that arrived and are not yet a message."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._scanned = 0
        self._fds: list[int] = []
        self._broken = ""

    def drop(self) -> None:
        """Close what nobody took."""
        fds, self._fds = self._fds, []
        _close_all(fds)

    def fail(self, why: str) -> WireError:
        """Give up for good."""
        self.drop()
        self._bytes.clear()
        self._broken = why
        return WireError(why)

    def fill(self, sock: socket.socket) -> bool:
        """Read once, without blocking; False when nothing is there.

        Raises PeerClosed, WireError.
        """
        if self._broken:
            raise WireError(self._broken)
        try:
            data, ancillary, flags, _ = sock.recvmsg(_CHUNK, _ANCILLARY, _RECV_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError as e:
            self.drop()
            raise PeerClosed("the peer has gone") from e
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise self.fail("descriptors of the peer's message were lost (no descriptor left here?)")
        if len(self._fds) > 2 * MAX_FDS:
            raise self.fail(f"{len(self._fds)} descriptors are waiting for a message that takes them")
        if not data:
            half = " in the middle of a message" if self._bytes else ""
            self.drop()
            raise PeerClosed(f"the peer closed the connection{half}")
        self._bytes += data
        return True

    def take(self) -> tuple[Message, list[int]] | None:
        """The next complete message and its descriptors, or None. Raises WireError."""
        end = self._bytes.find(b"\n", self._scanned)
        if max(end + 1, len(self._bytes) if end < 0 else 0) > MAX_MESSAGE:
            raise self.fail(f"a message longer than {MAX_MESSAGE} bytes")
        if end < 0:
            self._scanned = len(self._bytes)
            return None
        line = bytes(self._bytes[:end])
        del self._bytes[: end + 1]
        self._scanned = 0
        try:
            msg = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise self.fail(f"not a JSON line: {line[:40]!r}") from e
        if not isinstance(msg, dict):
            raise self.fail(f"a JSON {type(msg).__name__} where an object must be")
        want = msg.pop("fds", 0)
        if type(want) is not int or not 0 <= want <= len(self._fds):
            raise self.fail(f"a message with {len(self._fds)} descriptors says that it has {want!r:.40}")
        fds, self._fds = self._fds[:want], self._fds[want:]
        if self._fds and not self._bytes:
            _close_all(fds)
            raise self.fail("descriptors that belong to no message")
        return msg, fds


class _Base:
    """What both channels share: the socket and its owner's duties."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._inbox = _Inbox()

    def fileno(self) -> int:
        """The socket's descriptor (readable does not mean that a whole message is there)."""
        return self.sock.fileno()

    def peer_uid(self) -> int:
        """User id of the process that connected (SO_PEERCRED), as seen from this user namespace."""
        return peer_credentials(self.sock)[1]

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took; may be repeated."""
        self._inbox.drop()
        self.sock.close()

    def _push(self, rest: memoryview, fds: Sequence[int]) -> int:
        """Send what fits now; bytes taken, 0 when the socket is full. Raises PeerClosed."""
        try:
            if fds:
                rights = array.array("i", fds)
                return self.sock.sendmsg(
                    [rest], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], _SEND_FLAGS
                )
            return self.sock.send(rest, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return 0
        except ConnectionError as e:
            raise PeerClosed("the peer has gone") from e


class Channel(_Base):
    """Blocking channel; the socket belongs to it from now on. One thread at a time per direction."""

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def send(self, msg: Message, fds: Sequence[int] = (), timeout_s: float | None = SEND_TIMEOUT_S) -> None:
        """Send one message; ``fds`` are duplicated to the peer and stay open here.

        Raises PeerClosed, WireError (too long), WireTimeout when the peer does not read.
        """
        rest = memoryview(encode(msg, len(fds)))
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while rest:
            n = self._push(rest, fds)
            if n:
                rest, fds = rest[n:], ()
            elif not self._wait(select.POLLOUT, deadline):
                raise WireTimeout(f"the peer did not read a message of ours within {timeout_s} s")

    def recv(self, timeout_s: float | None, what: str) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which now belong to the caller.

        timeout_s: seconds, None to wait until the peer speaks or dies; ``what`` names what is awaited.
        Raises WireTimeout, PeerClosed, WireError.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (got := self._inbox.take()) is None:
            if not self._inbox.fill(self.sock) and not self._wait(select.POLLIN, deadline):
                raise WireTimeout(f"{what}: nothing came within {timeout_s} s")
        return got

    def try_recv(self) -> tuple[Message, list[int]] | None:
        """The next message if a whole one is here already. Raises PeerClosed, WireError."""
        while (got := self._inbox.take()) is None:
            if not self._inbox.fill(self.sock):
                return None
        return got

    def _wait(self, event: int, deadline: float | None) -> bool:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        poller = select.poll()
        poller.register(self.sock, event)
        return bool(poller.poll(None if left is None else left * 1000))


class AsyncChannel(_Base):
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
        async with self._sending:
            begun = False
            try:
                while rest:
                    n = self._push(rest, fds)
                    if n:
                        rest, fds, begun = rest[n:], (), True
                    else:
                        await self._ready(True, timeout_s, "the peer did not read a message of ours")
            except (WireTimeout, asyncio.CancelledError):
                if begun:
                    self.sock.shutdown(socket.SHUT_RDWR)
                raise

    async def recv(self, timeout_s: float | None, what: str) -> tuple[Message, list[int]]:
        """As ``Channel.recv``; a cancelled call loses nothing."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (got := self._inbox.take()) is None:
            if not self._inbox.fill(self.sock):
                left = None if deadline is None else deadline - time.monotonic()
                await self._ready(False, left, f"{what}: nothing came within {timeout_s} s")
        return got

    async def _ready(self, writing: bool, timeout_s: float | None, why: str) -> None:
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
            await asyncio.wait_for(ready, timeout_s)
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


def channel_pair() -> tuple[Channel, Channel]:
    """Two connected channels, close-on-exec."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(a), Channel(b)


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer; a pid of 0 is one that this pid namespace does not see."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


class _Reached:
    """A path short enough for ``sun_path``, through a descriptor of its directory."""

    def __init__(self, path: str) -> None:
        self._dir, self.name = os.path.split(os.path.abspath(path))

    def __enter__(self) -> Callable[[str], str]:
        self._fd = os.open(self._dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return lambda name: f"/proc/self/fd/{self._fd}/{name}"

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def connect_unix(path: str) -> socket.socket:
    """Connect to a stream socket at a path of any length. Raises OSError with the path in it."""
    reach = _Reached(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with reach as at:
            sock.connect(at(reach.name))
    except OSError as e:
        sock.close()
        raise OSError(e.errno, os.strerror(e.errno or 0), path) from None
    return sock


def listen_unix(path: str, mode: int = 0o600, backlog: int = 128) -> socket.socket:
    """Listening stream socket at a path of any length; it appears ready and with its mode.

    A socket that nobody listens on any more is replaced. Raises OSError: EADDRINUSE when somebody
    does, EEXIST when the path is something else.
    """
    if os.path.lexists(path):
        _check_stale(path)
    reach = _Reached(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f".{secrets.token_hex(6)}"
    try:
        with reach as at:
            sock.bind(at(temporary))
            os.chmod(at(temporary), mode)
            sock.listen(backlog)
            os.rename(at(temporary), at(reach.name))
    except OSError as e:
        sock.close()
        raise OSError(e.errno, os.strerror(e.errno or 0), path) from None
    return sock


def _check_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "is in the way and no socket", path)
        connect_unix(path).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return
    raise OSError(errno.EADDRINUSE, "somebody listens there already", path)


Handler = Callable[[AsyncChannel], Awaitable[None]]


class UnixServer:
    """Accepts connections of permitted users and runs one handler task for each."""

    def __init__(self, sock: socket.socket, path: str | None, handler: Handler, uids: frozenset[int]) -> None:
        self.sock = sock
        self.path = path
        self._handler = handler
        self._uids = uids
        self._tasks: set[asyncio.Task[None]] = set()
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
            # No descriptor left: look again when the connections that hold them may have gone.
            self._loop.remove_reader(self.sock.fileno())
            self._loop.call_later(0.1, self._resume)
            self._loop.call_exception_handler(
                {"message": f"{self.path}: accept: {e.strerror}", "exception": e}
            )
            return
        if peer_credentials(conn)[1] not in self._uids:
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
            except (PeerClosed, WireError):
                pass  # a peer that dies or talks nonsense ends its own connection only

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


async def serve_unix(
    path: str, handler: Handler, mode: int = 0o600, uids: frozenset[int] | None = None
) -> UnixServer:
    """Listen at ``path`` in the running event loop; ``handler`` gets a channel per connection.

    Connections of users other than ``uids`` (default: our own and root) are closed at once.
    Raises OSError as ``listen_unix``.
    """
    allowed = frozenset({os.geteuid(), 0}) if uids is None else uids
    return UnixServer(listen_unix(path, mode), path, handler, allowed)
