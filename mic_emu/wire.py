"""Messages between the emulator's own processes: JSON lines and descriptors over Unix sockets.

A message is one JSON object on one line, at most ``MAX_MESSAGE`` bytes. Descriptors travel with the
first byte of their message, which says in ``"fds"`` how many they are; they arrive close-on-exec.
``Channel`` blocks with named deadlines, ``wire_aio.AsyncChannel`` is the same for asyncio; neither changes
the socket's blocking mode, which other processes may share.

Bytes of a peer that is broken or hostile end in ``WireError``: every descriptor that it sent and
nobody took is closed, and the channel is of no more use.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from mic_emu.peers import peer_credentials, restrict

MAX_MESSAGE = 16 << 20  # bytes of one line, the newline included
MAX_FDS = 253  # descriptors of one message: the kernel's SCM_MAX_FD
SEND_TIMEOUT_S = 10.0

_CHUNK = 256 << 10
_TIMEVAL = struct.Struct("@ll")
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
    words = {**msg, "fds": nfds} if nfds else msg
    line = json.dumps(words, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise WireError(f"a message of {len(line)} bytes, at most {MAX_MESSAGE} are possible")
    return line


def _no_number(word: str) -> float:
    """NaN and the infinities are no JSON, and as a time they upset whoever sorts by it. Raises ValueError."""
    raise ValueError(f"{word} is no number")


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
            msg = json.loads(line, parse_constant=_no_number)
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


class BaseChannel:
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


class Channel(BaseChannel):
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


def channel_pair() -> tuple[Channel, Channel]:
    """Two connected channels, close-on-exec."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(a), Channel(b)


class _Reached:
    """A path short enough for ``sun_path``, through a descriptor of its directory."""

    def __init__(self, path: str) -> None:
        self._dir, self.name = os.path.split(os.path.abspath(path))

    def __enter__(self) -> Callable[[str], str]:
        self._fd = os.open(self._dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return lambda name: f"/proc/self/fd/{self._fd}/{name}"

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def _set_send_limit(sock: socket.socket, limit_s: float) -> None:
    """Python's own time-out of a socket makes it non-blocking, and such a connect does not wait at all."""
    whole = int(limit_s)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(whole, int((limit_s - whole) * 1e6)))


def connect_unix(path: str, wait: bool = True, limit_s: float = 0.0) -> socket.socket:
    """Connect to a stream socket at a path of any length. Raises OSError with the path in it.

    wait:    for a listener whose queue is full; else EAGAIN
    limit_s: of that wait, then EAGAIN; 0: none
    """
    reach = _Reached(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(wait)
    try:
        with reach as at:
            _set_send_limit(sock, limit_s)
            sock.connect(at(reach.name))
            _set_send_limit(sock, 0.0)
    except OSError as e:
        sock.close()
        raise OSError(e.errno, os.strerror(e.errno or 0), path) from None
    return sock


def listen_unix(path: str, backlog: int = 128) -> socket.socket:
    """Listening stream socket at a path of any length; it appears ready and with its mode (``peers.restrict``).

    A socket that nobody listens on any more is replaced. Raises OSError: EADDRINUSE when somebody
    does, EEXIST when the path is something else.
    """
    if os.path.lexists(path):
        _check_stale(path)
    reach = _Reached(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f".{os.urandom(6).hex()}"
    try:
        with reach as at:
            sock.bind(at(temporary))
            restrict(at(temporary))
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
