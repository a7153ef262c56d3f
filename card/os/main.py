"""micos: the card's operating system. ``main`` is the first code of a downloaded image.

One process is the kernel: card driver, SCIF node, COSM client, VOP and the virtio drivers. Programs
run below a small init process, which is forked before any thread exists.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.os.agent import Agent
from mic_emu.card.os.bringup import BootError, CardDriver
from mic_emu.card.os.cosm import CosmClient
from mic_emu.card.os.drivers import Environment
from mic_emu.card.os.klog import KernelLog
from mic_emu.card.os.registry import drivers
from mic_emu.card.os.scif_link import CardLink
from mic_emu.card.os.tools import ToolServers
from mic_emu.card.os.userland import PANIC_STATUS, Userland
from mic_emu.card.os.vop import VopCard
from mic_emu.clock import Clock
from mic_emu.cosm.states import Status
from mic_emu.cosm.tools_proto import Facts
from mic_emu.dma import DRAIN_S
from mic_emu.log import Log
from mic_emu.memory import PageAllocator, page_align, window_allocator
from mic_emu.scif.node import Node
from mic_emu.scif.service import ScifService, listen_at
from mic_emu.version import VERSION

C = L.CONSTANTS


def command_line(bus: Bus, base: int, size: int) -> str:
    """The kernel command line from behind the image (COSM-21)."""
    raw = bus.gddr.read(base + size, min(C["CMDLINE_MAX"], bus.gddr.size - base - size))
    return raw.partition(b"\0")[0].decode(errors="replace")


def parameters(text: str) -> dict[str, str]:
    """``key=value`` words, and words alone. Any bytes may be there: what is no shell syntax is split at blanks."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    return {k: v for k, _, v in (w.partition("=") for w in words)}


class Kernel:
    """Everything that lives as long as the card is up."""

    def __init__(self, boot: dict[str, Any], bus: Bus, log: Log) -> None:
        self.boot = boot
        self.bus = bus
        self.log = log
        self.clock = Clock(boot["timing"])
        base, size = boot["base"], boot["size"]
        text = command_line(bus, base, size)
        log.info(f"Command line: {text}")
        self.params = parameters(text)
        self.ramdisk = self._ramdisk(base)
        first = max(2 * base, base + page_align(size + C["CMDLINE_MAX"]))
        if self.ramdisk:
            first = max(first, self.ramdisk[0] + self.ramdisk[1])
        self.memory = PageAllocator(bus.fds[lib.MIC_FD_GDDR], page_align(first), bus.gddr.size & ~4095)
        self.driver = CardDriver.probe(boot, bus, self.memory, log)
        self.node = Node(
            self.driver.node_id, self.memory, bus.gddr, self.clock, log.bind(part="scif"),
            window_allocator(self.memory, bus.gddr.size),
        )  # fmt: skip
        self._down: asyncio.Future[Status] | None = None

    def _ramdisk(self, base: int) -> tuple[int, int] | None:
        """Address and length that the host patched into the boot header, if they make sense."""
        at = self.bus.gddr.load(base + C["BOOT_RAMDISK_IMAGE"], 4)
        size = self.bus.gddr.load(base + C["BOOT_RAMDISK_SIZE"], 4)
        if not at or not size:
            return None
        if at + size > self.bus.gddr.size:
            raise BootError(
                f"the ramdisk at {at:#x} with {size} bytes does not lie in card memory", errno.EINVAL
            )
        return at, size

    async def run(self, userland: Userland) -> Status:
        """Bring everything up, serve until the card goes down, take everything down in order."""
        loop = asyncio.get_running_loop()
        self._down = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.go_down, Status.POWEROFF)
        userland.on_request(self.go_down)
        userland.start(loop)
        await self.node.start()
        scif = ScifService(self.node, listen_at(Path(self.boot["dir"]) / "scif.sock"))
        scif.start()
        environment = Environment(self.boot, self.params, self.bus, userland, self.log)
        environment.registry |= drivers(environment)
        vop = VopCard(
            self.bus, self.driver.page, self.memory, self.driver.interrupts, self.clock, self.log,
            environment.registry,
        )  # fmt: skip
        self.driver.dma.attach(loop)
        link = CardLink(self.node, self.bus, self.driver.page, self.driver.interrupts, self.driver.dma)
        link.start()
        client = CosmClient(
            self.node, self.clock, self.log, lambda: self.go_down(Status.POWEROFF),
            lambda: bool(lib.mic_fault_drops_heartbeat(self.bus.ptr)),
        )  # fmt: skip
        self.node.on_peer(lambda node, online: self._peer(client, node, online))
        agent = Agent(environment, self.node, vop)
        await agent.open()
        tools = ToolServers(self.node, self._facts(), self.log)
        tools.start()
        await vop.start()
        self.log.info("card is up", event="card_up", node=self.driver.node_id)
        status = await self._down
        self.log.info(f"going down: {status.word}", event="card_down", status=status.word)
        await agent.close()
        await tools.close()
        await userland.shutdown()
        await scif.close()
        await client.report(status)
        await client.close()
        await link.stop()
        await vop.close()
        self.driver.remove(self.clock.limit(DRAIN_S))
        await self.node.close()
        return status

    def _facts(self) -> Facts:
        """What the tools' services tell about this card."""
        serial = f"MICEMU{self.driver.node_id:06d}"
        return Facts(self.bus.gddr.size, os.cpu_count() or 1, f"micos {VERSION}", serial)

    def _peer(self, client: CosmClient, node: int, online: bool) -> None:
        if node == 0 and online:
            task = asyncio.ensure_future(client.run())
            task.add_done_callback(lambda t: t.cancelled() or t.exception())

    def go_down(self, status: Status) -> None:
        """Power off, halt or restart; the first request counts."""
        if self._down and not self._down.done():
            self._down.set_result(status)


def main() -> NoReturn:
    """Entry point of the image. 0 after an orderly end; a panic ends the process on the spot, because
    driver threads may be anywhere in C."""
    boot = json.loads(sys.argv[1])
    log = Log(boot["log_fd"], process="micos", card=boot["name"])
    bus = Bus(boot["fds"])
    log.set_hook(KernelLog(bus.gddr).record)
    try:
        kernel = Kernel(boot, bus, log)
        # The init process is forked here, while this process has one thread and no event loop.
        userland = Userland.fork(boot, kernel.params, kernel.ramdisk, bus, log)
        asyncio.run(kernel.run(userland))
    except BootError as e:
        log.error(f"panic: {e} ({errno.errorcode[e.errno]})")
        os._exit(e.errno)
    except BaseException as e:
        log.error(f"panic: {e!r}", traceback=traceback.format_exc())
        os._exit(PANIC_STATUS)
    os._exit(0)
