"""Questions to a peer's node: a message with a key, and the answer that brings the key back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

Then = Callable[["Msg | None", "ScifError | None"], None]


class Questions:
    """What a node waits for, by key."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._open: dict[int, tuple[Endpoint, bool, Then]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._open

    def put(self, ep: Endpoint, msg: Msg, key: int, then: Then, *, patient: bool = False) -> None:
        """Send; ``then`` gets the answer, or ScifError ENODEV (node lost), ENOTCONN (disconnected).

        ``patient``: go on waiting when the peer's endpoint closes, its node answers all the same.
        """
        error = self._hopeless(ep, patient)
        if error is not None or ep.path is None:
            then(None, error or ScifError(errno.ENOTCONN, "not connected"))
            return
        self._open[key] = (ep, patient, then)
        ep.questions += 1
        ep.path.send(msg)
        self.node.events.expect()

    async def ask(self, ep: Endpoint, msg: Msg, key: int, *, patient: bool = False) -> Msg:
        """``put`` for a coroutine. Raises ScifError."""
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        def then(msg: Msg | None, error: ScifError | None) -> None:
            if answer.done():
                return
            if msg is None:
                answer.set_exception(error or ScifError(errno.EIO))
            else:
                answer.set_result(msg)

        self.put(ep, msg, key, then, patient=patient)
        return await answer

    def answer(self, key: int, msg: Msg) -> None:
        """An answer came; nothing when nobody waits for it, or waits for it from that node."""
        question = self._open.get(key)
        if question is None or question[0].peer[0] != msg.src[0]:
            return
        del self._open[key]
        question[0].questions -= 1
        question[2](msg, None)

    def give_up(self, ep: Endpoint) -> None:
        """``ep`` is no longer connected: which of its questions can still be answered?"""
        for key, (asker, patient, then) in list(self._open.items()):
            error = self._hopeless(ep, patient) if asker is ep else None
            if error is not None and self._open.pop(key, None) is not None:
                ep.questions -= 1
                then(None, error)

    def _hopeless(self, ep: Endpoint, patient: bool) -> ScifError | None:
        if self.node.path(ep.peer[0]) is not ep.path:
            return ScifError(errno.ENODEV, "the peer's node is gone")
        if not patient and not ep.is_connected:
            return ScifError(errno.ENOTCONN, "the peer has closed")
        return None
