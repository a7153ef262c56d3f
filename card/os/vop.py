"""VOP, card role: find devices in the device page and run their life cycle (VOP 4)."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Protocol

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import Bus, drain
from mic_emu.card.os.interrupts import CardInterrupts, Line
from mic_emu.clock import Clock
from mic_emu.log import Log
from mic_emu.memory import PageAllocator, View
from mic_emu.vop import device_page as dp

C = L.CONSTANTS
DESC, CTRL, VQ, BOOT = L.DEVICE_DESC, L.DEVICE_CTRL, L.VQCONFIG, L.BOOTPARAM

RESET_LIMIT = 10.0
USED_ACK_LIMIT = 9.9
# What the transport lets through besides the device's own bits 0..23 and 50.. (VOP 4.4).
TRANSPORT_BITS = (C["VIRTIO_F_INDIRECT_DESC"], C["VIRTIO_F_EVENT_IDX"], C["VIRTIO_F_VERSION_1"])
DEVICE_BITS = (1 << 24) - 1
INDIRECT_TABLE = 16 * 16  # bytes: 16 descriptors for each head


class VirtioDriver(Protocol):
    """A driver of one device type."""

    features: int  # bits it understands

    async def probe(self, dev: VirtioDevice) -> None:
        """``setup_rings``, buffers, everything that may fail. Raises OSError."""

    def start(self) -> None:
        """DRIVER_OK is set: run the loop."""

    def remove(self) -> bool:
        """Stop and free; the device is reset afterwards. False: a thread still uses the rings."""

    def config_changed(self) -> None:
        """The configuration space has new values."""


class VirtioDevice:
    """One live slot as the card sees it."""

    def __init__(self, vop: VopCard, slot: dp.Slot) -> None:
        self.vop = vop
        self.slot = slot
        self.bus = vop.bus
        self.page = vop.page
        self.log = vop.log.bind(device=f"virtio{slot.type}@{slot.off}")
        self.driver: VirtioDriver | None = None
        self.line: Line = vop.interrupts.request(f"virtio{slot.type}")
        self.c2h_db = CTRL.get(self.page, slot.ctrl, "c2h_vdev_db")
        self.features = 0
        self.vdrv = ffi.new("struct mic_vdrv *", {"line_fd": -1})
        self.stop_fd = lib.mic_eventfd(0o2000000 | 0o4000)
        self._pages: list[int] = []
        self._woken = asyncio.Event()
        self._reading = False
        CTRL.put(self.page, slot.ctrl, "h2c_vdev_db", self.line.doorbell)

    # --- lines ----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Ring the host's doorbell of this device."""
        self.bus.ring_host(self.c2h_db)

    def listen(self) -> None:
        """Interrupts come to the event loop (hand-shakes), not to the driver's C loop."""
        if not self._reading:
            asyncio.get_running_loop().add_reader(self.line.fd, self._interrupt)
            self._reading = True

    def hand_over(self) -> None:
        """Interrupts belong to the driver's C loop from now on."""
        if self._reading:
            asyncio.get_running_loop().remove_reader(self.line.fd)
            self._reading = False

    def _interrupt(self) -> None:
        drain(self.line.fd)
        self._woken.set()

    async def _until(self, done: Callable[[], bool], limit: float, what: str) -> bool:
        """The host wakes us through our interrupt when it has acted; one that only stores its byte is
        seen when the limit ends."""

        async def watch() -> None:
            while not done():
                self._woken.clear()
                if not done():
                    await self._woken.wait()

        try:
            await self.vop.clock.within(watch(), limit, what)
        except TimeoutError as e:
            self.log.warning(f"no answer of the host: {e}")
        return done()

    # --- status and features ------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return DESC.get(self.page, self.slot.off, "status")

    def add_status(self, bits: int) -> None:
        """Status store, then one doorbell (VOP-10)."""
        DESC.put(self.page, self.slot.off, "status", self.status | bits)
        self.kick()

    async def reset(self) -> None:
        """VOP 4.5; a host that does not answer within 10 s is not waited for (VOP-14)."""
        CTRL.put(self.page, self.slot.ctrl, "host_ack", 0)
        CTRL.put(self.page, self.slot.ctrl, "vdev_reset", 1)
        self.listen()
        self.kick()
        await self._until(
            lambda: CTRL.get(self.page, self.slot.ctrl, "host_ack") != 0, RESET_LIMIT, "device reset"
        )
        DESC.put(self.page, self.slot.off, "status", 0)

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has new values."""
        try:
            if self.driver:
                self.driver.config_changed()
        except OSError as e:
            self.log.error(f"the driver does not take the new configuration: {e}")

    def read_config(self, off: int, length: int) -> bytes:
        """Bytes of the configuration space; zeros beyond its end."""
        end = min(off + length, self.slot.shape.config_len)
        at = self.slot.off + self.slot.shape.config_off
        return self.page.read(at + off, max(0, end - off)).ljust(length, b"\0")

    def negotiate(self, understood: int) -> None:
        """Accept what both sides know and write it down (VOP 4.4)."""
        n = self.slot.shape.feature_len
        at = self.slot.off + self.slot.shape.features_off
        offered = int.from_bytes(self.page.read(at, min(n, 8)), "little")
        allowed = DEVICE_BITS
        for bit in TRANSPORT_BITS:
            allowed |= 1 << bit
        self.features = offered & understood & allowed
        self.write_features()

    def write_features(self) -> None:
        """Tell the host what is accepted; a driver may take less than it was given."""
        n = self.slot.shape.feature_len
        self.page.write(self.slot.off + self.slot.shape.accepted_off, dp.feature_bytes(self.features, n))

    # --- rings ----------------------------------------------------------------------------------

    async def setup_rings(self, wanted: int) -> None:
        """find_vqs: map the ring blocks, hand our used rings over (VOP 4.3 steps 9 to 11).

        Raises OSError ENOENT (fewer rings than wanted), EIO (wrong magic, VOP-4), ENOMEM, ENODEV
        (the host does not take them within 9.9 s, VOP-12).
        """
        if self.slot.shape.num_vq < wanted:
            raise OSError(errno.ENOENT, f"{wanted} rings wanted, {self.slot.shape.num_vq} offered")
        rc = lib.mic_vdrv_init(self.vdrv, self.bus.ptr, self.line.fd, self.stop_fd, self.c2h_db, wanted)
        if rc < 0:
            raise OSError(-rc, "the device's rings cannot be set up")
        self.vdrv.fault_target = self.slot.off
        for i in range(wanted):
            self._setup_ring(i)
        CTRL.put(self.page, self.slot.ctrl, "used_address_updated", 1)
        self.kick()
        if not await self._until(
            lambda: CTRL.get(self.page, self.slot.ctrl, "used_address_updated") == 0,
            USED_ACK_LIMIT,
            "used rings",
        ):
            # It may still look at them: take the offer back before their memory has another use.
            CTRL.put(self.page, self.slot.ctrl, "used_address_updated", 0)
            for i in range(wanted):
                VQ.put(self.page, self.slot.off + self.slot.shape.vq_off(i), "used_address", 0)
            raise OSError(errno.ENODEV, "the host did not take the used rings")

    def _setup_ring(self, index: int) -> None:
        at = self.slot.off + self.slot.shape.vq_off(index)
        addr, num = VQ.get(self.page, at, "address"), VQ.get(self.page, at, "num")
        if not 1 <= num <= C["MAX_VRING_ENTRIES"] or num & (num - 1):
            raise OSError(errno.EINVAL, f"ring {index} has {num} entries")
        block = self.bus.card_view(addr, dp.block_size(num))
        block.zero(0, dp.vring_size(num))
        magic = L.VRING_INFO.get(block, dp.vring_size(num), "magic")
        if magic != dp.ring_magic(self.slot.type, index):
            raise OSError(errno.EIO, f"ring {index} has magic {magic:#x}")
        used = self.alloc(dp.used_size(num))
        # The same memory either way: one table of 16 descriptors for each head.
        indirect = self.alloc(num * INDIRECT_TABLE) if self.features >> C["VIRTIO_F_INDIRECT_DESC"] & 1 else 0
        rc = lib.mic_dq_init(
            ffi.addressof(self.vdrv.dq[index]), self.bus.ptr, addr, used, num, self.features, indirect
        )
        if rc < 0:
            raise OSError(-rc, f"ring {index} cannot be set up")
        VQ.put(self.page, at, "used_address", used)

    def alloc(self, nbytes: int) -> int:
        """Card memory that goes with the device."""
        off = self.vop.memory.alloc(nbytes)
        self._pages.append(off)
        return off

    def free_pages(self) -> None:
        """Rings and buffers: nobody uses them any more."""
        for off in self._pages:
            self.vop.memory.free(off)
        self._pages.clear()

    def free(self, quiet: bool) -> None:
        """Everything this object holds. Not ``quiet``: a driver's thread still uses memory and lines,
        so they are lost until the card's reset, which is better than used twice."""
        self.hand_over()
        if not quiet:
            return
        lib.mic_vdrv_fini(self.vdrv)
        self.line.free()
        self.free_pages()
        os.close(self.stop_fd)


