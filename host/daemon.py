"""The host process: owner of host memory, SCIF node 0, all cards and the control socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import time
from typing import IO, Any

from mic_emu import image
from mic_emu.clock import Clock
from mic_emu.config import HARDWARE, CardConfig, Config
from mic_emu.errors import MicemuError, NoSuchCard
from mic_emu.host import report
from mic_emu.host.card import Card
from mic_emu.host.control import Control
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.cosm_server import CosmServer
from mic_emu.host.faults import configured
from mic_emu.host.network import Network
from mic_emu.host.spawn import Spawner
from mic_emu.log import Log
from mic_emu.memory import Mapping, PageAllocator, create_shm
from mic_emu.rundir import RunDir
from mic_emu.scif.node import Node
from mic_emu.scif.service import ScifService, listen_at
from mic_emu.version import VERSION
from mic_emu.wire_aio import AsyncChannel

HOST_MEMORY_START = 1 << 20  # the first MiB stays unused: a zero address means "absent" everywhere


class Instance:
    """Everything one emulator instance has."""

    def __init__(self, rundir: RunDir, config: Config, spawner: Spawner, log: Log) -> None:
        self.rundir = rundir
        self.config = config
        self.spawner = spawner
        self.log = log
        self.clock = Clock(config.timing)
        self.started = time.time()
        self._began = time.monotonic()
        self.cards: dict[str, Card] = {}
        self.card_watchers: set[asyncio.Event] = set()  # set when a card is plugged in or removed
        self.stopping = asyncio.Event()
        self.host_fd = create_shm("host", config.host_memory)
        self.memory_view = Mapping(self.host_fd, config.host_memory)
        self.memory = PageAllocator(self.host_fd, HOST_MEMORY_START, config.host_memory)
        self.node = Node(0, self.memory, self.memory_view, self.clock, log.bind(part="scif"))
        self.network = Network(log.bind(part="network"))
        self.scif: ScifService | None = None
        # Ours as long as we live: after an upgrade of the package, the cards get the OS that we understand.
        self.micos = rundir / "micos.img"
        self._cosm_task: asyncio.Task[None] | None = None
        self._plug = asyncio.Lock()

    async def start(self) -> None:
        """Bring up what needs no card."""
        shutil.copyfile(image.built_in(), self.micos)
        await self.node.start()
        self.scif = ScifService(self.node, listen_at(self.rundir / "scif.sock"))
        self.scif.start()
        server = CosmServer.open(self.node.open(), self._find_cosm, self.log.bind(part="cosm"))
        self._cosm_task = asyncio.ensure_future(server.serve())

    def _find_cosm(self, index: int) -> CosmDevice | None:
        card = self.cards.get(f"mic{index}")
        return card.cosm if card else None

    async def plug(self, configs: list[CardConfig]) -> None:
        """Have cards mic0 .. with these configurations; existing ready cards take new values."""
        for index, config in enumerate(configs):
            configured(config, f"mic{index}")
        async with self._plug:
            for index, config in enumerate(configs):
                name = f"mic{index}"
                if name in self.cards:
                    await self._reconfigure(self.cards[name], config)
                    continue
                self.cards[name] = await self._new_card(index, config)
                self.tell_watchers()

    async def _new_card(self, index: int, config: CardConfig) -> Card:
        """A card, plugged in. Raises MicemuError."""
        card = Card(
            index, config, self.rundir.path, self.spawner, self.node, self.memory, self.clock, self.log
        )
        card.network = self.network
        card.micos = self.micos
        try:
            await card.open(self.host_fd)
        except OSError as e:
            raise MicemuError(
                f"{card.name}: cannot plug the card in: {e.strerror or e}", e.errno or errno.EIO
            ) from e
        return card

    @property
    def uptime_s(self) -> float:
        """Seconds since the start, whatever becomes of the wall clock."""
        return time.monotonic() - self._began

    def tell_watchers(self) -> None:
        """The set of cards has changed."""
        for watcher in self.card_watchers:
            watcher.set()

    async def _reconfigure(self, card: Card, config: CardConfig) -> None:
        if not card.is_ready or card.config == config:
            return
        if any(getattr(card.config, name) != getattr(config, name) for name in HARDWARE):
            faults = card.faults.from_command()  # they are the slot's, and stay
            await self.unplug(card)
            fresh = self.cards[card.name] = await self._new_card(card.index, config)
            self.cards = dict(sorted(self.cards.items(), key=lambda item: item[1].index))
            for fault in faults:
                try:
                    fresh.faults.add(fault, config)
                except MicemuError as e:
                    fresh.log.warning(f"the fault {fault} does not fit the new configuration: {e}")
            self.tell_watchers()
        else:
            card.reconfigure(config)

    async def unplug(self, card: Card) -> None:
        """Remove a card for good."""
        self.cards.pop(card.name, None)
        self.tell_watchers()
        await card.close()

    def select(self, names: list[str]) -> list[Card]:
        """Cards by name; none or ``all`` means every card. Raises NoSuchCard."""
        if not names or names == ["all"]:
            return list(self.cards.values())
        found = []
        for name in names:
            if name not in self.cards:
                known = ", ".join(self.cards) or "none is plugged in"
                raise NoSuchCard(f"there is no card {name}; cards: {known}")
            found.append(self.cards[name])
        return found

    def status(self) -> dict[str, Any]:
        """The contract of ``micemu status --json``."""
        return {
            "schema": 1,
            "instance": self.rundir.instance,
            "host": {
                "pid": os.getpid(),
                "init": os.getppid(),
                "started": self.started,
                "timing": self.clock.profile.name,
                "version": VERSION,
            },
            "cards": [report.status(card) for card in self.cards.values()],
        }

    async def stop(self) -> None:
        """Stop every card and leave nothing."""
        results = await asyncio.gather(*(c.close() for c in self.cards.values()), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                self.log.error(f"while stopping a card: {result!r}")
        self.cards.clear()
        if self._cosm_task:
            self._cosm_task.cancel()
        if self.scif:
            await self.scif.close()
        await self.node.close()
        self.network.close()


async def serve(args: dict[str, Any], init: AsyncChannel, ready: IO[bytes], log: Log) -> None:
    """Run the instance until it is told to stop or init is gone. ``ready`` hears when it serves, and is closed."""
    rundir = RunDir(args["instance"])
    spawner = Spawner(init)
    spawn_task = asyncio.ensure_future(spawner.serve())
    loop = asyncio.get_running_loop()
    instance = Instance(rundir, Config.from_dict(args["config"]), spawner, log)
    control = Control(instance)
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, instance.stopping.set)
    try:
        await instance.start()
        await control.open()
    except (OSError, MicemuError) as e:
        ready.write(json.dumps({"error": str(e)}).encode() + b"\n")
        raise
    ready.write(json.dumps({"ready": os.getpid()}).encode() + b"\n")
    ready.close()
    log.info("host process serves", event="host_start", instance=rundir.instance)
    stopping = asyncio.ensure_future(instance.stopping.wait())
    try:
        await asyncio.wait({stopping, spawn_task}, return_when=asyncio.FIRST_COMPLETED)
        if spawn_task.done():
            gone = spawn_task.exception()
            if not isinstance(gone, OSError):
                raise RuntimeError("the channel to init failed") from gone
            log.error(f"init is gone: the instance ends ({gone})")
            await control.close()
            rundir.remove()
            return
        await instance.stop()
        log.info("host process ends", event="host_stop")
        await control.close()
    finally:
        stopping.cancel()
        spawn_task.cancel()


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked. fds: channel to init, ready pipe."""
    log = Log(args["log_fd"], process="host")
    channel = AsyncChannel(socket.socket(fileno=fds[0]))
    ready = open(fds[1], "wb", buffering=0)
    try:
        asyncio.run(serve(args, channel, ready, log))
    except BaseException as e:
        # Before it served, somebody waits at the pipe for the reason; afterwards its number is another file's.
        with contextlib.suppress(OSError):
            if not ready.closed:
                ready.write(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode() + b"\n")
        raise
    return 0
