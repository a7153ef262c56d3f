"""VOP, host role: announce devices in the device page, change and remove them (VOP 4, 6).

The rings themselves belong to the backend processes; this side owns the page, the ring blocks and
the life cycle.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mic_emu import layout as L
from mic_emu.bar import Bus, drain
from mic_emu.clock import Clock
from mic_emu.errors import MicemuError
from mic_emu.host.irq import Interrupt, Interrupts, Kind
from mic_emu.host.smpt import Smpt
from mic_emu.log import Log
from mic_emu.memory import PageAllocator, View
from mic_emu.vop import device_page as dp
from mic_emu.vop.bottom_half import BottomHalf, DeviceSlot

C = L.CONSTANTS
DESC, CTRL, BOOT = L.DEVICE_DESC, L.DEVICE_CTRL, L.BOOTPARAM

REMOVE_LIMIT = 15.0  # seconds, VOP 4.9
CONFIG_LIMIT = 10.0


class VopError(MicemuError):
    """A request that the real ioctl would refuse; carries its errno."""


@dataclass
class VopDevice:
    """One announced device and what the host holds for it."""

    slot: DeviceSlot
    bottom: BottomHalf
    irq: Interrupt
    card_addresses: list[int]
    name: str
    served: bool = True  # a backend process runs its rings
    removed: bool = False
    removal: asyncio.Task[None] | None = None
    acked: asyncio.Event = field(default_factory=asyncio.Event)  # the card set guest_ack, or will not
    ack_seen: bool = False

    @property
    def driver_ok(self) -> bool:
        return bool(self.bottom.status() & C["VIRTIO_DRIVER_OK"])

    def acknowledged(self) -> None:
        """The card has set guest_ack (seen by whoever serves the device's doorbell)."""
        self.ack_seen = True
        self.acked.set()


class VopHost:
    """The devices of one card between start and stop."""

    def __init__(
        self,
        bus: Bus,
        page_off: int,
        memory: PageAllocator,
        smpt: Smpt,
        irq: Interrupts,
        clock: Clock,
        log: Log,
    ) -> None:
        self.bus = bus
        self.page_off = page_off
        self.page = View(bus.host.pointer + page_off, C["DP_SIZE"])
        self.memory = memory
        self.smpt = smpt
        self.irq = irq
        self.clock = clock
        self.log = log
        self.devices: list[VopDevice] = []
        self.peer_alive: Callable[[], bool] = lambda: True
        self.hold: Callable[[Callable[[], None]], None] = lambda free: None
        """Keeps memory that a hung card may still write to until the card is reset (VOP-56)."""
        self._deaf = False  # the card let the limit of a removal pass: the next one does not wait again
        self._slots: list[dp.Slot] = []  # what the page holds, whatever the card makes of it (VOP-50)
        self._lock = asyncio.Lock()  # the page and the list (VOP 4.10)

    # --- announce ---------------------------------------------------------------------------

    def _config_db(self) -> int:
        return BOOT.get(self.page, 0, "h2c_config_db")

    async def add(
        self, kind: int, num_vq: int, num: int, features: int, config: bytes, feature_len: int = 8
    ) -> VopDevice:
        """Announce a device; returns it published. Raises VopError (EINVAL, ENOMEM, ENOSPC; VOP 6.3)."""
        numbers = {
            "type": kind,
            "num_vq": num_vq,
            "num": num,
            "features": features,
            "feature_len": feature_len,
        }
        for name, value in numbers.items():
            if (
                type(value) is not int
            ):  # the word of a program: what is no number fails here, or after half the work
                raise VopError(f"{name} {value!r:.40} is no whole number", errno.EINVAL)
        shape = dp.SlotShape(num_vq, feature_len, len(config))
        if not 1 <= kind <= 127:
            raise VopError(f"device type {kind} is not in 1..127", errno.EINVAL)
        if not 1 <= num_vq <= C["MAX_VRINGS"]:
            raise VopError(f"{num_vq} rings: a device has 1 to {C['MAX_VRINGS']}", errno.EINVAL)
        if feature_len not in (4, 8):
            raise VopError(f"feature_len {feature_len} is not 4 or 8", errno.EINVAL)
        if len(config) > 255 or shape.ctrl_off > C["MAX_DESC_BLK"]:
            raise VopError(
                f"a descriptor block of {shape.ctrl_off} bytes, at most {C['MAX_DESC_BLK']} fit", errno.EINVAL
            )
        if not 1 <= num <= C["MAX_VRING_ENTRIES"] or num & (num - 1):
            raise VopError(
                f"{num} ring entries: use a power of two up to {C['MAX_VRING_ENTRIES']}", errno.EINVAL
            )
        async with self._lock:
            return self._add_locked(kind, num, features, config, shape)

    def _add_locked(
        self, kind: int, num: int, features: int, config: bytes, shape: dp.SlotShape
    ) -> VopDevice:
        room = dp.find_room(self._slots, shape)
        if room is None:
            raise VopError("the device page is full", errno.EINVAL)
        off, reused = room
        slot = DeviceSlot(self.page_off, off, kind, shape, num, features)
        addresses: list[int] = []
        try:
            for i in range(shape.num_vq):
                addresses.append(self._ring_block(slot, kind, i))
            db = self.irq.next_db()
            line = self.irq.request(Kind.DB, db, f"vop virtio{kind}")
        except BaseException as e:
            self._free_blocks(slot, addresses)
            if isinstance(e, MemoryError):
                raise VopError(str(e), errno.ENOMEM) from e
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:  # HW-47
                raise VopError(
                    f'{e.strerror}: four devices are the most; remove one, or boot with interrupts = "msi", where all share one',
                    errno.ENOSPC,
                ) from e
            raise
        drain(line.fd)
        slot.vector = line.vector
        self._fill(slot, config, addresses, db, reused)
        self._note(dp.Slot(off, kind, shape))
        DESC.put(self.page, off, "type", kind)  # release: the last store of ADD_DEVICE (VOP-6)
        self.ring_config()
        dev = VopDevice(slot, BottomHalf(self.bus, slot), line, addresses, f"virtio{kind}@{off}")
        self.devices.append(dev)
        self.log.info(
            "device announced", type=kind, slot=off, rings=shape.num_vq, doorbell=db, vector=line.vector
        )
        return dev

    def _note(self, slot: dp.Slot) -> None:
        """Our record of a slot: a new one at the end of the list, or a change of an old one."""
        for i, old in enumerate(self._slots):
            if old.off == slot.off:
                self._slots[i] = slot
                return
        self._slots.append(slot)

    def _ring_block(self, slot: DeviceSlot, kind: int, index: int) -> int:
        size = dp.block_size(slot.num)
        off = self.memory.alloc(size)
        slot.blocks.append(off)  # from here on _free_blocks takes it back
        L.VRING_INFO.put(self.bus.host, off + dp.vring_size(slot.num), "magic", dp.ring_magic(kind, index))
        addr = self.smpt.map(off, size)
        if not addr:
            raise VopError("no SMPT entry for a ring block", errno.ENOMEM)
        return addr

    def _free_blocks(self, slot: DeviceSlot, addresses: list[int]) -> None:
        """Idempotent: what is given back is forgotten."""
        while addresses:
            self.smpt.unmap(addresses.pop(), dp.block_size(slot.num))
        while slot.blocks:
            self.memory.free(slot.blocks.pop())

    def _fill(self, slot: DeviceSlot, config: bytes, addresses: list[int], db: int, reused: bool) -> None:
        """Everything but the type byte. A reused slot keeps type -1 meanwhile (VOP 2.5)."""
        page, off, shape = self.page, slot.off, slot.shape
        if not reused:
            DESC.put(page, off, "type", dp.FREE)
        for name, value in (("num_vq", shape.num_vq), ("feature_len", shape.feature_len),
                            ("config_len", shape.config_len), ("status", 0)):  # fmt: skip
            DESC.put(page, off, name, value)
        for i, addr in enumerate(addresses):
            page.write(off + shape.vq_off(i), L.VQCONFIG.pack(address=addr, used_address=0, num=slot.num))
        page.write(off + shape.features_off, dp.feature_bytes(slot.features, shape.feature_len))
        page.write(off + shape.accepted_off, bytes(shape.feature_len))
        page.write(off + shape.config_off, config)
        ctrl = off + shape.ctrl_off
        for name in ("config_change", "vdev_reset", "guest_ack", "host_ack", "used_address_updated"):
            CTRL.put(page, ctrl, name, 0)
        CTRL.put(page, ctrl, "h2c_vdev_db", -1)
        CTRL.put(page, ctrl, "c2h_vdev_db", db)

    def ring_config(self) -> None:
        """Tell the card that the page changed, if it listens (VOP-9, VOP-52)."""
        db = self._config_db()
        if db != -1:
            self.bus.ring_card(db)

    # --- change -----------------------------------------------------------------------------

    async def config_change(self, dev: VopDevice, config: bytes) -> bool:
        """New configuration space for a device: True when the card acknowledged (VOP-15).

        Raises VopError EIO when the card has no config doorbell or the device is gone.
        """
        async with self._lock:
            if (
                dev.removed
                or self._config_db() == -1
                or DESC.get(self.page, dev.slot.off, "type") == dp.REMOVED
            ):
                raise VopError(f"{dev.name}: the card does not listen for configuration changes", errno.EIO)
            ctrl = dev.slot.off + dev.slot.shape.ctrl_off
            self.page.write(dev.slot.off + dev.slot.shape.config_off, config[: dev.slot.shape.config_len])
            self._expect_ack(dev)
            CTRL.put(self.page, ctrl, "config_change", C["PARAM_CONFIG_CHANGED"])
            self.ring_config()
            acked = await self._await_ack(dev, lambda: self._ack_came(dev), CONFIG_LIMIT)
            CTRL.put(self.page, ctrl, "config_change", 0)
            CTRL.put(self.page, ctrl, "guest_ack", 0)
            return acked

    def _expect_ack(self, dev: VopDevice) -> None:
        CTRL.put(self.page, dev.slot.off + dev.slot.shape.ctrl_off, "guest_ack", 0)
        dev.ack_seen = False
        dev.acked.clear()

    async def _await_ack(self, dev: VopDevice, done: Callable[[], bool], limit: float) -> bool:
        """The card's answer. It rings the device's doorbell when it has stored it, which wakes us here
        or through the backend; a card that only stores bytes is seen when the limit ends."""

        async def watch() -> None:
            while not done() and self.peer_alive():
                dev.acked.clear()
                if not done():
                    await dev.acked.wait()

        try:
            await self.clock.within(watch(), limit, f"{dev.name}: the card's acknowledgement")
        except TimeoutError:
            pass
        return done()

    def _ack_came(self, dev: VopDevice) -> bool:
        """Noted once seen: whoever serves the doorbell takes the byte back before its own word reaches us."""
        dev.ack_seen = dev.ack_seen or self.guest_acked(dev)
        return dev.ack_seen

    def guest_acked(self, dev: VopDevice) -> bool:
        """Has the card handled the pending config_change?"""
        return bool(CTRL.get(self.bus.host, dev.slot.ctrl, "guest_ack"))

    # --- remove -----------------------------------------------------------------------------

    def backend_gone(self, dev: VopDevice) -> None:
        """Nobody serves the rings any more: answer the card's hand-shakes from here."""
        if not dev.served or dev.removed:
            return
        dev.served = False
        loop = asyncio.get_running_loop()
        loop.add_reader(dev.irq.fd, self._interrupt, dev)
        dev.bottom.run_without_backend()

    def _interrupt(self, dev: VopDevice) -> None:
        drain(dev.irq.fd)
        dev.bottom.run_without_backend()
        if self.guest_acked(dev):
            dev.acknowledged()

    async def remove(self, dev: VopDevice) -> None:
        """Take a device away from the card (VOP 4.7); returns when its memory is free again. Once begun it goes on to
        its end, whatever becomes of who asked: a vector or a ring that is not given back is missed at every later boot."""
        if dev.removal is None:
            dev.removal = asyncio.ensure_future(self._remove(dev))
        await asyncio.shield(dev.removal)

    async def _remove(self, dev: VopDevice) -> None:
        async with self._lock:
            self.backend_gone(dev)
            dev.removed = True
            ctrl = dev.slot.off + dev.slot.shape.ctrl_off
            if not self._card_let_go(dev):
                self._expect_ack(dev)
                CTRL.put(self.page, ctrl, "config_change", C["PARAM_DEV_REMOVE"])
                if self._config_db() != -1:
                    self.ring_config()
                    limit = 0.0 if self._deaf else REMOVE_LIMIT
                    self._deaf = not await self._await_ack(dev, lambda: self._card_let_go(dev), limit)
            # A card that never took the device (no config doorbell, status 0) cannot write to it.
            acked = self._card_let_go(dev) or (self._config_db() == -1 and dev.bottom.status() == 0)
            CTRL.put(self.page, ctrl, "config_change", 0)
            CTRL.put(self.page, ctrl, "guest_ack", 0)
            asyncio.get_running_loop().remove_reader(dev.irq.fd)
            dev.irq.free()
            if acked:
                self._free_blocks(dev.slot, dev.card_addresses)
            else:
                self.hold(lambda: self._free_blocks(dev.slot, dev.card_addresses))
            self._note(dp.Slot(dev.slot.off, dp.REMOVED, dev.slot.shape))
            DESC.put(self.page, dev.slot.off, "type", dp.REMOVED)
            self.devices.remove(dev)
            self.log.info("device removed", type=dev.slot.kind, slot=dev.slot.off, acknowledged=acked)

    def _card_let_go(self, dev: VopDevice) -> bool:
        """The card has removed the device (its last store is the type), or there is no card."""
        return not self.peer_alive() or DESC.get(self.page, dev.slot.off, "type") == dp.REMOVED

    def peer_died(self) -> None:
        """The card OS is gone: nobody will acknowledge anything any more."""
        for dev in self.devices:
            dev.acked.set()

    async def close(self, before: Callable[[VopDevice], Awaitable[None]] | None = None) -> None:
        """Card stop: remove every device (VOP 4.8)."""
        for dev in list(self.devices):
            if before:
                await before(dev)
            await self.remove(dev)