class VopCard:
    """The card's view of the device page."""

    def __init__(
        self, bus: Bus, page: View, memory: PageAllocator, interrupts: CardInterrupts, clock: Clock, log: Log,
        drivers: dict[int, Callable[[], VirtioDriver]],
    ) -> None:  # fmt: skip
        self.bus = bus
        self.page = page
        self.memory = memory
        self.interrupts = interrupts
        self.clock = clock
        self.log = log
        self.drivers = drivers
        self.devices: dict[int, VirtioDevice] = {}
        self._config: Line | None = None
        self._scan_lock = asyncio.Lock()
        self._scans: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Publish the config doorbell first, then scan: no device is missed in between (VOP-8)."""
        self._config = self.interrupts.request("virtio_config_intr")
        asyncio.get_running_loop().add_reader(self._config.fd, self._config_interrupt)
        BOOT.put(self.page, 0, "h2c_config_db", self._config.doorbell)
        await self.scan()

    def _config_interrupt(self) -> None:
        assert self._config
        drain(self._config.fd)
        task = asyncio.ensure_future(self._scan_again())
        self._scans.add(task)
        task.add_done_callback(self._scans.discard)

    async def _scan_again(self) -> None:
        try:
            await self.scan()
        except (OSError, IndexError) as e:  # what the page says is the host's, not ours to trust
            self.log.error(f"scan of the device page: {e}")

    async def scan(self) -> None:
        """Look at every slot (VOP 4.2); one scan at a time, new devices come up side by side."""
        async with self._scan_lock:
            slots = [slot for slot in dp.walk(self.page) if slot.type != dp.REMOVED and not self._closing]
            fresh = [slot for slot in slots if slot.off not in self.devices]
            await self._look(slots)
            await asyncio.gather(*(self._add(slot) for slot in fresh))
            if fresh:
                # One ring of the doorbell may have stood for both: announced and changed at once.
                await self._look(slots)

    async def _look(self, slots: list[dp.Slot]) -> None:
        """What the host wants of the devices that we know."""
        for slot in slots:
            known = self.devices.get(slot.off)
            if known is None:
                continue
            acked = CTRL.get(self.page, slot.ctrl, "guest_ack")  # before the change: the host clears it last
            change = CTRL.get(self.page, slot.ctrl, "config_change")
            if change == C["PARAM_DEV_REMOVE"]:
                await self._remove(known)
            elif change == C["PARAM_CONFIG_CHANGED"] and not acked:
                known.config_changed()
                CTRL.put(self.page, slot.ctrl, "guest_ack", 1)
                known.kick()

    async def _add(self, slot: dp.Slot) -> None:
        """VOP 4.3 steps 5 to 7, then ``_bind``. A driver that fails leaves the device FAILED and known."""
        try:
            dev = VirtioDevice(self, slot)
        except OSError as e:
            self.log.error(f"device at {slot.off}: {e}")
            return
        self.devices[slot.off] = dev
        dev.listen()
        await dev.reset()
        dev.add_status(C["VIRTIO_ACKNOWLEDGE"])
        await self._bind(dev)

    async def bind(self) -> None:
        """A driver was loaded: devices that wait for one get it, as when a driver registers with the kernel."""
        async with self._scan_lock:
            waiting = [d for d in self.devices.values() if d.status == C["VIRTIO_ACKNOWLEDGE"]]
            if not self._closing:
                await asyncio.gather(*(self._bind(d) for d in waiting))

    async def _bind(self, dev: VirtioDevice) -> None:
        """VOP 4.3 steps 8 to 12. Nothing, when there is no driver for it."""
        slot = dev.slot
        make = self.drivers.get(slot.type)
        if make is None:
            dev.log.warning("no driver for this device type")
            return
        dev.add_status(C["VIRTIO_DRIVER"])
        dev.driver = driver = make()
        dev.negotiate(driver.features)
        if dev.features >> C["VIRTIO_F_VERSION_1"] & 1:
            dev.add_status(C["VIRTIO_FEATURES_OK"])
        try:
            await driver.probe(dev)
        except (OSError, IndexError) as e:
            dev.log.error(f"the driver failed: {e}")
            if driver.remove():
                dev.free_pages()
            dev.driver = None
            dev.add_status(C["VIRTIO_FAILED"])
            return
        dev.add_status(C["VIRTIO_DRIVER_OK"])
        dev.hand_over()
        driver.start()
        CTRL.put(self.page, slot.ctrl, "vdev", slot.off)  # a cookie, never turned into a pointer
        dev.log.info("device is up", event="device_up", type=slot.type)

    async def _remove(self, dev: VirtioDevice, asked: bool = True) -> None:
        """VOP 4.7 steps 2 to 4."""
        quiet = dev.driver.remove() if dev.driver else True
        dev.driver = None
        await dev.reset()
        ctrl = dev.slot.ctrl
        CTRL.put(self.page, ctrl, "h2c_vdev_db", -1)
        del self.devices[dev.slot.off]
        if asked:
            CTRL.put(self.page, ctrl, "guest_ack", 1)
        DESC.put(self.page, dev.slot.off, "type", dp.REMOVED)
        dev.kick()
        dev.free(quiet)
        dev.log.info("device is gone", event="device_gone", type=dev.slot.type)

    async def close(self) -> None:
        """Orderly card shutdown: no more config interrupts, then every device goes (VOP-18)."""
        self._closing = True
        BOOT.put(self.page, 0, "h2c_config_db", -1)
        if self._config:
            asyncio.get_running_loop().remove_reader(self._config.fd)
            self._config.free()
        async with self._scan_lock:
            for dev in list(self.devices.values()):
                CTRL.put(self.page, dev.slot.ctrl, "config_change", C["PARAM_DEV_REMOVE"])
                await self._remove(dev, asked=False)
                CTRL.put(self.page, dev.slot.ctrl, "config_change", 0)
                CTRL.put(self.page, dev.slot.ctrl, "guest_ack", 0)
            for slot in dp.walk(self.page):  # also those for which we had no doorbell
                DESC.put(self.page, slot.off, "type", dp.REMOVED)
