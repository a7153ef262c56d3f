"""The SCIF API for kernel clients: code in the node's own process (COSM, the tools, the tests)."""

from __future__ import annotations

import asyncio
import errno
import select
from typing import TYPE_CHECKING, TypeVar, cast

from mic_emu.scif import qp as queue
from mic_emu.scif.acceptor import Accept
from mic_emu.scif.endpoint import Endpoint
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.state import State

if TYPE_CHECKING:
    from mic_emu.scif.node import Node

T = TypeVar("T")
POLLIN, POLLOUT, POLLERR, POLLHUP = select.POLLIN, select.POLLOUT, select.POLLERR, select.POLLHUP


class KernelEndpoint(Endpoint):
    """An endpoint from ``node.open()``; errors are ScifError."""

    def __init__(self, node: Node) -> None:
        self._waiters: set[asyncio.Future[bool]] = set()
        self._sent = self._received = 0  # bytes
        super().__init__(node)

    def message_bytes(self) -> tuple[int, int] | None:
        return (self._sent, self._received) if self.was_connected else None

    # --- waiting ------------------------------------------------------------------------------

    def changed(self) -> None:
        super().changed()
        waiters, self._waiters = self._waiters, set()
        for w in waiters:
            _finish(w, True, None)

    async def wait_change(self, timeout_s: float | None = None) -> bool:
        """Sleep until ``changed``; False when ``timeout_s`` seconds passed first."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        timer = None
        if timeout_s is not None:
            timer = self.node.clock.alarm(timeout_s, lambda: _finish(waiter, False, None))
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)
            if timer:
                timer.cancel()

    # --- connect, accept, close ---------------------------------------------------------------

    async def connect(self, dst: tuple[int, int]) -> int:
        """Connect to ``(node, port)``; returns the local port once the peer has accepted.

        Raises ScifError ENODEV, EINVAL, EOPNOTSUPP, EISCONN, ENOSPC, ENOMEM, ECONNREFUSED (SCIF 2.4).
        """
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        attempt = self.start_connect(dst, lambda error: _finish(answer, None, error))
        try:
            await answer
        except asyncio.CancelledError:
            if self.attempt is attempt:
                attempt.withdraw(errno.EINTR)
            raise
        return self.port

    async def accept(self, *, sync: bool = True) -> KernelEndpoint:
        """Take the oldest request; returns the connected endpoint, its ``peer`` is (node, port).

        Raises ScifError EINVAL (not listening), EAGAIN (not ``sync`` and no request), ENOMEM,
        ENODEV (SCIF 2.6), EINTR (the listener was closed meanwhile).
        """
        answer: asyncio.Future[KernelEndpoint] = asyncio.get_running_loop().create_future()

        def done(conn: Endpoint | None, error: ScifError | None) -> None:
            assert conn is None or isinstance(conn, KernelEndpoint)
            _finish(answer, conn, error)

        call = Accept(self, lambda: KernelEndpoint(self.node), sync, done)
        call.start()
        try:
            return await answer
        except asyncio.CancelledError:
            call.cancel()
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close_then(lambda: None)
            raise

    async def close(self) -> None:
        """Release the endpoint; waits for the peer's acknowledgement at most the node timeout (SCIF 2.8)."""
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.close_then(lambda: _finish(gone, None, None))
        try:
            await gone
        except asyncio.CancelledError:
            self.destroy()
            raise

    @property
    def _rings(self) -> queue.Rings | None:
        return self.link.rings if self.link is not None else None

    # --- data ---------------------------------------------------------------------------------

    def _data_state(self, sending: bool) -> queue.Rings:
        if self._rings is None or self.state not in (State.CONNECTED, State.DISCONNECTED):
            raise ScifError(errno.ENOTCONN, "not connected")
        if sending and self.state is State.DISCONNECTED:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        return self._rings

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what fits; returns the count, 0 when the ring is full. Raises ENOTCONN, ECONNRESET."""
        if not len(data):
            return 0
        rings, done, wanted = self._data_state(sending=True), 0, False
        try:
            while done < len(data):
                n = min(rings.room(), len(data) - done)
                if n:
                    rings.put(data[done : done + n])
                    done, wanted = done + n, False
                    self._sent += n
                elif wanted:
                    break
                else:  # and look again: who made room before we asked for it tells nobody
                    rings.want_room()
                    wanted = True
        except ScifError:
            self._damaged()
            raise ScifError(errno.ECONNRESET, "the peer damaged its ring") from None
        if done:
            self._tell(Op.CLIENT_SENT)
        return done

    async def send(self, data: bytes) -> int:
        """Send all of ``data``; returns the bytes sent, fewer only when the peer closed meanwhile."""
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                n = self.send_nowait(view[done:])
            except ScifError:
                if done:
                    return done
                raise
            done += n
            if done < len(view) and not n:
                await self.wait_change()
        return done

    def recv_nowait(self, length: int) -> bytes:
        """Up to ``length`` bytes, b"" when there are none. Raises ENOTCONN, ECONNRESET after draining."""
        if not length:
            return b""
        rings = self._data_state(sending=False)
        try:
            data = rings.take(length)
            if not data:  # and look again: who sent before we said so tells nobody
                rings.drained()
                data = rings.take(length)
            elif not rings.used():
                rings.drained()
        except ScifError:
            self._damaged()
            raise ScifError(errno.ECONNRESET, "the peer damaged its ring") from None
        self._received += len(data)
        if not data and self.state is State.DISCONNECTED:
            raise ScifError(errno.ECONNRESET, "the peer has closed")
        if data and self.state is State.CONNECTED:
            self._tell(Op.CLIENT_RCVD)
        return data

    async def recv(self, length: int) -> bytes:
        """Exactly ``length`` bytes; fewer only when the peer closed after sending them."""
        out = bytearray()
        while len(out) < length:
            try:
                data = self.recv_nowait(length - len(out))
            except ScifError:
                if out:
                    break
                raise
            out += data
            if len(out) < length and not data:
                await self.wait_change()
        return bytes(out)

    def _tell(self, op: Op) -> None:
        if self.path is not None:
            self.path.send(Msg(op, (self.node.id, self.port), self.peer, self.remote_id))

    def _damaged(self) -> None:
        """The peer wrote rubbish into our indices: treat it as gone."""
        self.node.log.error("node %d: %r: damaged ring, disconnected", self.node.id, self)
        self.disconnected()

    # --- poll ---------------------------------------------------------------------------------

    def mask(self) -> int:
        """What poll reports now (SCIF 2.9)."""
        if self.state is State.LISTENING:
            return POLLIN if self.pending else 0
        if self._rings is None or self.state not in (State.CONNECTED, State.DISCONNECTED):
            return POLLERR
        bits = POLLHUP if self.state is State.DISCONNECTED else 0
        try:
            bits |= (POLLIN if self._rings.used() else 0) | (POLLOUT if self._rings.room() else 0)
        except ScifError:
            bits |= POLLHUP
        return bits

    def _ask_for(self, events: int) -> None:
        """Have a program at the other end tell of bytes and room from now on; what it did before, we look for."""
        if self._rings is not None and self.state is State.CONNECTED:
            if events & POLLIN:
                self._rings.drained()
            if events & POLLOUT:
                self._rings.want_room()

    async def poll(self, events: int, timeout_s: float | None = None) -> int:
        """Wait until one of ``events``, POLLERR or POLLHUP holds; returns the mask, 0 after the time-out."""
        give_up = None if timeout_s is None else self.node.clock.monotonic() + timeout_s
        while True:
            bits = self.mask() & (events | POLLERR | POLLHUP)
            if not bits:
                self._ask_for(events)
                bits = self.mask() & (events | POLLERR | POLLHUP)
            if bits:
                return bits
            left = None if give_up is None else give_up - self.node.clock.monotonic()
            if left is not None and left <= 0:
                return 0
            await self.wait_change(left)


def _finish(future: asyncio.Future[T], value: T | None, error: ScifError | None) -> None:
    """The outcome of a call, unless its caller has gone."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(cast("T", value))
