"""Questions to a peer's node: a message with a key, and the answer that brings the key back."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node


class Questions:
    """What a node waits for, by key."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._waiting: dict[int, asyncio.Future[Msg]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._waiting

    def answer(self, key: int, msg: Msg) -> None:
        """An answer came; nothing when nobody waits for it."""
        waiter = self._waiting.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_result(msg)

    async def ask(self, ep: Endpoint, msg: Msg, key: int, *, patient: bool = False) -> Msg:
        """Send and wait for the answer. Raises ScifError ENODEV (node lost), ENOTCONN (disconnected).

        ``patient``: go on waiting when the peer's endpoint closes, its node answers all the same.
        """
        if ep.path is None:
            raise ScifError(errno.ENOTCONN, "not connected")
        self._waiting[key] = asyncio.get_running_loop().create_future()
        unwatch = ep.watch(lambda: self._give_up(ep, key, patient))
        try:
            self._give_up(ep, key, patient)
            ep.path.send(msg)
            return await self._waiting[key]
        finally:
            unwatch()
            del self._waiting[key]

    def _give_up(self, ep: Endpoint, key: int, patient: bool) -> None:
        waiter = self._waiting[key]
        if waiter.done():
            return
        if self.node.path(ep.peer[0]) is not ep.path:
            waiter.set_exception(ScifError(errno.ENODEV, "the peer's node is gone"))
        elif not ep.windows.connected and not patient:
            waiter.set_exception(ScifError(errno.ENOTCONN, "the peer has closed"))
