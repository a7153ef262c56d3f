"""One card as the host process holds it: slot, board process, driver, state machine, and what runs while it is up."""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from mic_emu import layout as L
from mic_emu.bar import Bus, close_all, create_slot
from mic_emu.clock import Clock, wait_for
from mic_emu.config import CardConfig
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError, StateError, UsageError
from mic_emu.host.board import Board
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.devices import check, check_classes
from mic_emu.host.driver import Driver, check_file
from mic_emu.host.faults import CardFaults, configured
from mic_emu.host.network import Network
from mic_emu.host.policy import Policy
from mic_emu.host.running import Running
from mic_emu.host.spawn import Spawner
from mic_emu.host.supervisor import Backend
from mic_emu.host.vop import VopDevice
from mic_emu.log import Log
from mic_emu.memory import PageAllocator
from mic_emu.pciconfig import PciIdentity, build, placed, revision_of
from mic_emu.scif.node import Node

C = L.CONSTANTS
BOOT_LIMIT = 240.0  # the specification's seconds until `boot` gives up; the state machine itself never does
DEFAULT_FIRMWARE = "mic/uos.img"


class Card:
    """Created by ``open``; ``close`` undoes everything."""

    def __init__(
        self, index: int, config: CardConfig, rundir: Path, spawner: Spawner, node: Node, memory: PageAllocator,
        clock: Clock, log: Log,
    ) -> None:  # fmt: skip
        self.index = index
        self.name = f"mic{index}"
        self.config = config
        self.dir = rundir / self.name
        self.spawner = spawner
        self.node = node
        self.memory = memory
        self.clock = clock
        self.log = log.bind(card=self.name)
        self.os_ended = ""
        self.boots = 0
        self.crashes = 0
        self.cwd = "/"
        self.micos = Path(os.devnull)  # the built-in card OS
        self.running: Running | None = None  # between start and stop
        self.network: Network | None = None
        self._waiters: set[asyncio.Event] = set()
        self._tasks: list[asyncio.Task[Any]] = []

    # --- power ----------------------------------------------------------------------------------

    async def open(self, host_fd: int) -> None:
        """Plug the card in: slot, board process, probe. Undoes itself when it fails."""
        self.dir.mkdir(mode=0o750, exist_ok=True)
        async with AsyncExitStack() as undo:
            fds = create_slot(self.name, self.config.memory, host_fd)
            try:
                self.bus = Bus(fds)
            except BaseException:
                close_all(fds)
                raise
            undo.callback(self.bus.close)
            await self._plug_in(undo)
            undo.pop_all()

    async def _plug_in(self, undo: AsyncExitStack) -> None:
        self.bus.set_over_pci()
        build(self.bus, self._identity())
        self.faults = CardFaults(
            self.name, self.bus, self.log, lambda: self.backends, lambda: self.board.os_pid, lambda: self.is_online
        )  # fmt: skip
        undo.callback(self.faults.close)
        self.board = Board(
            self.index, self.config, self.dir, self.clock.profile.name, self.spawner, self.bus.fds, self.log
        )
        self.board.new_memory = self.bus.replace_gddr
        undo.push_async_callback(self.board.close)
        undo.callback(self.board.keep_off)
        await self.board.power_on()
        self.driver = Driver(self.bus, self.index, self.memory, self.clock, self.log)
        undo.callback(self.driver.remove)
        self.driver.bring_up = self._bring_up
        self.driver.tear_down = self._tear_down
        self.driver.find = self.firmware_path
        self.cosm = CosmDevice(self.index, self.driver, self.clock, self.log)
        self.cosm.on_silence = self._silent
        self.cosm.heartbeat_enable = self.config.heartbeat
        self.cosm.on_change.append(self.notify)
        self.cosm.log_buf_len = C["CARD_TEXT_BASE"] + C["CARD_LOG"]
        self.cosm.log_buf_addr = self.cosm.log_buf_len + 4
        self.policy = Policy(
            self.cosm, self.config, self.clock, self.log, self.boot_stored, lambda: self.board.os_pid != 0
        )
        self.board.notify = self._board_spoke
        self.board.os_exited = self._os_exited
        self.board.lost = self._board_lost
        self.board.replaced = self._board_replaced
        self.faults.configure(configured(self.config, self.name), self.config)
        self._tasks.append(asyncio.ensure_future(self.policy.run()))

    def _identity(self) -> PciIdentity:
        """The PCI function as the configuration wants it."""
        offers = self.config.interrupts
        identity = PciIdentity(
            device=self.config.device_id,
            revision=revision_of(self.config.stepping),
            msix_vectors=C["MSIX_TABLE_SIZE"] if offers == "msix" else 0,
            msi=offers != "intx",
        )
        return placed(identity, self.index)

    def _board_spoke(self) -> None:
        self.policy.wake()
        self.notify()

    def _os_exited(self, how: str) -> None:
        self._peer_died()
        if how:
            self.os_ended = how
            self.crashes += self.cosm.shutdown_status is not Status.CRASHED  # else it was found hung before
            self.cosm.os_died(f"the card OS ended with {how}")

    def _silent(self) -> None:
        """It hangs. Whoever waits for it hears so now, not when somebody resets it."""
        self.crashes += 1
        self._peer_died()

    def _board_lost(self) -> None:
        self.driver.board_lost = True
        self.crashes += 1
        self._peer_died()
        self.cosm.os_died("the board is gone")

    def _board_replaced(self) -> None:
        if self.cosm.state in (State.BOOTING, State.ONLINE):
            self.os_ended = "the board process was killed"
        self.notify()

    def _peer_died(self) -> None:
        if self.running:
            self.running.peer_died()

    async def close(self) -> None:
        """Stop, power off, unplug."""
        self.board.keep_off()
        await self.cosm.stop(force=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.driver.remove()
        await self.board.close()
        self.faults.close()
        self.bus.close()

    # --- what the driver's start and stop call ------------------------------------------------------

    async def _bring_up(self) -> None:
        self.boots += 1
        self.board.refused = self.os_ended = ""
        self.driver.board_lost = False
        self.running = Running(self)
        await self.running.start()

    async def _tear_down(self) -> None:
        """A crashed card is not asked to cooperate (COSM-55)."""
        if self.cosm.shutdown_status is Status.CRASHED:
            self._peer_died()
        if self.running:
            try:
                await self.running.stop()
            finally:
                self.running = None

    # --- requests of people -------------------------------------------------------------------------

    def notify(self) -> None:
        """Something that ``wait`` or ``boot`` looks at has changed."""
        self.faults.follow()
        for waiter in self._waiters:
            waiter.set()

    async def until(self, condition: Callable[[], bool], limit_s: float | None, what: str) -> None:
        """Wait for a condition on this card; also a limit of 0 looks once. Raises TimeoutError with ``what``."""
        if condition():
            return
        woken = asyncio.Event()

        async def watch() -> None:
            while not condition():
                woken.clear()
                await woken.wait()

        self._waiters.add(woken)
        try:
            await wait_for(watch(), limit_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"{self.name}: {what}: not within {limit_s:g} s") from None
        finally:
            self._waiters.discard(woken)

    @property
    def is_ready(self) -> bool:
        """Ready and not in anybody's hands."""
        return self.cosm.state is State.READY

    @property
    def is_online(self) -> bool:
        return self.cosm.state is State.ONLINE

    @property
    def bootable(self) -> bool:
        """Would ``boot`` be accepted? A crashed card is: it is reset first."""
        return self.cosm.state in (State.READY, State.RESET_FAILED, State.SHUTTING_DOWN, State.RESETTING)

    def reconfigure(self, config: CardConfig) -> None:
        """New values for the next boot."""
        if config.fault != self.config.fault:
            self.faults.configure(configured(config, self.name), config)
        self.config = config
        self.policy.config = config
        self.cosm.set_heartbeat(config.heartbeat)

    async def prepare(self, firmware: str) -> None:
        """Look at what a boot needs before anything is touched. Raises MicemuError with the fix."""
        for path, what in ((firmware, "card image"), (self.config.ramdisk, "ramdisk")):
            if path:
                check_file(path, what, self.name)
        if self.running is None:  # else the devices of a crashed boot still hold what they need
            check(self)
        await check_classes(self)

    @property
    def backends(self) -> list[Backend]:
        """Those of its devices, in the order in which they were added; none of a card that is down."""
        return self.running.supervisor.backends if self.running else []

    @property
    def vop_devices(self) -> list[VopDevice]:
        """What the host has announced on the device page."""
        return self.running.vop.devices if self.running else []

    def backend(self, name: str) -> Backend:
        """A device's backend by name. Raises StateError when the card is down, UsageError for a wrong name."""
        if self.running is None:
            raise self.not_online(errno.ENODEV)
        for b in self.backends:
            if b.name == name:
                return b
        for dev, pid in self.running.files.programs():
            if dev.name == name:
                raise UsageError(
                    f"{self.name}: {name} belongs to a program: it goes when process {pid} ends", errno.EBUSY
                )
        known = ", ".join(b.name for b in self.backends) or "none"
        raise UsageError(f"{self.name} has no device {name!r}; devices: {known}", errno.ENODEV)

    def not_online(self, number: int = errno.EINVAL) -> StateError:
        """Why a request that needs an online card fails, and how to mend it."""
        if self.cosm.shutdown_status is Status.CRASHED:
            return StateError(
                f"{self.name} has crashed: micemu dump log {self.name} shows its last words, "
                f"micemu boot {self.name} resets and boots it",
                number,
            )
        fix = (
            f"micemu wait online {self.name} waits for it"
            if self.cosm.state is State.BOOTING
            else f"boot it first (micemu boot {self.name})"
        )
        return StateError(f"{self.name} is {self.cosm.state.word}: {fix}", number)

    def online(self) -> Running:
        """What runs for it. Raises StateError unless it is online."""
        if self.running is None or not self.is_online:
            raise self.not_online()
        return self.running

    async def remove_device(self, name: str) -> None:
        """Hot-unplug a device, also of a card that has crashed."""
        backend = self.backend(name)
        assert self.running
        await self.running.supervisor.remove(backend)

    async def reboot(self, image: str) -> None:
        """Shut down (or reset) and boot again as configured."""
        if self.is_online:
            await self.shutdown()
        elif self.cosm.state is State.BOOTING:  # it may hang there for ever (COSM-20)
            await self._reset_to_ready()
        await self.boot(image, self.config.ramdisk, self.config.cmdline)

    def _words(self) -> str:
        """State and, after a crash, why: ``shutting_down (crashed)``."""
        status = self.cosm.shutdown_status
        return self.cosm.state.word + ("" if status is Status.NOP else f" ({status.word})")

    async def boot(self, firmware: str, ramdisk: str, cmdline: str) -> None:
        """Boot and wait until the card is online and its devices run.

        A crashed card is reset first. When the boot fails, the card is back in the state in which it
        was, or reset, and the error says why.
        """
        await self._make_ready()
        self.cosm.bootmode = "linux"
        self.cosm.firmware, self.cosm.ramdisk = firmware, ramdisk or None
        self.cosm.cmdline = self.kernel_command_line(cmdline)
        await self.boot_stored()

    def firmware_path(self, name: str) -> str:
        """The file that a firmware name means: an absolute path, or a file in the run directory's
        ``firmware`` or in /lib/firmware. ``mic/uos.img`` is otherwise the built-in card OS, and
        ``mic/micN.image`` the configured ramdisk, or none.
        """
        name = name.partition("\0")[0]
        places = [str(self.dir.parent / "firmware" / name), f"/lib/firmware/{name}"]
        found = next((p for p in places if name and os.path.isfile(p)), None)
        if found or not name or name.startswith("/"):
            return found or name
        if name == DEFAULT_FIRMWARE:
            return self.config.image or str(self.micos)
        return self.config.ramdisk if name == f"mic/{self.name}.image" else places[0]

    async def _make_ready(self) -> None:
        """A card that is down is reset; one that is up stays, and the error says what to do."""
        if self.cosm.state in (State.SHUTTING_DOWN, State.RESET_FAILED, State.RESETTING):
            await self._reset_to_ready()
        if self.cosm.state is not State.READY:
            raise StateError(
                f"{self.name} is {self.cosm.state.word}: only a ready card can boot "
                f"(micemu reboot {self.name}, or micemu shutdown {self.name} first)",
                errno.EINVAL,
            )

    async def _reset_and_wait(self) -> None:
        await self.cosm.reset()
        await self.until(
            lambda: self.cosm.state is not State.RESETTING, self.clock.limit(BOOT_LIMIT), "reset"
        )

    async def _reset_to_ready(self) -> None:
        await self._reset_and_wait()
        if self.cosm.state is State.RESET_FAILED:
            raise MicemuError(f"{self.name}: the firmware did not become ready after the reset", errno.EIO)

    async def boot_stored(self) -> None:
        """Boot what the state machine's strings name, and wait as ``boot`` does."""
        await self.cosm.boot()
        try:
            await self.until(
                self._boot_settled, self.clock.limit(BOOT_LIMIT), "the card OS did not come online"
            )
        except TimeoutError as e:
            self.os_ended = str(e)
        if self.is_online:
            return
        why = self.board.refused or self.os_ended or f"it is {self.cosm.state.word}"
        log = self.log_tail()
        if self.cosm.state is not State.READY:
            await self._reset_and_wait()
        if self.board.refused:
            raise MicemuError(f"{self.name}: the bootstrap refused {self.driver.firmware}: {why}")
        using = f" with the ramdisk {self.driver.ramdisk}" if self.driver.ramdisk else ""
        raise MicemuError(
            f"{self.name} did not boot{using}: {why}; "
            + (f"its last words: {log}" if log else "micemu log says more")
        )

    def kernel_command_line(self, text: str) -> str:
        """What the daemon adds for the card's network (COSM-66) and our own words, then ``text``."""
        own = (
            f"ifcfg=static;address,172.31.{self.index + 1}.1;netmask,255.255.255.0 "
            f"micemu.cwd={shlex.quote(self.cwd)}"
        )
        return f"{own} {text}".strip()

    def _boot_settled(self) -> bool:
        if (
            self.board.refused
            or self.os_ended
            or (self.cosm.state is not State.BOOTING and self.cosm.state is not State.ONLINE)
        ):
            return True
        if not self.is_online or self.running is None:
            return False
        return all(b.ready.is_set() or b.failed or b.trouble for b in self.backends)

    async def shutdown(self, limit_s: float | None = None) -> None:
        """Ask the card to power off and wait until policy has reset it. Raises StateError, TimeoutError."""
        if not self.is_online:
            raise StateError(
                f"{self.name} is {self._words()}: only an online card shuts down (micemu reset {self.name})"
            )
        await self.cosm.shutdown()
        limit = self.clock.limit(BOOT_LIMIT) if limit_s is None else limit_s
        await self.until(
            lambda: self.cosm.state in (State.READY, State.RESET_FAILED), limit, "the card did not power off"
        )

    async def reset(self) -> None:
        """Reset and wait. Raises StateError when the card is ready already."""
        if self.is_ready:
            raise StateError(f"{self.name} is ready: there is nothing to reset")
        await self._reset_to_ready()

    # --- its log ------------------------------------------------------------------------------------

    def log_tail(self, lines: int = 1) -> str:
        """The last lines of the card's kernel log, out of GDDR."""
        text = self.log_buffer().decode(errors="replace").strip().splitlines()
        return " / ".join(text[-lines:])

    def log_buffer(self) -> bytes:
        """The card's log: length word, then text; empty when either lies outside (COSM-62)."""
        at, room = C["CARD_LOG"], C["CARD_LOG_SIZE"]
        gddr = self.bus.gddr
        if at + room > gddr.size:
            return b""
        length = gddr.load(at, 4)
        return gddr.read(at + 4, length) if 0 < length <= room - 4 else b""
