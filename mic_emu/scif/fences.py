"""Fences: marks, waits and signals, of our programs and for the peer's (SCIF 2.15, 3.4).

A copy that a program makes itself ends before its call returns, so only those that were handed over to a
DMA channel are counted: a mark is the number of the last one (``Copies``).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

REMOTE_MARK = 1 << 31  # the mark belongs to the peer's channel
INIT_SELF, SIGNAL_LOCAL, SIGNAL_REMOTE = 0x1, 0x10, 0x20


class Fences:
    """Fence messages of one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
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
        """Wait until the copies before ``mark``, ours or the peer's, have ended.

        Raises ScifError ETIMEDOUT (ours), ENOMEM (the peer's), ENODEV, ENOTCONN, ECONNRESET.
        """
        ep.check_connected()
        if not mark & REMOTE_MARK:
            await ep.copies.wait(mark)
            return
        key = self.node.new_id()
        msg = Msg(Op.WAIT, (self.node.id, ep.port), ep.peer, ep.remote_id, key, mark & 0x7FFFFFFF)
        answer = await self.node.questions.ask(ep, msg, key)
        if answer.op != Op.WAIT_ACK:
            raise ScifError(errno.ENOMEM, "the peer's wait failed")

    async def signal(self, ep: Endpoint, loff: int, lval: int, roff: int, rval: int, flags: int) -> None:
        """Write values once everything before is complete (SCIF-123).

        We write (INIT_SELF): LOCAL means our window at ``loff``, REMOTE the peer's at ``roff``. The peer
        writes: LOCAL means its own window at ``roff``, REMOTE ours at ``loff``.
        """
        if flags & INIT_SELF:
            ep.check_connected()
            if flags & SIGNAL_LOCAL:
                self.node.rma.signal(ep, True, loff, lval)
            if flags & SIGNAL_REMOTE:
                self.node.rma.signal(ep, False, roff, rval)
            return
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
        if ep is None:
            self._reply(msg, Op.MARK_NACK, None)
        else:
            self._reply(msg, Op.MARK_ACK, ep, p2=ep.copies.mark())

    def _on_wait(self, msg: Msg, link: object) -> None:
        ep = self._find(msg)
        if ep is None:
            self._reply(msg, Op.WAIT_NACK, None)
        else:
            self.node.spawn(self._wait_for_peer(ep, msg), "wait for a peer's mark")

    async def _wait_for_peer(self, ep: Endpoint, msg: Msg) -> None:
        op = Op.WAIT_NACK
        try:
            await ep.copies.wait(msg.p2)
            op = Op.WAIT_ACK
        except ScifError as e:
            self.node.log.debug("node %d: a peer's wait failed: %s", self.node.id, e)
        self._reply(msg, op, ep)

    def _on_signal(self, msg: Msg, link: object) -> None:
        ep = self._find(msg)
        good = False
        if ep is not None:
            try:
                self.node.rma.signal(ep, msg.op == Op.SIG_LOCAL, msg.p1, msg.p2)
                good = True
            except (ScifError, IndexError) as e:
                self.node.log.debug("node %d: signal refused: %s", self.node.id, e)
        self._reply(msg, Op.SIG_ACK if good else Op.SIG_NACK, ep)
