"""The control socket: what the CLI and scripts ask of the host process.

One connection, one request; a request may answer with several messages (progress, a stream of
events) and ends with ``{"done": true, ...}`` or ``{"error": sentence, "kind": class, "errno": n}``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mic_emu.config import CardConfig
from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError, StateError, UsageError, WaitTimeout
from mic_emu.faults import parse as parse_fault
from mic_emu.host import inspection, metrics, report, top
from mic_emu.host.admin import Admin
from mic_emu.version import PROTOCOL, VERSION
from mic_emu.wire import WireError
from mic_emu.wire_aio import AsyncChannel, UnixServer, serve_unix

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.daemon import Instance

EVENT_SCHEMA = 1
FOR_ALL_VERSIONS = ("status", "stop", "events")  # what ends or shows an emulator of another version
BACKLOG = 1000

Reply = dict[str, Any]
Request = Callable[[AsyncChannel, dict[str, Any], list[int]], Awaitable[Reply]]


class Control:
    """Front end of an instance."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._server: UnixServer | None = None
        self._listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self._captured: set[str] = set()  # cards
        self._recent: deque[dict[str, Any]] = deque(maxlen=BACKLOG)
        self._requests: dict[str, Request] = {
            "status": self._status, "boot": self._boot, "shutdown": self._shutdown, "reset": self._reset,
            "reboot": self._reboot, "wait": self._wait, "stop": self._stop, "events": self._events,
            "run": self._run, "host_ns": self._host_ns, "config": self._config, "dump": self._dump,
            "vop": self._vop, "vop_add": self._vop_add, "vop_remove": self._vop_remove,
            "vop_swap": self._vop_swap, "capture": self._capture,
            "backend": self._backend, "top": self._top,
            "fault_add": self._fault_add, "fault_list": self._fault_list, "fault_remove": self._fault_remove,
        }  # fmt: skip
        self._admin = Admin(instance)
        self._requests |= self._admin.requests

    async def open(self) -> None:
        """Listen."""
        self.instance.log.set_hook(self.publish)
        await self._admin.open()
        self._server = await serve_unix(str(self.instance.rundir.control), self._serve)

    async def close(self) -> None:
        """Stop listening; requests in work are cut off."""
        if self._server:
            await self._server.close()
        await self._admin.close()

    def publish(self, record: dict[str, Any]) -> None:
        """A log record that is an event goes to every listener."""
        if "event" not in record:
            return
        event = {"schema": EVENT_SCHEMA, **record}
        self._recent.append(event)
        for queue in self._listeners:
            if queue.qsize() < BACKLOG:
                queue.put_nowait(event)

    async def _serve(self, channel: AsyncChannel) -> None:
        msg, fds = await channel.recv(10.0, "a request")
        try:
            op = msg.get("op", "")
            if msg.get("protocol", PROTOCOL) != PROTOCOL and op not in FOR_ALL_VERSIONS:
                raise MicemuError(
                    f"this is micemu {msg.get('version')}, the emulator that runs is micemu {VERSION} and speaks "
                    "another protocol: end it with micemu stop, then micemu boot",
                    errno.EPROTO,
                )
            handler = self._requests.get(op)
            if handler is None:
                raise UsageError(
                    f"unknown request {op!r}: the emulator that runs is micemu {VERSION}, this is another version?"
                )
            reply = await handler(channel, msg, fds)
            out = reply.pop("_fds", [])
            await channel.send({"done": True, **reply}, out)
        except MicemuError as e:
            await channel.send({"error": str(e), "kind": type(e).__name__, "errno": e.errno, "code": e.code})
        except TimeoutError as e:
            await channel.send({"error": str(e), "kind": "WaitTimeout", "errno": errno.ETIMEDOUT})
        except (ConnectionError, WireError):
            raise
        except Exception as e:
            self.instance.log.error(f"{msg.get('op')}: {e!r}", traceback=traceback.format_exc())
            text = f"internal error in {msg.get('op')!r}: {e!r}; the log has the details (micemu log)"
            await channel.send({"error": text, "kind": "MicemuError", "errno": errno.EIO})
        finally:
            for fd in fds:
                os.close(fd)

    # --- life cycle ---------------------------------------------------------------------------

    async def _status(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"status": self.instance.status()}

    async def _top(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"look": await top.look(self.instance)}

    async def _boot(self, channel: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        configs = [CardConfig(**c) for c in msg["cards"]]
        names: list[str] = msg.get("names") or [f"mic{i}" for i in range(len(configs))]
        before = set(self.instance.cards)
        if msg.get("every"):  # nobody was named: those that are up already stay up, unless all are
            down = [n for n in names if n not in before or self.instance.cards[n].bootable]
            names = down or names
        for name in names:
            card = self.instance.cards.get(name)
            if card and not card.bootable:
                raise StateError(
                    f"{name} is {card.cosm.state.word} already: micemu reboot {name} restarts it",
                    errno.EINVAL,
                )
        try:
            await self.instance.plug(configs)
            cards = self.instance.select(names)
            for card in cards:
                card.cwd = msg.get("cwd", "/")
                if not msg.get("apart"):  # all or nothing, as far as it can be known before
                    await card.prepare(self._image(card))
            results = await asyncio.gather(
                *(self._boot_one(channel, c, bool(msg.get("apart"))) for c in cards), return_exceptions=True
            )
        except BaseException:
            await self._unplug_new(before)
            raise
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            await self._unplug_new(before, only_ready=True)
            raise _as_one(failed)
        return {"status": self.instance.status()}

    async def _boot_one(self, channel: AsyncChannel, card: Card, prepare: bool) -> None:
        if prepare:
            await card.prepare(self._image(card))
        await channel.send({"progress": card.name, "state": "booting"})
        await card.boot(self._image(card), card.config.ramdisk, card.config.cmdline)
        await channel.send({"progress": card.name, "state": card.cosm.state.word})

    async def _unplug_new(self, before: set[str], only_ready: bool = False) -> None:
        """A boot that failed leaves the instance as it was; cards that came up stay."""
        for card in list(self.instance.cards.values()):
            if card.name not in before and (not only_ready or card.cosm.state is State.READY):
                await self.instance.unplug(card)

    async def _each(self, names: list[str], action: Callable[[Card], Awaitable[None]]) -> Reply:
        cards = self.instance.select(names)
        results = await asyncio.gather(*(action(c) for c in cards), return_exceptions=True)
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            raise _as_one(failed)
        return {"status": self.instance.status()}

    async def _shutdown(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        names = msg.get("cards", [])
        if not names or names == ["all"]:
            names = [c.name for c in self.instance.cards.values() if c.cosm.state is not State.READY]
            if not names:
                return {"status": self.instance.status()}
        return await self._each(names, lambda c: c.shutdown(msg.get("timeout")))

    async def _reset(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        names = msg.get("cards", [])
        if not names or names == ["all"]:
            names = [c.name for c in self.instance.cards.values() if c.cosm.state is not State.READY]
            if not names:
                return {"status": self.instance.status()}
        return await self._each(names, lambda c: c.reset())

    async def _reboot(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return await self._each(msg.get("cards", []), lambda c: c.reboot(self._image(c)))

    @staticmethod
    def _image(card: Card) -> str:
        """The configured image, or the instance's own."""
        return card.config.image or str(card.micos)

    async def _wait(self, channel: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Until each card has shown one of the words; one time-out for all of them."""
        words = set(msg["states"])

        async def shown(card: Card) -> None:
            def there() -> bool:
                return card.cosm.state.word in words or card.cosm.shutdown_status.word in words

            try:
                await card.until(there, msg.get("timeout"), f"waiting for {' or '.join(sorted(words))}")
            except TimeoutError as e:
                raise WaitTimeout(f"{e}; it is {card.cosm.state.word}") from None

        cards = self.instance.select(msg.get("cards", []))
        all_shown = asyncio.gather(*(shown(c) for c in cards), return_exceptions=True)
        gone = asyncio.ensure_future(channel.recv_words(None, "the end of the one who waits"))
        try:
            both: set[asyncio.Future[Any]] = {all_shown, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            failed = [r for r in all_shown.result() if r is not None] if all_shown.done() else []
            if failed:
                raise failed[0]
            return {"status": self.instance.status()}
        finally:
            for task in (all_shown, gone):
                task.cancel()
            await asyncio.gather(all_shown, gone, return_exceptions=True)

    async def _stop(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        async def down(card: Card) -> None:
            try:
                await card.shutdown(msg.get("timeout"))
            except (MicemuError, OSError, TimeoutError) as e:
                self.instance.log.warning(f"{card.name}: {e}; it is reset")

        online = [c for c in self.instance.cards.values() if c.cosm.state is State.ONLINE]
        if msg.get("orderly"):
            await asyncio.gather(*(down(c) for c in online))
        self.instance.stopping.set()
        return {}

    # --- people and programs --------------------------------------------------------------------

    async def _events(self, channel: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if msg.get("recent"):
            last = msg.get("last") or 0  # 0: all, and then what comes
            for event in list(self._recent)[-last:]:  # a copy: it grows while we send
                await channel.send(event)
            if last:
                return {}
        self._listeners.add(queue)
        gone = asyncio.ensure_future(channel.recv_words(None, "the end of the listener"))
        sampler = None
        if every := msg.get("sample"):
            sampler = asyncio.ensure_future(self._samples(float(every), queue))
        try:
            while True:
                item = asyncio.ensure_future(queue.get())
                await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    item.cancel()
                    gone.exception()
                    return {}
                await channel.send(item.result())
        finally:
            if sampler:
                sampler.cancel()
            self._listeners.discard(queue)
            gone.cancel()

    async def _samples(self, every_s: float, queue: asyncio.Queue[dict[str, Any]]) -> None:
        """The metrics as events, one ``sample`` per ``every_s`` seconds; none while the listener is behind."""
        while True:
            values = await metrics.values(self.instance)
            if queue.qsize() < BACKLOG:
                event = {"schema": EVENT_SCHEMA, "time": round(time.time(), 6), "event": "sample"}
                queue.put_nowait({**event, "metrics": values})
            await asyncio.sleep(every_s)

    async def _run(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        if card.cosm.state is not State.ONLINE:
            raise card.not_online()
        return {"socket": str(card.dir / "run.sock"), "node": card.index + 1}

    async def _host_ns(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Descriptors of the emulator's own namespaces, for ``run host``."""
        return {
            "_fds": self.instance.network.namespace_fds(),
            "socket": str(self.instance.rundir / "scif.sock"),
            "user": os.geteuid(),
        }

    async def _config(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        config = replace(self.instance.config, cards=[c.config for c in self.instance.cards.values()])
        return {"config": config.to_dict()}

    async def _dump(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        if msg["what"] == "debugfs":
            return {"dump": await self._admin.sysfs.debug_text(card)}
        return {"dump": inspection.dump(card, msg["what"], msg.get("device"))}

    # --- devices ------------------------------------------------------------------------------------

    async def _vop(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"cards": {c.name: report.devices(c) for c in self.instance.select(msg.get("cards", []))}}

    async def _vop_add(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        backend = await card.online().add_device(msg["kind"], msg.get("options", {}))
        return {"device": backend.name}

    async def _vop_swap(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        backend = await card.online().swap_device(msg["device"], msg.get("options", {}))
        return {"device": backend.name}

    async def _vop_remove(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        await card.remove_device(msg["device"])
        return {}

    async def _fault_add(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        fault = parse_fault(msg["words"])
        try:
            number = card.faults.add(fault, card.config)
        except OSError as e:
            raise MicemuError(f"{card.name}: {e.strerror}", e.errno or errno.EIO) from e
        return {"id": number}

    async def _fault_list(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        return {"cards": {c.name: c.faults.rows() for c in self.instance.select(msg.get("cards", []))}}

    async def _fault_remove(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        (card,) = self.instance.select([msg["card"]])
        numbers = card.faults.numbers() if msg.get("all") else list(dict.fromkeys(msg["ids"]))
        for number in numbers:
            card.faults.get(number)  # all or none
        return {"removed": {n: card.faults.remove(n).hits for n in numbers}}

    async def _capture(self, channel: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Capture into the descriptor that came along until the client says anything more, or has gone."""
        (card,) = self.instance.select([msg["card"]])
        if not fds:
            raise UsageError("a capture needs the descriptor of its file")
        if card.name in self._captured:
            raise StateError(
                f"{card.name} is being captured already: end that micemu pcap first", errno.EBUSY
            )
        self._captured.add(card.name)
        try:
            await card.backend("net").call("pcap", fds[:1])
            while fds:
                os.close(fds.pop())  # whoever reads a pipe waits for the last of those who write
            try:
                await channel.send({"capturing": card.name})
                await channel.recv_words(None, "the end of a capture")
            finally:
                reply = await card.backend("net").call("pcap")
        finally:
            self._captured.discard(card.name)
        return {k: v for k, v in reply.items() if k != "reply"}

    async def _backend(self, _: AsyncChannel, msg: dict[str, Any], fds: list[int]) -> Reply:
        """Any request of a backend's own (``stats``, ``ping``)."""
        (card,) = self.instance.select([msg["card"]])
        request = {k: v for k, v in msg["request"].items() if k != "op"}
        reply = await card.backend(msg["device"]).call(
            msg["request"]["op"], limit_s=msg.get("limit", 5.0), **request
        )
        return {k: v for k, v in reply.items() if k != "reply"}


def _as_one(failed: list[BaseException]) -> BaseException:
    """The first error of several cards, with the sentences of all of them."""
    first = failed[0]
    if len(failed) > 1 and all(isinstance(f, MicemuError) for f in failed):
        first.args = ("; ".join(map(str, failed)),)
    return first
