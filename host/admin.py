"""Requests of the administrator's side: sysfs, suspend and resume, forced reset, metrics (COSM 5.7, 6, 7)."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from mic_emu.clock import wait_for
from mic_emu.config import HARDWARE, CardConfig
from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError, StateError
from mic_emu.host import metrics
from mic_emu.host.devices import block
from mic_emu.host.logfile import keep_small
from mic_emu.host.supervisor import Plugged
from mic_emu.host.sysfs import Sysfs, watch_states
from mic_emu.peers import restrict
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.wire_aio import AsyncChannel

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.daemon import Instance

SCRAPE_LIMIT_S = 5.0  # for the request, and again for taking the answer

Reply = dict[str, Any]
Request = Callable[[AsyncChannel, dict[str, Any], list[int]], Awaitable[Reply]]


class Admin:
    """Control requests by name, and the metrics socket."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.sysfs = Sysfs(instance)
        self.suspended: dict[str, list[Plugged]] = {}  # cards that a resume boots again, with their devices
        self._metrics: list[asyncio.AbstractServer] = []
        self._rotation: asyncio.Task[None] | None = None
        self.requests: dict[str, Request] = {
            "sysfs_list": self._sysfs_list, "sysfs_read": self._sysfs_read, "sysfs_write": self._sysfs_write,
            "sysfs_watch": self._sysfs_watch, "suspend": self._suspend, "resume": self._resume,
            "force_reset": self._force_reset, "metrics": self._metrics_text,
            "scif_ask": self._scif_ask, "plug": self._plug, "reload": self._reload,
        }  # fmt: skip

    async def open(self) -> None:
        """Serve the metrics: ``metrics.sock`` in the run directory, and a loopback port if one is configured.
        Raises MicemuError."""
        path = self.instance.rundir.path / "metrics.sock"
        self._metrics.append(await asyncio.start_unix_server(self._scrape, str(path)))
        restrict(path)
        if port := self.instance.config.metrics_port:
            try:
                self._metrics.append(await asyncio.start_server(self._scrape, "127.0.0.1", port))
            except OSError as e:
                why = os.strerror(e.errno or errno.EIO)
                raise MicemuError(f"metrics_port {port} cannot be had: {why}", e.errno or errno.EIO) from e
        self._rotation = asyncio.ensure_future(keep_small(self.instance.rundir.log, self.instance.log))

    async def close(self) -> None:
        """Stop serving."""
        for server in self._metrics:
            server.close()
        if self._rotation:
            self._rotation.cancel()

    # --- sysfs; bytes travel as Latin-1 text --------------------------------------------------------

    async def _sysfs_list(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"files": {path: [f.mode, f.wakes] for path, f in self.sysfs.tree().items()}}

    async def _sysfs_read(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"data": (await self.sysfs.file(msg["path"]).read()).decode("latin-1")}

    async def _sysfs_write(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        await self.sysfs.write(msg["path"], msg["data"].encode("latin-1"))
        return {}

    async def _sysfs_watch(self, channel: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """One message ``{"card", "changes", "state"}`` per change of a state, the present ones first; a
        reader that is slow misses states, never the last one (COSM-57)."""
        gone = asyncio.ensure_future(channel.recv_words(None, "the end of the watcher"))
        try:
            await watch_states(self.instance, channel, gone)
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        return {}

    # --- suspend, resume, forced reset ----------------------------------------------------------------

    async def _suspend(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Remember which cards are up, shut them down in order, then what the driver does: reset whatever
        still runs. Never refused (COSM-59)."""
        cards = list(self.instance.cards.values())
        for card in cards:
            if card.cosm.state is State.ONLINE:
                self.suspended[card.name] = card.running.plugged() if card.running else []
        await asyncio.gather(*(self._suspend_one(c, msg.get("timeout")) for c in cards))
        self.instance.log.info("suspended", event="suspend", cards=sorted(self.suspended))
        return {"status": self.instance.status(), "suspended": sorted(self.suspended)}

    async def _suspend_one(self, card: Card, limit_s: float | None) -> None:
        if card.cosm.state is State.ONLINE:
            try:
                await card.shutdown(limit_s)
            except (MicemuError, ScifError, TimeoutError) as e:
                card.log.warning(f"{e}; it is reset")
        await card.cosm.suspend()

    async def _resume(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Boot what was online at the suspend, with the devices that it had."""
        were, self.suspended = self.suspended, {}
        cards = [c for c in self.instance.cards.values() if c.name in were and c.cosm.state is State.READY]

        async def up(card: Card) -> None:
            await card.boot_stored()
            await card.online().plug(were[card.name])

        results = await asyncio.gather(*(up(c) for c in cards), return_exceptions=True)
        failed = [r for r in results if isinstance(r, BaseException)]
        self.instance.log.info("resumed", event="resume", cards=sorted(c.name for c in cards))
        if failed:
            raise failed[0]
        return {"status": self.instance.status()}

    async def _force_reset(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """T22: in every state, synchronous (COSM-40)."""
        cards = self.instance.select(msg.get("cards", []))
        await asyncio.gather(*(c.cosm.stop(force=True) for c in cards))
        failed = [c.name for c in cards if c.cosm.state is State.RESET_FAILED]
        if failed:
            raise StateError(f"{', '.join(failed)}: the firmware did not become ready", errno.EIO)
        return {"status": self.instance.status()}

    # --- the service ----------------------------------------------------------------------------------

    async def _plug(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Have these cards, without booting them."""
        await self.instance.plug([CardConfig(**c) for c in msg["cards"]])
        return {"status": self.instance.status()}

    async def _reload(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """New configurations: at once for cards that are down and for disks of cards that are up (VOP-62),
        at the next boot for the rest. ``kept``: what a card that is up keeps of its hardware, by card."""
        configs = [CardConfig(**c) for c in msg["cards"]]
        before = {name: card.config for name, card in self.instance.cards.items()}
        kept: dict[str, list[str]] = {}
        await self.instance.plug(configs)
        for index, config in enumerate(configs):
            card = self.instance.cards[f"mic{index}"]
            old = card.config
            if card.cosm.state is State.READY or old == config:
                continue
            kept[card.name] = [k for k in HARDWARE if getattr(old, k) != getattr(config, k)]
            card.reconfigure(dataclasses.replace(config, **{k: getattr(old, k) for k in HARDWARE}))
            if any(getattr(old, k) != getattr(config, k) for k in ("disk", "disk_size", "read_only")):
                await self._swap_disk(card)
        changed = [n for n, card in self.instance.cards.items() if before.get(n) != card.config]
        self.instance.log.info("configuration read again", event="reload", cards=changed)
        return {"changed": changed, "kept": {name: keys for name, keys in kept.items() if keys}}

    async def _swap_disk(self, card: Card) -> None:
        """The card sees its disk go and the new one come."""
        if card.running is None:
            return
        supervisor = card.running.supervisor
        fresh = block(card, "block", card.config) if card.config.disk != "none" else None
        for backend in [b for b in supervisor.backends if b.name == "block"]:
            await supervisor.remove(backend)
        if fresh:
            supervisor.add(fresh)

    # --- a card's services ----------------------------------------------------------------------------

    async def _scif_ask(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Send ``data`` (hex) to ``port`` of a card from a privileged port; the answer as hex: ``head``
        bytes, and as many more as the 16-bit word at ``length_at`` says."""
        (card,) = self.instance.select([msg["card"]])
        ep = self.instance.node.open()
        try:
            return await wait_for(self._ask(ep, card.index + 1, msg), 5.0)
        except ScifError as e:
            raise MicemuError(f"{card.name}: port {msg['port']}: {e}", e.errno or errno.EIO) from e
        except asyncio.TimeoutError:
            raise MicemuError(f"{card.name}: port {msg['port']}: no answer", errno.ETIMEDOUT) from None
        finally:
            await ep.close()

    async def _ask(self, ep: KernelEndpoint, node: int, msg: dict[str, Any]) -> Reply:
        self._bind_privileged(ep)
        await ep.connect((node, msg["port"]))
        await ep.send(bytes.fromhex(msg["data"]))
        head = await ep.recv(msg["head"])
        at = msg["length_at"]
        rest = await ep.recv(int.from_bytes(head[at : at + 2], "little")) if len(head) == msg["head"] else b""
        return {"data": (head + rest).hex()}

    def _bind_privileged(self, ep: KernelEndpoint) -> None:
        """A free port from 1023 downwards: the proof of root that the services look at."""
        for port in range(1023, 900, -1):
            try:
                ep.bind(port)
                return
            except ScifError:
                continue
        raise MicemuError("no privileged SCIF port is free", errno.ENOSPC)

    # --- metrics ------------------------------------------------------------------------------------

    async def _metrics_text(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"text": await metrics.render(self.instance)}

    async def _scrape(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One HTTP request; whatever the path, the metrics are the answer."""
        try:
            await wait_for(reader.readuntil(b"\r\n\r\n"), SCRAPE_LIMIT_S)
            body = (await metrics.render(self.instance)).encode()
            head = (
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            writer.transport.set_write_buffer_limits(0)  # drained is what the client's socket has
            await wait_for(writer.drain(), SCRAPE_LIMIT_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            writer.transport.abort()  # a client that went away, was none, or does not read: nothing is kept for it
        finally:
            writer.close()
