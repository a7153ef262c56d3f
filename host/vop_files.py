"""The host's end of ``mic_emu.vop.device_file``: who opens ``micN/vop.sock`` may add one device (VOP 5)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

from mic_emu.clock import wait_for
from mic_emu.dma import DmaChannel
from mic_emu.errors import MicemuError
from mic_emu.host.vop import VopDevice, VopHost
from mic_emu.host.vop_dma import ProgramDma
from mic_emu.log import Log
from mic_emu.peers import peer_credentials
from mic_emu.vop.device_file import COUNTERS
from mic_emu.wire_aio import AsyncChannel, UnixServer, serve_unix

RELEASE_LIMIT = 6.0  # a copy that runs ends within 5 s (VOP-32)


class _File:
    """One open file."""

    def __init__(self, channel: AsyncChannel) -> None:
        self.channel = channel
        self.pid = peer_credentials(channel.sock)[0]
        self.device: VopDevice | None = None
        self.dma: ProgramDma | None = None
        self.released = asyncio.Event()
        self.change: asyncio.Task[None] | None = None  # of its configuration
        self.counting: asyncio.Future[dict[str, int]] | None = None  # who waits for its counters


class VopFiles:
    """The open files of one card, between its start and stop."""

    def __init__(
        self,
        vop: VopHost,
        personality: str,
        log: Log,
        channel: Callable[[], DmaChannel | None] = lambda: None,
    ) -> None:
        self.vop = vop
        self.channel = channel  # of the host, for programs that ask for DMA
        self.personality = personality
        self.log = log
        self._files: set[_File] = set()
        self._server: UnixServer | None = None
        self._closing = False

    async def listen(self, path: str) -> None:
        """Files can be opened from now on."""
        self._server = await serve_unix(path, self.serve)

    async def serve(self, channel: AsyncChannel) -> None:
        """One open file until it is closed, however its process ends (VOP-20)."""
        file = _File(channel)
        self._files.add(file)
        try:
            await channel.send({"personality": self.personality, "page": self.vop.page_off}, self.vop.bus.fds)
            while True:
                msg = await channel.recv_words(None, "a request of a device file")
                await self._message(file, msg)
        except OSError:
            pass
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            self.log.warning(f"the program of a device file (process {file.pid}) talks nonsense: {e!r:.200}")
        finally:
            self._files.discard(file)
            file.released.set()
            await self._remove(file)

    async def _message(self, file: _File, msg: dict[str, Any]) -> None:
        op = msg.get("op")
        if op == "add":
            await self._add(file, msg)
        elif op == "config":
            if file.change is not None and not file.change.done():  # libraries wait for the answer first
                raise ValueError("a change of its configuration while another one is under way")
            # A task: the card's answer arrives on the same channel meanwhile.
            file.change = asyncio.ensure_future(self._config(file, bytes.fromhex(msg["config"])))
        elif op == "guest_ack" and file.device:
            file.device.acknowledged()
        elif op == "released":
            file.released.set()
        elif op == "close":  # as the real close, which returns when the device is gone (VOP 4.7)
            file.released.set()
            await self._remove(file)
            await file.channel.send({"op": "closed"})
        elif op == "counters" and file.counting and not file.counting.done():
            told = msg["counters"]
            file.counting.set_result({name: int(told.get(name, 0)) for name in COUNTERS})

    async def _add(self, file: _File, msg: dict[str, Any]) -> None:
        if file.device is not None or self._closing:
            code = errno.EBUSY if file.device else errno.ENODEV
            await file.channel.send({"errno": code, "error": "ADD_DEVICE is not possible now"})
            return
        try:
            file.device = await self.vop.add(
                msg["type"],
                msg["num_vq"],
                msg["num"],
                msg["features"],
                bytes.fromhex(msg["config"]),
                msg["feature_len"],
            )
        except (OSError, MicemuError) as e:
            await file.channel.send({"errno": e.errno, "error": str(e)})
            return
        reply: dict[str, Any] = {"slot": file.device.slot.to_dict()}
        fds = [file.device.irq.fd]
        if msg.get("dma"):
            try:
                file.dma = self._dma()
                reply["bounce"] = [file.dma.offset, file.dma.address]
                fds.append(file.dma.theirs.fileno())
            except (OSError, MemoryError) as e:
                self.log.warning(f"{file.device.name}: no DMA for a program's device, the CPU copies: {e}")
        await file.channel.send(reply, fds)

    def _dma(self) -> ProgramDma:
        channel, vop = self.channel(), self.vop
        if channel is None:
            raise OSError(errno.ENODEV, "the host has no channel")
        return ProgramDma(channel, vop.memory, vop.smpt, vop.bus.gddr.size, vop.clock)

    async def _config(self, file: _File, config: bytes) -> None:
        reply: dict[str, Any] = {"errno": errno.EINVAL, "error": "no device"}
        if file.device:
            try:
                reply = {"acked": await self.vop.config_change(file.device, config)}
            except MicemuError as e:
                reply = {"errno": e.errno, "error": str(e)}
        try:
            await file.channel.send(reply)
        except OSError:
            pass  # it was closed meanwhile

    async def _remove(self, file: _File) -> None:
        dma, file.dma = file.dma, None
        if dma:
            ended = await dma.close()
            if ended:
                dma.free()
            else:
                self.vop.hold(dma.free)
        device, file.device = file.device, None
        if device:
            await self.vop.remove(device)

    def programs(self) -> list[tuple[VopDevice, int]]:
        """The devices of the open files, each with the pid of its program (0: of another pid namespace)."""
        return [(f.device, f.pid) for f in self._files if f.device]

    async def counters(self, limit_s: float) -> dict[int, dict[str, int]]:
        """Bytes that each file's device has moved, by ``id`` of the device (VOP-31); who does not answer within
        ``limit_s`` seconds is left out."""
        asked = [f for f in self._files if f.device]
        rows = await asyncio.gather(*(self._counters(f, limit_s) for f in asked))
        return {id(f.device): row for f, row in zip(asked, rows, strict=True) if row is not None}

    async def _counters(self, file: _File, limit_s: float) -> dict[str, int] | None:
        ask = file.counting is None or file.counting.done()
        if file.counting is None or ask:
            file.counting = asyncio.get_running_loop().create_future()
        try:
            if ask:
                await file.channel.send({"op": "counters"})
            return await wait_for(asyncio.shield(file.counting), limit_s)
        except (OSError, TimeoutError, asyncio.TimeoutError):
            return None

    async def close(self) -> None:
        """Card stop: no new files; the open ones are told, wait for their copies and are dead (VOP-19, 55)."""
        self._closing = True
        await asyncio.gather(*(self._end(file) for file in list(self._files)))  # one limit for all of them
        if self._server:
            await self._server.close()

    async def _end(self, file: _File) -> None:
        try:
            await file.channel.send({"op": "removed"})
            await self.vop.clock.within(file.released.wait(), RELEASE_LIMIT, "the release of a device file")
        except (OSError, TimeoutError):
            self.log.warning("a device file does not let go of its device; it is removed anyway")
        await self._remove(file)
