"""The MIC X100 host driver: probe, reset, download, start, stop (HW 1.1, 6, 8)."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.clock import Clock
from mic_emu.dma import DRAIN_S
from mic_emu.errors import MicemuError
from mic_emu.host import dma
from mic_emu.host.cosm import BootRequest
from mic_emu.host.irq import Interrupts
from mic_emu.host.smpt import Smpt
from mic_emu.log import Log
from mic_emu.mbus import DmaDevice
from mic_emu.memory import PageAllocator, View

C = L.CONSTANTS
BOOT = L.BOOTPARAM


class DownloadError(MicemuError):
    """An image, ramdisk or command line that cannot be downloaded; state stays ready."""


def read_file(path: str, what: str, check_room: Callable[[int], None]) -> bytes:
    """A file's bytes, read once ``check_room`` has taken their number. A FIFO or a device would hold the host process
    up. Raises DownloadError with the errno and the fix."""
    if not path:
        raise DownloadError(f"no {what} is set", errno.EINVAL)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            st = os.fstat(f.fileno())
            if stat.S_ISDIR(st.st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(st.st_mode):
                raise DownloadError(f"the {what} {path} is not a file", errno.EINVAL)
            check_room(st.st_size)
            return f.read(st.st_size)
    except OSError as e:
        raise DownloadError(f"cannot load the {what} {path}: {e.strerror}", e.errno or errno.EIO) from e


def check_file(path: str, what: str, name: str) -> None:
    """Raise DownloadError when ``path`` cannot be the ``what`` of card ``name``."""
    if not os.path.exists(path):
        raise DownloadError(f"{name}: the {what} {path} does not exist", errno.ENOENT)
    if not os.path.isfile(path):
        raise DownloadError(f"{name}: the {what} {path} is not a file", errno.EINVAL)
    if not os.access(path, os.R_OK):
        raise DownloadError(f"{name}: the {what} {path} is not readable", errno.EACCES)


class Driver:
    """One card as the host driver sees it. ``probe`` builds everything, ``remove`` unwinds it."""

    def __init__(self, bus: Bus, index: int, memory: PageAllocator, clock: Clock, log: Log) -> None:
        self.bus = bus
        self.index = index
        self.memory = memory
        self.clock = clock
        self.log = log
        self.irq = Interrupts(bus, log=log)
        self.smpt = Smpt(bus, log)
        self.smpt.init()
        self.irq.enable()
        self.page_off = memory.alloc(C["DP_SIZE"])
        self.page = View(bus.host.pointer + self.page_off, C["DP_SIZE"])
        self.page_card = self.smpt.map(self.page_off, C["DP_SIZE"])
        self._publish_page()
        self.init_bootparam()
        self.dma: DmaDevice | None = None
        self.firmware = ""
        self.ramdisk = ""
        self.cmdline = ""
        self.bootmode = "linux"
        self.find: Callable[[str], str] = lambda name: name  # firmware names to paths
        self.board_lost = False  # the board process died: nothing behind it drains
        self._held: list[Callable[[], None]] = []
        self.bring_up: Callable[[], Awaitable[None]] | None = None
        self.tear_down: Callable[[], Awaitable[None]] | None = None
        if self.irq.dispatch_fd is not None:  # last: nothing fails any more
            asyncio.get_running_loop().add_reader(self.irq.dispatch_fd, self.irq.dispatch)

    def remove(self) -> None:
        """Undo the probe; the card is stopped already."""
        self._release_dma()
        self._let_go()
        self.smpt.unmap(self.page_card, C["DP_SIZE"])
        self.memory.free(self.page_off)
        if self.irq.dispatch_fd is not None:
            asyncio.get_running_loop().remove_reader(self.irq.dispatch_fd)
        self.irq.close()

    def _publish_page(self) -> None:
        self.bus.write("spad", self.page_card & 0xFFFFFFFF, C["SPAD_DP_LO"])
        self.bus.write("spad", self.page_card >> 32, C["SPAD_DP_HI"])

    def init_bootparam(self) -> None:
        """At probe, at every start and at the end of stop; the descriptors are not touched (HW-45)."""
        for name, value in (("magic", C["MIC_MAGIC"]), ("h2c_config_db", -1), ("node_id", self.index + 1),
                            ("h2c_scif_db", 0xFF), ("c2h_scif_db", 0xFF),
                            ("scif_host_dma_addr", 0), ("scif_card_dma_addr", 0)):  # fmt: skip
            BOOT.put(self.page, 0, name, value)

    # --- hardware operations of the state machine ---------------------------------------------

    async def reset(self) -> None:
        """HW 6.2 steps 1 to 3."""
        self.bus.write("spad", 0, C["SPAD_DOWNLOAD"])
        self.bus.write("rgcr", self.bus.read("rgcr") | C["RGCR_RESET"])
        await self.clock.pause(1.0)

    def ready(self) -> bool:
        """Bit 0 of SPAD2."""
        return bool(self.bus.read("spad", C["SPAD_DOWNLOAD"]) & C["DOWNLOAD_READY"])

    def hold(self, free: Callable[[], None]) -> None:
        """Something that a hung card may still write to: ``free`` runs after the card's reset (VOP-56)."""
        self._held.append(free)

    def _let_go(self) -> None:
        while self._held:
            self._held.pop()()

    async def start(self, request: BootRequest) -> None:
        """HW 6.3 steps 4 to 12, on a card that is ready. Undoes itself and raises MicemuError."""
        self._let_go()  # a ready card was reset: nothing of the last boot writes any more
        self.firmware, self.ramdisk = self.find(request.firmware), self.find(request.ramdisk)
        self.cmdline, self.bootmode = request.cmdline, request.bootmode
        self.init_bootparam()
        # Slots of an earlier boot are all removed ones; the card of this boot starts with a clean list.
        self.page.zero(C["DP_FIRST_SLOT"], C["DP_SIZE"] - C["DP_FIRST_SLOT"])
        self._acquire_dma()
        try:
            if self.bring_up:
                await self.bring_up()
            self.download()
        except BaseException:
            await self.stop()
            raise
        self.smpt.restore()
        self.irq.restore()
        self.irq.enable()
        self._publish_page()
        self.interrupt_bootstrap()

    async def stop(self) -> None:
        """VOP, SCIF, DMA, mbus in that order (HW-49), then the boot parameters."""
        if self.tear_down:
            await self.tear_down()
        self._release_dma()
        self.init_bootparam()

    def _acquire_dma(self) -> None:
        """HW 6.3 steps 5 and 6. Raises MicemuError ENODEV when no channel works."""
        self._release_dma()
        try:
            self.dma = dma.acquire(self.index, self.bus, self.irq, self.smpt, self.memory, self.log)
        except OSError as e:
            raise MicemuError(f"no DMA channel for the card: {e.strerror}", e.errno or errno.ENODEV) from e
        self.dma.attach(asyncio.get_running_loop())

    def _release_dma(self) -> None:
        if self.dma:
            self.dma.release(0 if self.board_lost else self.clock.limit(DRAIN_S))
            self.dma = None

    # --- download (HW 6.4) --------------------------------------------------------------------

    def download(self) -> None:
        """Image, command line and ramdisk into GDDR. Raises DownloadError."""
        spad = self.bus.read("spad", C["SPAD_DOWNLOAD"])
        base = spad & C["DOWNLOAD_ADDR_MASK"]
        if base > C["DOWNLOAD_ADDR_MAX"]:
            raise DownloadError(f"the card asks for its image at {base:#x}, above 2 GiB", errno.EINVAL)
        what = f"the card image {self.firmware}"
        image = read_file(self.firmware, "card image", lambda size: self._check_room(base, size, what))
        self._copy(base, image)
        self.bus.write("spad", len(image), C["SPAD_FW_SIZE"])
        if self.bootmode != "linux":
            raise DownloadError("boot mode flash is not possible on an X100", errno.EINVAL)
        self._command_line(base + len(image))
        if self.ramdisk:
            self._ramdisk(base, len(image))

    def _check_room(self, at: int, size: int, what: str) -> None:
        aperture = self.bus.gddr.size
        if size > aperture or at > aperture - size:
            raise DownloadError(
                f"{what} has {size} bytes and does not fit at {at:#x} of the {aperture >> 20} MiB aperture: "
                "give the card more memory (--memory) or a smaller file",
                errno.EINVAL,
            )

    def _copy(self, at: int, data: bytes) -> None:
        rc = lib.mic_reserve(self.bus.fds[lib.MIC_FD_GDDR], at & ~4095, len(data) + (at & 4095))
        if rc < 0:
            raise DownloadError(
                f"/dev/shm has no room for {len(data)} bytes of card memory: {os.strerror(-rc)}; "
                "make it larger or stop other cards",
                -rc,
            )
        self.bus.gddr.write(at, data)

    def _command_line(self, at: int) -> None:
        text = f" mem={self.bus.gddr.size >> 20}M"
        if self.cmdline:
            text += " " + self.cmdline
        raw = text.encode(errors="surrogateescape")[: C["CMDLINE_MAX"] - 1] + b"\0"
        self._check_room(at, len(raw), "the command line behind the image")
        self._copy(at, raw)

    def _ramdisk(self, base: int, image_size: int) -> None:
        at = 2 * base
        if base + image_size + C["CMDLINE_MAX"] > at:
            raise DownloadError(
                f"the card image {self.firmware} reaches into the ramdisk's place", errno.EINVAL
            )
        what = f"the ramdisk {self.ramdisk}"
        data = read_file(self.ramdisk, "ramdisk", lambda size: self._check_room(at, size, what))
        self._copy(at, data)
        self.bus.gddr.store(base + C["BOOT_RAMDISK_IMAGE"], 4, at)
        self.bus.gddr.store(base + C["BOOT_RAMDISK_SIZE"], 4, len(data))

    def interrupt_bootstrap(self) -> None:
        """APIC id first, then the low word with the send bit, which alone triggers (HW-42)."""
        apic = self.bus.read("spad", C["SPAD_DOWNLOAD"]) >> C["DOWNLOAD_APIC_SHIFT"] & C["DOWNLOAD_APIC_MASK"]
        self.bus.write("apicicr_hi", apic, 7)
        self.bus.write("apicicr", C["BOOT_VECTOR"] | C["APICICR_SEND"], 7)
