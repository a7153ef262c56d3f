"""One virtio-vsock connection: a Unix socket on this side, packets towards the other (virtio 1.2, 5.10.6).

Credit: ``buf_alloc - (bytes sent - fwd_cnt)`` bytes may be on their way. What the program here does not
take at once is kept, never more than ``buffer`` bytes, and then the peer's credit is used up.
"""

from __future__ import annotations

import enum
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from mic_emu import layout as L

C = L.CONSTANTS
HEADER = struct.Struct("<" + "".join(f.fmt for f in L.VSOCK_HDR.fields))
STREAM = C["VIRTIO_VSOCK_TYPE_STREAM"]
NO_RECEIVE, NO_SEND = C["VIRTIO_VSOCK_SHUTDOWN_RCV"], C["VIRTIO_VSOCK_SHUTDOWN_SEND"]
BOTH = NO_RECEIVE | NO_SEND
U32 = 0xFFFFFFFF


class Op(enum.IntEnum):
    """Operations of a packet."""

    REQUEST = C["VIRTIO_VSOCK_OP_REQUEST"]
    RESPONSE = C["VIRTIO_VSOCK_OP_RESPONSE"]
    RST = C["VIRTIO_VSOCK_OP_RST"]
    SHUTDOWN = C["VIRTIO_VSOCK_OP_SHUTDOWN"]
    RW = C["VIRTIO_VSOCK_OP_RW"]
    CREDIT_UPDATE = C["VIRTIO_VSOCK_OP_CREDIT_UPDATE"]
    CREDIT_REQUEST = C["VIRTIO_VSOCK_OP_CREDIT_REQUEST"]


class State(enum.Enum):
    """Of a connection."""

    GREETING = "greeting"  # the program here has not said CONNECT yet
    REQUESTED = "requested"  # REQUEST is sent, or will be
    OPEN = "open"
    ORPHAN = "orphan"  # the peer has finished; the program here still reads what came


class ProtocolError(Exception):
    """The peer broke the rules of the connection: it is reset."""


class Packet(Protocol):
    """Room for one packet to the peer."""

    payload: Sequence[memoryview]

    def send(self, header: bytes, length: int) -> None:
        """It goes, with ``length`` bytes of payload."""


