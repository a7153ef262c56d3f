"""One end of a virtio-vsock device: programs at Unix sockets here, packets to the other end.

Firecracker's convention, the same on both sides. A program connects to PATH, writes ``CONNECT <port>\\n``,
reads ``OK <own port>\\n`` and is then connected with the program that listens on the other side at
PATH_<port>. When nobody listens, or the listener's backlog is full, the connection is closed instead.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import resource
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mic_emu.virtio.vsock_conn import (
    BOTH,
    HEADER,
    NO_SEND,
    STREAM,
    Connection,
    Op,
    Packet,
    ProtocolError,
    State,
    reset_header,
)
from mic_emu.wire import listen_unix

MAX_CONNECTIONS = 4096
WHOLE_BUFFERS = 128  # so many connections have the whole buffer, later ones their share of as much
MIN_BUFFER = 4096
GREETING_S = 10.0  # a program has this long to write its CONNECT line
REQUEST_S = 10.0  # the peer answers a REQUEST within this time
CLOSE_S = 8.0  # and a SHUTDOWN of both directions
RETRY_S = 0.1  # until the next try when there was no descriptor for a program
LINE_MAX = len("CONNECT 4294967295\n")
FIRST_PORT, LAST_PORT = 1 << 30, 0xFFFFFFFE  # ports of our own; 0xFFFFFFFF is "any"
SEND_BUFFER = 4 << 20  # of sockets to programs; the kernel cuts it to its own limit
_EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


P = TypeVar("P", bound=Packet)


class Link(Protocol[P]):
    """The rings, as far as a node needs them."""

    def reserve(self) -> P | None:
        """Room for a packet; None: call ``Node.pump`` when there is some."""

    def unreserve(self, packet: P) -> None:
        """It is not needed after all."""


class Node:
    """``cid`` is ours, ``peer_cid`` the other end's; ``buffer`` bytes are kept for a connection at most."""

    def __init__(self, cid: int, peer_cid: int, path: Path, link: Link[Any], buffer: int) -> None:
        self.cids, self.path, self.link, self.buffer = (cid, peer_cid), path, link, buffer
        self.counters = dict.fromkeys(
            ("connections", "refused", "resets", "malformed", "packets_in", "packets_out"), 0
        )
        self._by_fd: dict[int, Connection] = {}
        self._by_ports: dict[tuple[int, int], Connection] = {}  # (local, peer)
        self._active: dict[Connection, None] = {}  # may have something to send, in turn
        self._resets: deque[tuple[int, int]] = deque()
        self._deadlines: list[tuple[float, int, Connection]] = []
        self._next_port = FIRST_PORT
        self._paused = False  # nobody is accepted: no room, or no descriptor
        self._retry_at = 0.0
        _raise_descriptor_limit()
        self._epoll = select.epoll()
        self._listener = listen_unix(str(path), backlog=1024)
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable: call ``serve``."""
        return self._epoll.fileno()

    @property
    def connections(self) -> int:
        """Open now, greetings included."""
        return len(self._by_fd)

    # --- programs here ------------------------------------------------------------------------------

    def serve(self) -> None:
        """What programs did; ``pump`` afterwards."""
        for fd, mask in self._epoll.poll(0, 256):
            if fd == self._listener.fileno():
                self._accept()
                continue
            conn = self._by_fd.get(fd)
            if conn is None:
                continue  # it went while this batch was served
            if conn.state is State.GREETING:
                self._greet(conn, mask)
            else:
                conn.event(mask)
                self._look(conn)

    def _accept(self) -> None:
        for _ in range(64):
            if len(self._by_fd) >= MAX_CONNECTIONS:
                return self._pause()
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._retry_at = time.monotonic() + RETRY_S
                    return self._pause()
                continue  # it went before it was served
            conn = self._adopt(sock)
            self._limit(conn, GREETING_S)

    def _pause(self) -> None:
        """The others wait in the backlog until a connection goes."""
        self._paused = True
        self._epoll.modify(self._listener.fileno(), 0)

    def _adopt(self, sock: socket.socket) -> Connection:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        conn = Connection(sock, self._share())
        self._by_fd[sock.fileno()] = conn
        self._epoll.register(sock.fileno(), _EDGES)
        return conn

    def _share(self) -> int:
        """Bytes that a new connection may keep. The n-th oldest of those that live came to at least n - 1 others, so
        all together keep WHOLE_BUFFERS * (1 + ln(MAX_CONNECTIONS / WHOLE_BUFFERS)) buffers at most: 1.1 GiB of 2M."""
        return max(MIN_BUFFER, min(self.buffer, self.buffer * WHOLE_BUFFERS // (len(self._by_fd) + 1)))

    def _greet(self, conn: Connection, mask: int) -> None:
        """``CONNECT <port>\\n``, not one byte more: what follows is the peer's."""
        try:
            line = conn.sock.recv(LINE_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            return self._drop(conn)
        end = line.find(b"\n")
        if end < 0:
            if len(line) >= LINE_MAX or not line or mask & (select.EPOLLHUP | select.EPOLLRDHUP):
                self._drop(conn)
            return
        words = line[:end].split()
        if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit() or int(words[1]) > LAST_PORT:
            return self._drop(conn)
        conn.sock.recv(end + 1)
        self._enter(conn, self._free_port(int(words[1])), int(words[1]), State.REQUESTED)
        self._limit(conn, REQUEST_S)
        conn.owed[Op.REQUEST] = None
        conn.event(mask | select.EPOLLIN)  # what came behind the line made no edge of its own
        self._look(conn)

    def _free_port(self, peer: int) -> int:
        while (self._next_port, peer) in self._by_ports:
            self._step_port()
        port = self._next_port
        self._step_port()
        return port

    def _step_port(self) -> None:
        self._next_port = self._next_port + 1 if self._next_port < LAST_PORT else FIRST_PORT

    def _enter(self, conn: Connection, local: int, peer: int, state: State) -> None:
        conn.local, conn.peer, conn.state = local, peer, state
        self._by_ports[local, peer] = conn
        self.counters["connections"] += 1

    # --- packets of the peer ------------------------------------------------------------------------

    def received(self, views: Sequence[memoryview]) -> None:
        """One packet; every byte of it is the peer's word only."""
        header, payload = _split(views)
        if header is None:
            self.counters["malformed"] += 1
            return
        src_cid, dst_cid, peer, local, length, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack(header)
        self.counters["packets_in"] += 1
        if (dst_cid, src_cid) != self.cids:
            self.counters["malformed"] += 1  # there is nobody to answer to
            return
        conn = self._by_ports.get((local, peer))
        if op == Op.RST:
            if conn:
                self._reset_by_peer(conn)
            return
        try:
            if kind != STREAM or length > sum(map(len, payload)):
                raise ProtocolError("malformed")
            if op == Op.REQUEST:
                if conn:
                    raise ProtocolError("a second REQUEST")
                conn = self._request(local, peer)
            if conn is None:
                self._reset(local, peer)
                return
            conn.credit(buf_alloc, fwd_cnt)
            self._operate(conn, op, payload, length, flags)
        except ProtocolError:
            self.counters["malformed"] += 1
            self._abort(conn, local, peer)

    def _operate(
        self, conn: Connection, op: int, payload: Sequence[memoryview], length: int, flags: int
    ) -> None:
        if op == Op.RESPONSE:
            if conn.state is not State.REQUESTED:
                raise ProtocolError("RESPONSE to no request")
            self._established(conn)
        elif op == Op.RW:
            if conn.state is not State.OPEN:
                raise ProtocolError("data before RESPONSE")
            conn.data(payload, length)
        elif op == Op.SHUTDOWN:
            if conn.state is not State.OPEN:
                raise ProtocolError("SHUTDOWN before RESPONSE")
            conn.shut(flags)
        elif op == Op.CREDIT_REQUEST:
            conn.owed[Op.CREDIT_UPDATE] = None
        elif op not in (Op.REQUEST, Op.CREDIT_UPDATE):
            raise ProtocolError("unknown operation")
        self._look(conn)

    def _request(self, local: int, peer: int) -> Connection | None:
        """The peer's program wants the one that listens here at PATH_<local>; None: refused."""
        if len(self._by_fd) >= MAX_CONNECTIONS:
            self.counters["refused"] += 1
            return None
        sock = _connect(Path(f"{self.path}_{local}"))
        if sock is None:
            self.counters["refused"] += 1
            return None
        conn = self._adopt(sock)
        self._enter(conn, local, peer, State.OPEN)
        conn.owed[Op.RESPONSE] = None
        return conn

    def _established(self, conn: Connection) -> None:
        conn.state, conn.deadline = State.OPEN, 0.0
        try:
            conn.sock.send(b"OK %d\n" % conn.local, socket.MSG_NOSIGNAL)
        except OSError:
            conn.gone = conn.readable = True

    def _reset_by_peer(self, conn: Connection) -> None:
        if conn.kept and conn.peer_flags & NO_SEND and not conn.gone:
            # It has sent everything and gone: its last bytes are still the program's.
            conn.state, conn.deadline = State.ORPHAN, 0.0
            conn.owed.clear()
            del self._by_ports[conn.local, conn.peer]
            return
        self._drop(conn)

    # --- what follows --------------------------------------------------------------------------------

    def _look(self, conn: Connection) -> None:
        """After every change: is it over, is there something to send?"""
        if conn.state is State.ORPHAN:
            if not conn.kept or conn.gone:
                self._drop(conn)
            return
        if conn.over:
            self._abort(conn, conn.local, conn.peer)
            return
        conn.settle()
        if conn.told == BOTH and not conn.deadline:
            self._limit(conn, CLOSE_S)
        if conn.wants():
            self._active[conn] = None

    def _reset(self, local: int, peer: int) -> None:
        # More than this are owed only to a peer that never had the connections: it learns nothing of them.
        if len(self._resets) < 2 * MAX_CONNECTIONS:
            self._resets.append((local, peer))

    def _abort(self, conn: Connection | None, local: int, peer: int) -> None:
        self._reset(local, peer)
        if conn:
            self._drop(conn)

    def _drop(self, conn: Connection) -> None:
        fd = conn.sock.fileno()
        if self._by_fd.pop(fd, None) is None:
            return
        if self._by_ports.get((conn.local, conn.peer)) is conn:
            del self._by_ports[conn.local, conn.peer]
        self._active.pop(conn, None)
        conn.deadline = 0.0
        conn.kept.clear()
        if conn.state is State.GREETING:
            with contextlib.suppress(OSError):
                conn.sock.recv(4096)  # read, so that it finds an end of file instead of ECONNRESET
        conn.sock.close()  # epoll forgets it
        self._resume()

    def _resume(self) -> None:
        if self._paused:
            self._paused, self._retry_at = False, 0.0
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)

    def pump(self) -> None:
        """Send what can be sent: one packet of each connection in turn."""
        while self._resets or self._active:
            packet = self.link.reserve()
            if packet is None:
                return
            if self._resets:
                self.counters["resets"] += 1
                self.counters["packets_out"] += 1
                packet.send(reset_header(self.cids, *self._resets.popleft()), 0)
                continue
            conn = next(iter(self._active))
            del self._active[conn]
            if conn.fill(packet, self.cids):
                self.counters["packets_out"] += 1
            else:
                self.link.unreserve(packet)
            self._look(conn)

    # --- time ----------------------------------------------------------------------------------------

    def _limit(self, conn: Connection, seconds: float) -> None:
        conn.deadline = time.monotonic() + seconds
        heapq.heappush(self._deadlines, (conn.deadline, id(conn), conn))

    def timeout(self) -> float | None:
        """Seconds until ``expire`` has something to do."""
        while self._deadlines and self._deadlines[0][0] != self._deadlines[0][2].deadline:
            heapq.heappop(self._deadlines)
        due = [t for t in (self._retry_at, self._deadlines[0][0] if self._deadlines else 0.0) if t]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def expire(self) -> None:
        """Give up what took too long."""
        now = time.monotonic()
        if 0 < self._retry_at <= now:
            self._resume()
        while self.timeout() is not None and self._deadlines and self._deadlines[0][0] <= now:
            conn = heapq.heappop(self._deadlines)[2]
            if conn.state is State.GREETING:
                self._drop(conn)
            else:
                self._abort(conn, conn.local, conn.peer)

    # --- the end -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The peer has lost all connections."""
        for conn in list(self._by_fd.values()):
            self._drop(conn)
        self._resets.clear()
        self._deadlines.clear()

    def close(self) -> None:
        """Everything; may be repeated."""
        if self._epoll.closed:
            return
        self.reset()
        self._epoll.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)


def _split(views: Sequence[memoryview]) -> tuple[bytes | None, list[memoryview]]:
    """(a private copy of the header, the payload behind it), wherever the segments end."""
    header, rest = b"", list(views)
    while rest and len(header) < HEADER.size:
        want = HEADER.size - len(header)
        header += bytes(rest[0][:want])
        rest[0] = rest[0][want:]
        if not len(rest[0]):
            del rest[0]
    return (header, rest) if len(header) == HEADER.size else (None, [])


def _connect(path: Path) -> socket.socket | None:
    """The program that listens at ``path``: a socket, never a link to one. None: nobody, or too busy."""
    try:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not stat.S_ISSOCK(os.fstat(handle).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{handle}")
    except OSError:
        sock.close()
        return None
    finally:
        os.close(handle)
    return sock


def _raise_descriptor_limit() -> None:
    """A descriptor for each connection, and some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 4 * MAX_CONNECTIONS) if hard != resource.RLIM_INFINITY else 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
