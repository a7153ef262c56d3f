"""Remote fences: marks, waits and signals that the peer's node carries out (SCIF 2.15, 3.4).

Copies of programs end before their call returns, so a mark stands for everything that was issued
before it, and is complete when it is made.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mic_emu._native import lib
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import PROT_WRITE

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

REMOTE_MARK = 1 << 31  # the mark belongs to the peer's channel
SIGNAL_LOCAL, SIGNAL_REMOTE = 0x10, 0x20


class Fences:
    """Fence messages of one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._cookie = 0
        node.add_handler(Op.MARK, self._on_mark)
        node.add_handler(Op.WAIT, self._on_wait)
        node.add_handler(Op.SIG_LOCAL, self._on_signal)
        node.add_handler(Op.SIG_REMOTE, self._on_signal)
        for op in (Op.MARK_ACK, Op.MARK_NACK, Op.WAIT_ACK, Op.WAIT_NACK):
            node.add_handler(op, lambda msg, link: node.questions.answer(msg.p1, msg))
        for op in (Op.SIG_ACK, Op.SIG_NACK):
            node.add_handler(op, lambda msg, link: node.questions.answer(msg.p3, msg))

    # --- our programs' requests -------------------------------------------------------------------

    async def mark(self, ep: Endpoint) -> int:
        """A mark on the peer's copies. Raises ScifError ENOMEM, ENODEV, ENOTCONN."""
        ep.check_connected()
        key = self.node.new_id()
        msg = Msg(Op.MARK, (self.node.id, ep.port), ep.peer, ep.remote_id, key)
        answer = await self.node.questions.ask(ep, msg, key)
        if answer.op != Op.MARK_ACK:
            raise ScifError(errno.ENOMEM, "the peer cannot set a mark")
        return (answer.p2 & 0x7FFFFFFF) | REMOTE_MARK

    async def wait(self, ep: Endpoint, mark: int) -> None:
        """Wait until the peer's copies before ``mark`` have ended."""
        ep.check_connected()
        key = self.node.new_id()
        msg = Msg(Op.WAIT, (self.node.id, ep.port), ep.peer, ep.remote_id, key, mark & 0x7FFFFFFF)
        answer = await self.node.questions.ask(ep, msg, key)
        if answer.op != Op.WAIT_ACK:
            raise ScifError(errno.ENOMEM, "the peer's wait failed")

    async def signal(self, ep: Endpoint, loff: int, lval: int, roff: int, rval: int, flags: int) -> None:
        """The peer writes: LOCAL means its own window at ``roff``, REMOTE ours at ``loff`` (SCIF-123)."""
        for flag, op, off, value in (
            (SIGNAL_LOCAL, Op.SIG_LOCAL, roff, rval),
            (SIGNAL_REMOTE, Op.SIG_REMOTE, loff, lval),
        ):
            if not flags & flag:
                continue
            ep.check_connected()
            key = self.node.new_id()
            msg = Msg(op, (self.node.id, ep.port), ep.peer, ep.remote_id, off, value, key)
            answer = await self.node.questions.ask(ep, msg, key)
            if answer.op != Op.SIG_ACK:
                raise ScifError(errno.ENXIO, "the peer cannot write there")

    # --- the peer's requests ----------------------------------------------------------------------

    def _reply(self, msg: Msg, op: Op, ep: Endpoint | None, **changes: int) -> None:
        path = self.node.path(msg.src[0])
        if path is not None:
            path.send(msg.answer(op, p0=ep.remote_id if ep is not None else 0, **changes))

    def _find(self, msg: Msg) -> Endpoint | None:
        ep = self.node.endpoints.get(msg.p0)
        return ep if ep is not None and ep.is_connected and ep.peer[0] == msg.src[0] else None

    def _on_mark(self, msg: Msg, link: object) -> None:
        ep = self._find(msg)
        self._cookie = (self._cookie + 1) & 0x3FFFFFFF or 1
        self._reply(msg, Op.MARK_ACK if ep is not None else Op.MARK_NACK, ep, p2=self._cookie)

    def _on_wait(self, msg: Msg, link: object) -> None:
        ep = self._find(msg)
        self._reply(msg, Op.WAIT_ACK if ep is not None else Op.WAIT_NACK, ep)

    def _on_signal(self, msg: Msg, link: object) -> None:
        ep = self._find(msg)
        good = False
        if ep is not None:
            try:
                self._write(ep, msg)
                good = True
            except (ScifError, IndexError) as e:
                self.node.log.debug("node %d: signal refused: %s", self.node.id, e)
        self._reply(msg, Op.SIG_ACK if good else Op.SIG_NACK, ep)

    def _write(self, ep: Endpoint, msg: Msg) -> None:
        """All 64 bits at an offset inside a single window that allows writing."""
        own = msg.op == Op.SIG_LOCAL
        space = ep.windows.own if own else ep.windows.remote
        windows = space.cover(msg.p1, 8, PROT_WRITE)
        if len(windows) != 1 or ep.path is None:
            raise ScifError(errno.ENXIO, "crosses a window")
        pieces = list(windows[0].places(msg.p1, 8))
        data = msg.p2.to_bytes(8, "little")
        for place, n in pieces:
            fd, at = (self.node.memory_fd, place) if own else ep.path.window_place(place, n)
            rc = lib.mic_shm_write_at(fd, at, data[:n], n)
            if rc < 0:  # the node of this window was lost, and we have not heard of it
                raise ScifError(-rc, "the window is gone")
            data = data[n:]
