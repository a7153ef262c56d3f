"""SCIF port 201 of the host: accepts the cards' COSM clients and hands them to their cards (COSM 5.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mic_emu import layout as L
from mic_emu.host.cosm import CosmDevice
from mic_emu.log import Log
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import POLLIN, KernelEndpoint

C = L.CONSTANTS


class CosmServer:
    """Listens on node 0 port 201 and hands connections to the cards (COSM-41)."""

    def __init__(self, listener: KernelEndpoint, find: Callable[[int], CosmDevice | None], log: Log) -> None:
        self._listener = listener
        self._find = find
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def open(cls, endpoint: KernelEndpoint, find: Callable[[int], CosmDevice | None], log: Log) -> CosmServer:
        """Bind and listen. Raises ScifError."""
        endpoint.bind(C["SCIF_COSM_PORT"])
        endpoint.listen(C["COSM_BACKLOG"])
        return cls(endpoint, find, log)

    async def serve(self) -> None:
        """Accept until cancelled or the listener is closed.

        Each request is granted in a task of its own: a card that stops in the middle of its connection
        must not keep the others waiting (COSM-60).
        """
        while await self._listener.poll(POLLIN) == POLLIN:
            task = asyncio.ensure_future(self._accept())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(0)  # it has taken its request off the queue

    async def _accept(self) -> None:
        try:
            ep = await self._listener.accept(sync=False)
        except ScifError as e:
            self._log.warning(f"COSM accept: {e}")  # a card that went away in the middle of it
            return
        node = ep.peer[0] if ep.peer else 0
        device = self._find(node - 1)
        if device is None:
            self._log.warning("COSM connection from a node without a card", node=node)
            await ep.close()
        else:
            await device.adopt(ep)
