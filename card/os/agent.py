"""What the emulator may ask a running card OS: ``micN/os.sock``, one request a connection."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

from mic_emu.card.os.disk import BlockDriver
from mic_emu.card.os.drivers import Environment, NetworkDriver
from mic_emu.card.os.pydriver import add_driver
from mic_emu.card.os.vop import VopCard
from mic_emu.layout import CONSTANTS as C
from mic_emu.scif.node import Node
from mic_emu.vop.loading import LoadError
from mic_emu.wire_aio import AsyncChannel, UnixServer, serve_unix

REQUEST_LIMIT_S = 10.0


class Agent:
    """Serves requests that need the card's drivers."""

    def __init__(self, environment: Environment, node: Node, vop: VopCard) -> None:
        self._env = environment
        self._node = node
        self._vop = vop
        self._server: UnixServer | None = None

    async def open(self) -> None:
        """Listen."""
        self._server = await serve_unix(str(Path(self._env.boot["dir"]) / "os.sock"), self._serve)

    async def close(self) -> None:
        """Stop; requests in work are cut off."""
        if self._server:
            await self._server.close()

    async def _serve(self, channel: AsyncChannel) -> None:
        msg = await channel.recv_words(REQUEST_LIMIT_S, "a request to the card OS")
        requests = {
            "ping": self._ping,
            "bench": self._bench,
            "driver": self._driver,
            "traffic": self._traffic,
            "intr_test": self._intr_test,
        }
        try:
            handler = requests.get(msg.get("op", ""))
            if handler is None:
                raise OSError(errno.EINVAL, f"unknown request {msg.get('op')!r}")
            await channel.send({"done": True, **await handler(msg)})
        except OSError as e:
            await channel.send({"error": e.strerror or str(e), "errno": e.errno})

    async def _traffic(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"peers": self._node.traffic.sums()}

    async def _intr_test(self, _: dict[str, Any]) -> dict[str, Any]:
        """The card driver's debug file of that name: every host doorbell, a second after each (HW 9)."""
        for doorbell in range(C["SRC_DOORBELLS"]):
            self._env.bus.ring_host(doorbell)
            await self._node.clock.pause(1.0)
        return {}

    async def _driver(self, msg: dict[str, Any]) -> dict[str, Any]:
        try:  # in a thread: importing runs the user's code
            kind = await asyncio.to_thread(add_driver, msg["driver"], msg["folder"], self._env)
        except LoadError as e:
            raise OSError(errno.EINVAL, str(e)) from e
        await self._vop.bind()
        return {"device_type": kind}

    async def _ping(self, msg: dict[str, Any]) -> dict[str, Any]:
        for driver in self._env.drivers:
            if isinstance(driver, NetworkDriver):
                got = await asyncio.to_thread(
                    driver.ping, msg["target"], msg["count"], msg["interval"], msg["timeout"]
                )
                return {"rtts": got.rtts_s}
        raise OSError(errno.ENODEV, "the card has no network")

    async def _bench(self, msg: dict[str, Any]) -> dict[str, Any]:
        for driver in self._env.drivers:
            if isinstance(driver, BlockDriver):
                args = (
                    msg["block"],
                    msg["depth"],
                    msg["seconds"],
                    msg["random"],
                    msg["write"],
                    msg["spin_us"],
                )
                return {"result": await asyncio.to_thread(driver.bench, *args)}
        raise OSError(errno.ENODEV, "the card has no disk")
