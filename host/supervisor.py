"""Starts the backends of a card at boot, and again when one dies (design.md decision 3).

A backend process opens its device through its channel (ADD_DEVICE) and then moves bytes alone. When
it ends, however it ends, its device is removed from the card (VOP-20); unless the card is stopping
or restarts are off, it is started again after a growing pause.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mic_emu import layout as L
from mic_emu.clock import Clock, wait_for
from mic_emu.errors import MicemuError
from mic_emu.host.spawn import Spawner
from mic_emu.host.vop import VopDevice, VopHost
from mic_emu.log import Log
from mic_emu.vop.bottom_half import DeviceSlot
from mic_emu.wire_aio import AsyncChannel

C = L.CONSTANTS

DRIVER_FAILED = "the card's driver could not start (micemu dump log says why)"
NO_DRIVER = "the card has no driver for virtio device type {}: micemu vop driver {} MODULE:CLASS loads one"
DRIVER_LIMIT = 8.0  # seconds from the card's having found a device to its driver's taking it
STOP_LIMIT_S = 3.0
MAX_PAUSE_S = 5.0


@dataclass(frozen=True)
class Plugged:
    """How somebody made a device of a card that ran: added it, or swapped what the configuration gave it."""

    op: str  # add, swap
    what: str  # kind of the device, name of the disk
    options: dict[str, Any]


class Backend:
    """One backend process and its device."""

    def __init__(self, kind: str, name: str, args: dict[str, Any], fds: list[int]) -> None:
        self.kind = kind
        self.name = name
        self.args = args
        self.fds = fds  # beyond the card's; the supervisor owns them
        self.pid = 0
        self.channel: AsyncChannel | None = None
        self.device: VopDevice | None = None
        self.facts: dict[str, Any] = {}  # what the backend told about itself (pty, mode, ...)
        self.leaving: asyncio.Future[None] | None = None  # the removal of its device
        self.config: bytes | None = None  # the card does not know it yet
        self.change: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()  # DRIVER_OK seen
        self.plugged: Plugged | None = None
        self.restarts = 0
        self.wanted = True  # False: it is being removed for good
        self.failed = ""
        self.trouble = ""  # what keeps a device that lives from working
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0

    @property
    def state(self) -> str:
        """What ``micemu status`` shows."""
        if self.failed or self.trouble:
            return "failed"
        if self.pid == 0:
            return "restarting" if self.restarts else "starting"
        if self.device is None:
            return "starting"
        return "running" if self.device.driver_ok else "added"

    async def call(
        self, op: str, fds: list[int] | None = None, limit_s: float = 5.0, **fields: Any
    ) -> dict[str, Any]:
        """Ask the backend something (``stats``, ``pcap``). Raises MicemuError."""
        if self.channel is None:
            raise MicemuError(f"the backend of {self.name} does not run")
        self._next += 1
        fut: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[self._next] = fut
        ident = self._next
        try:
            await self.channel.send({"op": op, "id": ident, **fields}, fds or ())
            reply = await wait_for(fut, limit_s)
        except asyncio.TimeoutError:
            raise MicemuError(f"the backend of {self.name} did not answer {op!r} in {limit_s:g} s") from None
        except OSError as e:
            raise MicemuError(f"the backend of {self.name} is gone: {e}") from e
        finally:
            self._replies.pop(ident, None)
        if "error" in reply:
            raise MicemuError(reply["error"])
        return reply

    def release(self) -> None:
        """Close what was opened for it."""
        while self.fds:
            os.close(self.fds.pop())

    def reply(self, msg: dict[str, Any]) -> None:
        fut = self._replies.get(msg.get("reply", 0))
        if fut and not fut.done():
            fut.set_result(msg)


class Supervisor:
    """The backends of one card between start and stop."""

    def __init__(
        self, card: str, spawner: Spawner, vop: VopHost, bus_fds: list[int], restart: str, clock: Clock, log: Log,
        on_change: Callable[[], None],
    ) -> None:  # fmt: skip
        self.card = card
        self.spawner = spawner
        self.vop = vop
        self.bus_fds = bus_fds
        self.restart = restart
        self.clock = clock
        self.log = log
        self.on_change = on_change
        self.backends: list[Backend] = []
        self.stopping = False
        self._tasks: dict[Backend, asyncio.Task[None]] = {}

    def add(self, backend: Backend) -> None:
        """Start a backend and keep it running."""
        self.backends.append(backend)
        self._tasks[backend] = asyncio.ensure_future(self._keep(backend))

    async def _keep(self, backend: Backend) -> None:
        pause = 0.05
        while backend.wanted and not self.stopping:
            began = self.clock.monotonic()
            try:
                await self._run(backend)
            except MicemuError as e:
                backend.failed = str(e)
                self.log.error(f"{backend.name}: {e}", device=backend.name)
                break
            if self.stopping or not backend.wanted:
                break
            if self.restart == "never":
                backend.failed = "it ended, and restart is off"
                break
            pause = 0.05 if self.clock.monotonic() - began > 10 else min(2 * pause, MAX_PAUSE_S)
            backend.restarts += 1
            self.log.warning(f"{backend.name} backend starts again", device=backend.name, pause_s=pause)
            await asyncio.sleep(pause)
        self.on_change()

    async def _run(self, backend: Backend) -> None:
        """One life of the process; returns when it has ended and its device is removed."""
        ours, theirs = socket.socketpair()
        channel = AsyncChannel(ours)
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_exit(status: int) -> None:
            if not exited.done():
                exited.set_result(status)

        try:
            backend.pid = await self.spawner.start(
                backend.kind, f"{self.card}-{backend.name}", {**backend.args, "card": self.card, "device": backend.name},
                [theirs.fileno(), *self.bus_fds, *backend.fds], on_exit,
            )  # fmt: skip
        except BaseException:
            channel.close()  # what may come to life all the same ends with it
            raise
        finally:
            theirs.close()
        backend.channel = channel
        serve = asyncio.ensure_future(self._serve(backend, channel))
        status = await exited
        # What it said before it died (its last error, say) is still in the socket.
        await asyncio.wait({serve}, timeout=1.0)
        serve.cancel()
        channel.close()
        backend.channel, backend.pid = None, 0
        backend.ready.clear()
        level = self.log.warning if backend.wanted and not self.stopping else self.log.info
        level(f"{backend.name} backend ended", event="backend_exit", device=backend.name, status=status)
        self.on_change()
        self._take_device(backend)
        if backend.leaving is not None:
            leaving, backend.leaving = backend.leaving, None
            await leaving
        if status == 0 and backend.facts.get("fatal"):
            raise MicemuError(backend.facts["fatal"])

    def _take_device(self, backend: Backend) -> None:
        """Nobody serves the rings any more: the device goes. Called when the backend says that it is done with
        them, and again when its process has ended, whatever it said."""
        if backend.device is not None:
            device, backend.device = backend.device, None
            self.on_change()
            self.vop.backend_gone(device)
            backend.leaving = asyncio.ensure_future(self.vop.remove(device))

    async def _serve(self, backend: Backend, channel: AsyncChannel) -> None:
        try:
            while True:
                msg, fds = await channel.recv(None, f"a message of the {backend.name} backend")
                for fd in fds:
                    os.close(fd)
                await self._message(backend, channel, msg)
        except OSError:
            return

    async def _message(self, backend: Backend, channel: AsyncChannel, msg: dict[str, Any]) -> None:
        op = msg.get("op")
        if "reply" in msg:
            backend.reply(msg)
        elif op == "add":
            await self._add_device(backend, channel, msg)
        elif op == "facts":
            backend.facts.update(msg["facts"])
        elif op == "driver_ok":
            backend.ready.set()
            backend.trouble = ""
            self.log.info(f"{backend.name} runs", event="driver_ok", device=backend.name)
            self.on_change()
        elif op == "done":
            self._take_device(backend)
        elif op == "driver_failed":
            backend.trouble = DRIVER_FAILED if msg["failed"] else ""
            if msg["failed"]:
                self.log.error(f"{backend.name}: {DRIVER_FAILED}", event="driver_failed", device=backend.name)
            self.on_change()
        elif op == "found" and backend.device:
            self._await_driver(backend, backend.device)
        elif op == "driver_lost":
            backend.ready.clear()
            self.on_change()
        elif op == "guest_ack" and backend.device:
            backend.device.acknowledged()
        elif op == "config" and backend.device:
            backend.config = bytes.fromhex(msg["config"])
            if backend.change is None or backend.change.done():
                backend.change = asyncio.ensure_future(self._configure(backend))
        elif op == "event":
            self.log.info(msg["message"], device=backend.name, **msg.get("fields", {}))

    async def _add_device(self, backend: Backend, channel: AsyncChannel, msg: dict[str, Any]) -> None:
        if backend.device is not None:  # VOP-38
            await channel.send({"error": f"{backend.name} has its device already", "errno": errno.EBUSY})
            return
        try:
            device = await self.vop.add(
                msg["type"], msg["num_vq"], msg["num"], msg["features"], bytes.fromhex(msg["config"]),
                msg.get("feature_len", 8),
            )  # fmt: skip
        except OSError as e:
            await channel.send({"error": e.strerror or str(e), "errno": e.errno})
            return
        except MicemuError as e:
            await channel.send({"error": str(e), "errno": e.errno})
            return
        backend.device = device
        self.on_change()
        slot: DeviceSlot = device.slot
        await channel.send({"slot": slot.to_dict()}, [device.irq.fd])

    def _await_driver(self, backend: Backend, device: VopDevice) -> None:
        """The card has found the device. When that is still all after a while, it has no driver for it: the card
        never says so."""

        def look() -> None:
            if backend.device is device and device.bottom.status() == C["VIRTIO_ACKNOWLEDGE"]:
                backend.trouble = NO_DRIVER.format(device.slot.kind, self.card)
                self.log.warning(f"{backend.name}: {backend.trouble}", device=backend.name)
                self.on_change()

        self.clock.alarm(self.clock.limit(DRIVER_LIMIT), look)

    async def _configure(self, backend: Backend) -> None:
        """Tell the card of the newest configuration. What came before, while the card had not yet answered, it never
        sees: each change holds up everybody's devices for as long as it does not answer."""
        while backend.config is not None and backend.device is not None:
            config, backend.config = backend.config, None
            try:
                await self.vop.config_change(backend.device, config)
            except MicemuError as e:
                self.log.info(f"configuration change: {e}")

    async def remove(self, backend: Backend) -> None:
        """Take one device away for good; nothing when the card's stop has done that meanwhile."""
        if backend not in self.backends:
            return
        self.backends.remove(backend)
        backend.wanted = False
        await self._end(backend)
        await asyncio.gather(self._tasks.pop(backend), return_exceptions=True)
        backend.release()

    async def _end(self, backend: Backend) -> None:
        """Ask a backend to finish what it has begun and go; kill it when it does not."""
        task = self._tasks.get(backend)
        if backend.channel:
            try:
                await backend.channel.send({"op": "stop"})
            except OSError:
                pass
        if task is None:
            return
        done, _ = await asyncio.wait({task}, timeout=STOP_LIMIT_S)
        if not done and backend.pid:
            _kill(backend.pid)

    async def stop(self) -> None:
        """Card stop: end all backends; their devices are removed as they end."""
        self.stopping = True
        for backend in self.backends:
            if backend.pid == 0:
                self._tasks[backend].cancel()
        await asyncio.gather(*(self._end(b) for b in self.backends))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for backend in self.backends:
            backend.release()
        self.backends.clear()
        self._tasks.clear()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
