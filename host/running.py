"""What the host has of a card between its start and its stop: SCIF link, virtio devices, their backends (HW 6.3, 8.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mic_emu.errors import MicemuError
from mic_emu.host.devices import extra_device, plan, swapped_block
from mic_emu.host.scif_link import HostLink
from mic_emu.host.supervisor import Backend, Plugged, Supervisor
from mic_emu.host.vop import VopHost
from mic_emu.host.vop_files import VopFiles

if TYPE_CHECKING:
    from mic_emu.host.card import Card

DEVICE_LIMIT = 40.0  # the specification's seconds until a device that was added must be driven


class Running:
    """Made for one start of ``card``; ``start`` brings it up, ``stop`` takes all of it down, also half of it."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.stopped = False
        driver = card.driver
        self.vop = VopHost(
            card.bus, driver.page_off, card.memory, driver.smpt, driver.irq, card.clock, card.log
        )
        self.vop.peer_alive = lambda: card.board.os_pid != 0
        self.vop.hold = driver.hold
        self.supervisor = Supervisor(
            card.name, card.spawner, self.vop, card.bus.fds, card.config.restart, card.clock, card.log, card.notify
        )  # fmt: skip
        self.files = VopFiles(
            self.vop,
            card.config.personality,
            card.log,
            lambda: driver.dma.channels[0] if driver.dma else None,
        )  # channel 0 is VOP's (HW 5.1)
        self.link = HostLink(
            card.node, card.index + 1, card.bus, driver, card.memory, card.clock, card.log
        )  # last: it takes an interrupt
        self.link.link.service_path = card.dir / "scif.sock"  # where the card takes other cards' memories

    async def start(self) -> None:
        """Publish the SCIF queue pair, take device files, start the backends of the configuration."""
        self.link.start()
        await self.files.listen(str(self.card.dir / "vop.sock"))
        for backend in plan(self.card):
            self.supervisor.add(backend)

    def peer_died(self) -> None:
        """The card OS is gone without a word: nothing waits for it any more."""
        self.link.down()
        self.vop.peer_died()

    async def stop(self) -> None:
        """VOP, then SCIF; the driver frees its DMA channels afterwards (HW-49)."""
        self.stopped = True
        await self.supervisor.stop()
        await self.files.close()
        await self.vop.close()
        await self.link.stop()

    # --- hot-plug -----------------------------------------------------------------------------------

    async def add_device(self, kind: str, options: dict[str, Any]) -> Backend:
        """Hot-plug a device and wait until the card drives it. Raises MicemuError, TimeoutError."""
        backend = extra_device(self.card, kind, options)
        backend.plugged = Plugged("add", kind, {**options, "name": backend.name})
        return await self._bring_up(backend)

    async def swap_device(self, name: str, options: dict[str, Any]) -> Backend:
        """Another image for a disk: the card sees it go and a new one come (VOP-62). An image that
        cannot be opened changes nothing."""
        old = self.card.backend(name)
        fresh = swapped_block(self.card, old, options)
        added = old.plugged is not None and old.plugged.op == "add"
        fresh.plugged = (
            Plugged("add", "block", {**options, "name": name}) if added else Plugged("swap", name, options)
        )
        await self.supervisor.remove(old)
        return await self._bring_up(fresh)

    def plugged(self) -> list[Plugged]:
        """What somebody has made of the devices since the boot."""
        return [b.plugged for b in self.supervisor.backends if b.plugged]

    async def plug(self, plugged: list[Plugged]) -> None:
        """The same again, after another boot. Raises MicemuError, TimeoutError."""
        for p in plugged:
            await (self.add_device if p.op == "add" else self.swap_device)(p.what, p.options)

    async def _bring_up(self, backend: Backend) -> Backend:
        card = self.card
        if self.stopped:  # meanwhile
            backend.release()
            raise card.not_online()
        self.supervisor.add(backend)
        try:
            await card.until(
                lambda: backend.ready.is_set() or bool(backend.failed or backend.trouble) or self.stopped,
                card.clock.limit(DEVICE_LIMIT),
                f"{backend.name} on the card",
            )
        except TimeoutError:
            await self.supervisor.remove(backend)
            raise
        if self.stopped:
            raise card.not_online()
        if backend.failed or backend.trouble:
            await self.supervisor.remove(backend)
            raise MicemuError(f"{card.name}: {backend.name}: {backend.failed or backend.trouble}")
        return backend
