"""One card's board process as the host sees it: started over the slot's memories, what it reports, its successor."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mic_emu.clock import settle, wait_for
from mic_emu.config import CardConfig
from mic_emu.errors import MicemuError
from mic_emu.host.spawn import Spawner
from mic_emu.log import Log
from mic_emu.wire_aio import AsyncChannel

POWER_ON_LIMIT_S = 10.0
SUCCESSORS_S = (0.0, 0.1, 0.5, 2.0, 5.0)  # pauses before each try to start one


class Board:
    """Who runs it, and the card OS on it.

    ``notify`` is called after every report. ``os_exited`` gets to know how the OS ended by itself, "" for in
    order. ``new_memory`` gets a descriptor of the card's memory after a reset, and closes it. ``lost`` is
    called when the board process died, ``replaced`` when its successor has power.
    """

    def __init__(
        self, index: int, config: CardConfig, directory: Path, timing: str, spawner: Spawner, fds: list[int],
        log: Log,
    ) -> None:  # fmt: skip
        self.name = f"mic{index}"
        self.pid = 0
        self.os_pid = 0
        self.contained: dict[str, Any] = {}
        self.refused = ""  # why the bootstrap refused the last image
        self.notify: Callable[[], None] = lambda: None
        self.os_exited: Callable[[str], None] = lambda _: None
        self.new_memory: Callable[[int], None] = os.close
        self.lost: Callable[[], None] = lambda: None
        self.replaced: Callable[[], None] = lambda: None
        self._args = {
            "name": self.name, "index": index, "dir": str(directory), "namespaces": config.namespaces, "timing": timing,
        }  # fmt: skip
        self._spawner = spawner
        self._fds = fds
        self._log = log
        self._channel: AsyncChannel | None = None
        self._powered: asyncio.Future[None] | None = None
        self._server: asyncio.Task[None] | None = None
        self._successor: asyncio.Task[None] | None = None
        self._closing = False
        self._off = False

    async def power_on(self) -> None:
        """Start the board process and wait until it says that it has power. Raises OSError (no memory for the card),
        MicemuError."""
        ours, theirs = socket.socketpair()
        if self._channel:
            self._channel.close()
        self._channel = AsyncChannel(ours)
        powered = self._powered = asyncio.get_running_loop().create_future()
        try:
            pid = await self._spawner.start(
                "board", f"{self.name}-board", self._args, [theirs.fileno(), *self._fds], self._exited
            )
        finally:
            theirs.close()
        if not powered.done():  # else it has ended
            self.pid = pid
        self._server = asyncio.ensure_future(self._serve(self._channel, powered))
        try:
            await wait_for(powered, POWER_ON_LIMIT_S)
        except asyncio.TimeoutError:
            why = f"the board process does not say that it has power within {POWER_ON_LIMIT_S:g} s"
            raise MicemuError(f"{self.name}: {why}", errno.ETIMEDOUT) from None

    async def _serve(self, channel: AsyncChannel, powered: asyncio.Future[None]) -> None:
        try:
            while True:
                msg, fds = await channel.recv(None, "a message of the board")
                event = msg.get("event")
                if event == "power_on":
                    settle(powered)
                elif event == "memory":
                    await self._new_memory(channel, msg["generation"], fds[0])
                elif event == "no_memory" and not powered.done():
                    powered.set_exception(OSError(msg["errno"], msg["why"]))
                elif event == "os_start":
                    self.os_pid, self.contained = msg["pid"], msg["contained"]
                    self._log.info(
                        "card OS started", event="os_start", pid=msg["pid"], contained=msg["contained"]
                    )
                elif event == "refused":
                    self.refused = msg["why"]
                elif event == "os_exit":
                    self._os_exit(msg["status"], msg["reset"])
                self.notify()
        except OSError:
            return

    async def _new_memory(self, channel: AsyncChannel, generation: int, fd: int) -> None:
        """A reset: from here on the aperture shows the new memory, also to what starts later."""
        try:
            self.new_memory(fd)
        except OSError as e:
            self._log.error(f"the card does not get ready: {e}")
        else:
            await channel.send({"generation": generation})

    def _os_exit(self, status: int, reset: bool) -> None:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._log.info(f"card OS ended: {how}", event="os_exit", status=status, reset=reset)
        self.os_pid = 0
        if not reset:
            self.os_exited(how if status else "")

    def _exited(self, status: int) -> None:
        """The board process died: the hardware fell off the bus. Plug in a new one (design.md 11)."""
        self.pid = self.os_pid = 0
        if self._powered and not self._powered.done():
            why = f"{self.name}: the board process ended with status {status} before it had power"
            self._powered.set_exception(MicemuError(why, errno.EIO))
            return
        if self._off:
            return
        fate = "the card is being removed" if self._closing else "a new board takes its place"
        self._log.error(f"the board process died; {fate}", event="board_exit", status=status)
        self.lost()
        if self._closing:
            return
        self._successor = asyncio.ensure_future(self._replace())

    async def _replace(self) -> None:
        """With pauses that grow: where a process cannot live, as many as can be forked would not, either."""
        for pause_s in SUCCESSORS_S:
            await asyncio.sleep(pause_s)
            try:
                await self.power_on()
            except MicemuError as e:
                self._log.error(f"the new board does not start: {e}")
            except OSError as e:  # it lives, and a reset tries again
                self._log.error(f"the new board has no power: {e}")
                break
            else:
                break
        self.replaced()

    def keep_off(self) -> None:
        """The card is being removed: when this board ends, none takes its place."""
        self._closing = True

    async def close(self) -> None:
        """Power off: the process ends with its channel."""
        self._off = True
        tasks = [t for t in (self._server, self._successor) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._channel:
            self._channel.close()
