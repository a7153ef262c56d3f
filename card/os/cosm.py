"""COSM client: connects to the host, answers, heartbeats, reports how the card goes down (COSM 5.4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mic_emu import layout as L
from mic_emu.clock import Clock
from mic_emu.cosm.states import Status
from mic_emu.log import Log
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.node import Node

C = L.CONSTANTS
POLLIN, POLLHUP = 1, 0x10
HEARTBEAT_INTERVAL = 30.0
CONNECT_TRIES = 10


class CosmClient:
    """One connection to node 0 port 201."""

    def __init__(
        self,
        node: Node,
        clock: Clock,
        log: Log,
        power_off: Callable[[], None],
        silent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._node = node
        self._clock = clock
        self._log = log
        self._power_off = power_off
        self._silent = silent  # a fault filter leaves the next heartbeat out
        self._ep: KernelEndpoint | None = None
        self.clock_offset_ns = 0  # host wall clock minus ours, from SYNC_TIME
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Connect with ten tries, then serve until the connection ends."""
        ep = await self._connect()
        if ep is None:
            self._log.error("COSM: the host does not answer; the card stays booting")
            return
        self._ep = ep
        self.connected.set()
        data = b""
        while True:
            revents = await ep.poll(POLLIN, self._clock.limit(HEARTBEAT_INTERVAL))
            try:
                while chunk := ep.recv_nowait(4096):
                    data += chunk
                while len(data) >= L.COSM_MSG.size:
                    message, data = data[: L.COSM_MSG.size], data[L.COSM_MSG.size :]
                    self._message(L.COSM_MSG.unpack(message))
                if revents & POLLHUP:
                    return
                # After every batch of messages and after every idle interval (COSM-42, COSM-44).
                if not self._silent():
                    await ep.send(L.COSM_MSG.pack(id=C["COSM_MSG_HEARTBEAT"]))
            except ScifError:
                return

    async def _connect(self) -> KernelEndpoint | None:
        for attempt in range(CONNECT_TRIES):
            ep = self._node.open()
            try:
                await ep.connect((0, C["SCIF_COSM_PORT"]))
                return ep
            except ScifError as e:
                await ep.close()
                self._log.warning(f"COSM: connect attempt {attempt + 1}: {e}")
                await self._clock.pause(1.0)
        return None

    def _message(self, msg: dict[str, int]) -> None:
        if msg["id"] == C["COSM_MSG_SHUTDOWN"]:
            self._log.info("the host asks for a power off")
            self._power_off()
        elif msg["id"] == C["COSM_MSG_SYNC_TIME"]:
            # The host's own clock is ours too; a real card would set its clock here.
            self.clock_offset_ns = msg["value"] * 1_000_000_000 + msg["nsec"] - time.time_ns()
        else:
            self._log.warning("unknown COSM message", id=msg["id"])

    async def report(self, status: Status) -> None:
        """The reboot notifier: tell the host how the card goes down, then close (COSM-31, COSM-32)."""
        if self._ep is None:
            return
        try:
            await self._ep.send(L.COSM_MSG.pack(id=C["COSM_MSG_SHUTDOWN_STATUS"], value=int(status)))
        except ScifError as e:
            self._log.warning(f"shutdown status not sent: {e}")

    async def close(self) -> None:
        """Close the endpoint: the host sees the hang-up and publishes the status."""
        ep, self._ep = self._ep, None
        if ep:
            await ep.close()