class Connection:
    """``local`` and ``peer`` are port numbers; ``sock`` does not block and is ours."""

    def __init__(self, sock: socket.socket, buffer: int) -> None:
        self.sock = sock
        self.buffer = buffer
        self.local = self.peer = -1
        self.state = State.GREETING
        self.deadline = 0.0  # when the node gives up what it waits for; 0: never
        self.owed: dict[Op, None] = {}  # control packets, in the order in which they go
        # towards the peer
        self.readable = self.eof = False  # what the socket said last
        self.gone = False  # the program takes nothing any more
        self.told = 0  # flags of the SHUTDOWN that the peer has got
        self.sent = self.peer_taken = self.peer_buffer = 0  # bytes, modulo 2**32
        self.asked = False  # CREDIT_REQUEST is sent, no credit came since
        # from the peer
        self.writable = True
        self.kept: deque[memoryview] = deque()
        self.came = self.taken = self.taken_told = 0  # bytes, modulo 2**32
        self.peer_flags = 0
        self.finished = False  # the program here has got its end of file

    # --- events of the Unix socket ----------------------------------------------------------------

    def event(self, mask: int) -> None:
        """Edges of epoll: remembered here, used as far as credit goes."""
        if mask & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
            self.readable = True
        if mask & select.EPOLLOUT:
            self.writable = True
        if mask & (select.EPOLLHUP | select.EPOLLERR):
            self.gone = True  # what it wrote before it closed is still to be read
        self.deliver()

    # --- from the peer ------------------------------------------------------------------------------

    def credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Every packet of the peer says how much it takes."""
        if buf_alloc != self.peer_buffer or fwd_cnt != self.peer_taken:
            self.peer_buffer, self.peer_taken = buf_alloc, fwd_cnt
            self.asked = False

    def data(self, views: Sequence[memoryview], length: int) -> None:
        """RW: as much as possible straight into the program's socket. Raises ProtocolError."""
        if self.peer_flags & NO_SEND:
            raise ProtocolError("data after SHUTDOWN")
        if length > self.buffer - (self.came - self.taken & U32):
            raise ProtocolError("data beyond the credit")
        self.came = self.came + length & U32
        for view in views:
            view = view[:length]
            length -= len(view)
            if not self.kept:
                view = view[self._give(view) :]
            if len(view):
                self.kept.append(memoryview(bytes(view)))
        self._tell_credit()

    def _give(self, view: memoryview) -> int:
        """Bytes that the program took; all of them when it is gone."""
        given = 0
        while given < len(view):
            if self.gone:
                given = len(view)
                break
            if not self.writable:
                break
            try:
                given += self.sock.send(view[given:], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self.writable = False
            except OSError:
                self.gone = self.readable = True
        self.taken = self.taken + given & U32
        return given

    def deliver(self) -> None:
        """Give the program what is kept for it, then the end of file when there is one."""
        while self.kept:
            view = self.kept[0]
            rest = view[self._give(view) :]
            if len(rest):
                self.kept[0] = rest
                break
            self.kept.popleft()
        self._tell_credit()
        if self.peer_flags & NO_SEND and not self.kept and not self.finished:
            self.finished = True
            self._shut(socket.SHUT_WR)

    def _shut(self, how: int) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:
            self.gone = self.readable = True

    def _tell_credit(self) -> None:
        # Half a buffer at a time: a peer that knows of less has either sent it or is told now.
        if (self.taken - self.taken_told & U32) * 2 >= self.buffer and self.state is State.OPEN:
            self.owed[Op.CREDIT_UPDATE] = None

    def shut(self, flags: int) -> None:
        """SHUTDOWN: flags add up."""
        fresh = flags & ~self.peer_flags & BOTH
        self.peer_flags |= fresh
        if fresh & NO_RECEIVE and not self.eof:
            self._shut(socket.SHUT_RD)  # the program's next write fails: EPIPE
            self.readable, self.eof = False, True
        self.deliver()

    @property
    def over(self) -> bool:
        """Both directions are at their end, and the program has what it was sent: RST is the answer."""
        return self.peer_flags == BOTH and (not self.kept or self.gone)

    # --- to the peer ------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes that the peer takes now; a peer that counts wrong gets nothing."""
        return self.peer_buffer - (self.sent - self.peer_taken & U32)

    def settle(self) -> None:
        """Owe the SHUTDOWN that is due."""
        flags = (NO_SEND if self.eof else 0) | (NO_RECEIVE if self.gone else 0)
        if self.eof and self.peer_flags & NO_SEND and not self.kept:
            flags = BOTH
        if self.state is State.OPEN and flags & ~self.told:
            self.owed[Op.SHUTDOWN] = None
            self.told |= flags

    def wants(self) -> bool:
        """Is there a packet to send?"""
        return bool(self.owed) or (self._may_read() and (self.room > 0 or not self.asked))

    def _may_read(self) -> bool:
        return self.state is State.OPEN and self.readable and not self.eof

    def fill(self, packet: Packet, cids: tuple[int, int]) -> bool:
        """Send one packet: what is owed first, else data. False: there was nothing to send after all."""
        for op in self.owed:
            del self.owed[op]
            self._send(packet, cids, op, 0)
            return True
        if not self._may_read():
            return False
        if self.room <= 0:
            if self.asked:
                return False
            self.asked = True
            self._send(packet, cids, Op.CREDIT_REQUEST, 0)
            return True
        n = self._read(packet.payload)
        if n:
            self.sent = self.sent + n & U32
            self._send(packet, cids, Op.RW, n)
        return n > 0

    def _read(self, views: Sequence[memoryview]) -> int:
        left, into = self.room, []
        for view in views:
            into.append(view[:left])
            left -= len(into[-1])
            if left <= 0:
                break
        try:
            n = self.sock.recv_into(into[0]) if len(into) == 1 else self.sock.recvmsg_into(into)[0]
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:
            n = 0
            self.gone = True
        if n == 0:
            self.readable, self.eof = False, True
            self.settle()
        return n

    def _send(self, packet: Packet, cids: tuple[int, int], op: Op, length: int) -> None:
        flags = self.told if op is Op.SHUTDOWN else 0
        self.taken_told = self.taken
        self.owed.pop(Op.CREDIT_UPDATE, None)  # every packet is one
        header = HEADER.pack(*cids, self.local, self.peer, length, STREAM, op, flags, self.buffer, self.taken)
        packet.send(header, length)


def reset_header(cids: tuple[int, int], local: int, peer: int) -> bytes:
    """RST for a connection that is not, or is no more."""
    return HEADER.pack(*cids, local, peer, 0, STREAM, Op.RST, 0, 0, 0)
