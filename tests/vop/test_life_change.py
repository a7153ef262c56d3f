"""Reset, configuration change, removal, shutdown and crash: VOP-13 to 18, 50, 54, 56."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from typing import Any

import pytest
from life import BOOT, CTRL, DESC, TYPE, VQ, C, Life, Trace, in_loop, manual, until

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.host.backends.common import BackendProcess
from mic_emu.host.vop import VopDevice, VopError
from mic_emu.vop import device_page as dp
from mic_emu.vop.bottom_half import BottomHalf

NO_TYPE = TYPE + 1  # nobody drives it


@in_loop
async def test_vop_13_everything_is_clear_before_the_ack() -> None:
    """VOP-13: when host_ack becomes 1, status, vdev_reset and every info.avail_idx are 0 already."""
    with Life() as life:
        dev = await life.add(num_vq=2)
        await life.card.start()
        infos = [b + dp.vring_size(8) for b in dev.slot.blocks]
        for info in infos:
            L.VRING_INFO.put(life.bus.host, info, "avail_idx", 77)
        at_ack: list[tuple[Any, ...]] = []
        real = CTRL.put

        def put(view: Any, off: int, name: str, value: int) -> None:
            if name == "host_ack" and value == 1:
                idx = [L.VRING_INFO.get(life.bus.host, i, "avail_idx") for i in infos]
                at_ack.append((life.desc(dev, "status"), life.ctrl(dev, "vdev_reset"), *idx))
            real(view, off, name, value)

        object.__setattr__(CTRL, "put", put)
        try:
            await life.card.devices[dev.slot.off].reset()
        finally:
            object.__delattr__(CTRL, "put")
        assert at_ack == [(0, 0, 0, 0)]
        await life.host.close()


class _Process(BackendProcess):
    """A backend process in a thread, whose reset waits until the test lets the copy end."""

    kind, num_vq, num = TYPE, 1, 8

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        super().__init__(args, fds)
        self.copying, self.copied = threading.Event(), threading.Event()

    def features(self) -> int:
        return 1 << C["VIRTIO_F_VERSION_1"]

    def config(self) -> bytes:
        return b""

    def loop(self) -> int:
        self.kick_wait()
        return 2

    def kick_wait(self) -> None:
        import select

        select.select([self.kick_fd, self.channel.fileno()], [], [])

    def reset(self) -> None:
        self.copying.set()
        self.copied.wait(10)


def _process(life: Life, dev: VopDevice) -> tuple[_Process, socket.socket]:
    """The backend of a device that is announced; the host's end of its channel."""
    ours, theirs = socket.socketpair()
    process = _Process(
        {"log_fd": life._null, "card": "t", "device": "t"},
        [theirs.detach(), *[os.dup(f) for f in life.bus.fds]],
    )
    process.slot, process.kick_fd, process.bottom = dev.slot, dev.irq.fd, BottomHalf(process.bus, dev.slot)
    process.num_vq = dev.slot.shape.num_vq
    lib.mic_vdev_init(
        process.vdev, process.bus.ptr, dev.slot.desc, dev.slot.ctrl, process.kick_fd, process.channel.fileno(),
        process.num_vq,
    )  # fmt: skip
    return process, ours


@in_loop
async def test_vop_11_flag_is_cleared_over_usable_rings() -> None:
    """VOP-11: when the host clears used_address_updated, its half of every ring works; not so before."""
    with Life() as life:
        dev = await life.add(num_vq=3, served=False)
        process, ours = _process(life, dev)
        for i in range(3):
            VQ.put(life.page, dev.slot.off + dev.slot.shape.vq_off(i), "used_address", 4096 * (i + 1))
        life.put_ctrl(dev, "used_address_updated", 1)
        usable = [[not process.vdev.vq[i].broken for i in range(3)]]
        real = CTRL.put

        def put(view: Any, off: int, name: str, value: int) -> None:
            if name == "used_address_updated":
                usable.append([not process.vdev.vq[i].broken for i in range(3)])
            real(view, off, name, value)

        object.__setattr__(CTRL, "put", put)
        try:
            process.handshake()
        finally:
            object.__delattr__(CTRL, "put")
        assert usable == [[False] * 3, [True] * 3]
        assert life.ctrl(dev, "used_address_updated") == 0
        lib.mic_vdev_fini(process.vdev)
        process.channel.close()
        process.bus.close()
        ours.close()
        await life.host.close()


@in_loop
async def test_vop_13_reset_waits_for_a_running_copy() -> None:
    """VOP-13: a backend in the middle of a copy acks only when that has ended."""
    with Life() as life:
        dev = await life.add(served=False)
        process, ours = _process(life, dev)
        thread = threading.Thread(target=process.handshake)
        device = life.new_card()
        life.put_ctrl(dev, "vdev_reset", 1)
        thread.start()
        try:
            await until(process.copying.is_set, "the reset reaches the backend")
            assert (life.ctrl(dev, "host_ack"), life.ctrl(dev, "vdev_reset")) == (0, 1)
        finally:
            process.copied.set()
            thread.join()
        assert (life.ctrl(dev, "host_ack"), life.ctrl(dev, "vdev_reset")) == (1, 0)
        del device
        lib.mic_vdev_fini(process.vdev)
        process.channel.close()
        process.bus.close()
        ours.close()
        await life.host.close()


@in_loop
async def test_vop_14_reset_without_an_answer() -> None:
    """VOP-14: after 10 s the card goes on with status 0."""
    clock = manual()
    with Life(clock) as life:
        dev = await life.add()
        await life.card.start()
        assert dev.driver_ok
        asyncio.get_running_loop().remove_reader(dev.irq.fd)  # the host is deaf from now on
        reset = asyncio.ensure_future(life.card.devices[dev.slot.off].reset())
        await clock.advance(0)
        await clock.advance(9.9)
        assert not reset.done()
        await clock.advance(0.2)
        await reset
        assert life.desc(dev, "status") == 0
        assert life.ctrl(dev, "vdev_reset") == 1
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@in_loop
async def test_vop_15_config_change_is_acknowledged() -> None:
    """VOP-15: the driver reads the new bytes; the result is true; both bytes are clear afterwards; again works."""
    with Life() as life:
        dev = await life.add(config=b"old!")
        await life.card.start()
        for value in (b"new1", b"new2"):
            assert await life.host.config_change(dev, value) is True
            assert life.probed[0].configs[-1] == value
            assert (life.ctrl(dev, "config_change"), life.ctrl(dev, "guest_ack")) == (0, 0)
        assert life.probed[0].configs == [b"new1", b"new2"]
        await life.host.close()


@in_loop
async def test_vop_15_acknowledgement_that_is_taken_back_at_once() -> None:
    """VOP-15: a backend clears guest_ack when it has seen it, and may do so before its word reaches the host."""
    with Life() as life:
        dev = await life.add(config=b"old!")
        await life.card.start()
        await life.up(dev)
        asyncio.get_running_loop().remove_reader(dev.irq.fd)  # a backend process serves the doorbell
        seen = life.host.guest_acked

        def look(device: VopDevice) -> bool:
            acked = seen(device)
            if acked:  # the host has looked; now the backend does
                for name in ("config_change", "guest_ack"):
                    CTRL.put(life.bus.host, device.slot.ctrl, name, 0)
            return acked

        life.host.guest_acked = look  # type: ignore[method-assign]
        change = asyncio.ensure_future(life.host.config_change(dev, b"new!"))
        await until(lambda: life.ctrl(dev, "guest_ack") == 1, "the card's acknowledgement")
        dev.acked.set()
        assert await change is True
        await life.host.close()


@in_loop
async def test_vop_15_bytes_before_the_flag() -> None:
    """VOP-15: config_change becomes 2 only when the bytes are in the page."""
    with Life() as life:
        dev = await life.add(config=b"old!")
        await life.card.start()
        at_flag: list[bytes] = []
        at_ring: list[tuple[int, bytes]] = []
        ring = life.bus.ring_card
        flag = dev.slot.off + dev.slot.shape.ctrl_off + CTRL.off("config_change")

        def config() -> bytes:
            return life.page.read(dev.slot.off + dev.slot.shape.config_off, 4)

        def note(db: int) -> None:
            at_ring.append((life.ctrl(dev, "config_change"), config()))
            ring(db)

        def stored(off: int, size: int, value: object) -> None:
            if off == flag and value == 2:
                at_flag.append(config())

        life.bus.ring_card = note  # type: ignore[method-assign]
        life.host.page = trace = Trace(life.page.pointer, life.page.size)
        trace.seen = stored
        assert await life.host.config_change(dev, b"new!")
        assert at_flag == [b"new!"]
        assert at_ring[0] == (2, b"new!")
        await life.host.close()


@in_loop
async def test_vop_15_longer_bytes_do_not_leave_the_slot() -> None:
    """A configuration longer than config_len is cut, the control block behind it stays."""
    with Life() as life:
        dev = await life.add(config=bytes(8))
        await life.card.start()
        db = life.ctrl(dev, "h2c_vdev_db")
        assert await life.host.config_change(dev, b"x" * 100)
        assert life.ctrl(dev, "h2c_vdev_db") == db
        assert life.probed[0].configs == [b"x" * 8]
        await life.host.close()


@in_loop
async def test_vop_15_no_answer_is_zero_after_ten_seconds() -> None:
    """VOP-15: a card that does not react: false after 10 s, and both bytes are clear."""
    clock = manual()
    with Life(clock) as life:
        dev = await life.add(config=b"old!")
        BOOT.put(life.page, 0, "h2c_config_db", 3)
        change = asyncio.ensure_future(life.host.config_change(dev, b"new!"))
        await clock.advance(0)
        await clock.advance(9.9)
        assert not change.done()
        await clock.advance(0.2)
        assert await change is False
        assert (life.ctrl(dev, "config_change"), life.ctrl(dev, "guest_ack")) == (0, 0)
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@in_loop
async def test_vop_15_without_config_doorbell() -> None:
    """VOP-15: EIO when the card has no config doorbell, and for a removed slot."""
    with Life() as life:
        dev = await life.add(config=b"old!")
        with pytest.raises(VopError) as e:
            await life.host.config_change(dev, b"new!")
        assert e.value.errno == 5
        await life.card.start()
        await life.host.remove(dev)
        with pytest.raises(VopError) as e:
            await life.host.config_change(dev, b"new!")
        assert e.value.errno == 5


@in_loop
async def test_vop_16_order_of_a_removal() -> None:
    """VOP-16: config_change 1, reset hand-shake, guest_ack 1, type -1 by the card; then the host frees all."""
    with Life() as life:
        used = life.memory.used_bytes
        dev = await life.add()
        await life.card.start()
        steps: list[str] = []
        ring = life.card_bus.ring_host

        def note(db: int) -> None:
            state = (
                life.ctrl(dev, "config_change"),
                life.ctrl(dev, "vdev_reset"),
                life.ctrl(dev, "guest_ack"),
            )
            steps.append(f"{state} type {life.desc(dev, 'type')}")
            ring(db)

        life.card_bus.ring_host = note  # type: ignore[method-assign]
        await life.host.remove(dev)
        assert steps == [f"(1, 1, 0) type {TYPE}", "(1, 0, 1) type -1"]
        assert life.types == [-1]
        assert life.probed[0].calls == ["probe", "start", "remove"]
        assert (
            life.ctrl(dev, "h2c_vdev_db"),
            life.ctrl(dev, "config_change"),
            life.ctrl(dev, "guest_ack"),
        ) == (-1, 0, 0)
        assert life.memory.used_bytes == used
        assert life.gddr.used_bytes == 0
        assert life.host.devices == []


@in_loop
async def test_vop_16_one_ring_for_announcement_and_removal() -> None:
    """VOP-16: a device that is announced and removed at once costs no time-out, though both rings are one."""
    clock = manual()
    with Life(clock) as life:
        await life.card.start()
        for _ in range(20):
            dev = await life.add()
            await asyncio.wait_for(life.host.remove(dev), 20)
        assert clock.monotonic() == 0.0
        assert life.card.devices == {}


@in_loop
async def test_vop_16_guest_ack_alone_is_not_enough() -> None:
    """VOP-16: a stale guest_ack does not end the removal: rings are freed only when the card let go."""
    clock = manual()
    with Life(clock) as life:
        dev = await life.add()
        BOOT.put(life.page, 0, "h2c_config_db", 3)
        removal = asyncio.ensure_future(life.host.remove(dev))
        await clock.advance(1)
        life.put_ctrl(dev, "guest_ack", 1)
        life.card_bus.ring_host(dev.irq.offset)
        await clock.advance(1)
        assert not removal.done()
        assert dev.slot.blocks
        DESC.put(life.page, dev.slot.off, "type", -1)
        life.card_bus.ring_host(dev.irq.offset)
        await clock.advance(0)
        await asyncio.wait_for(removal, 20)
        assert dev.slot.blocks == []


@in_loop
async def test_vop_17_slots_behind_a_removed_one() -> None:
    """VOP-17: the walk passes over removed slots; the reused slot of equal size moves no live one."""
    with Life() as life:
        devices = [await life.add(config=bytes(i * 8)) for i in range(4)]
        await life.card.start()
        offsets = [d.slot.off for d in devices]
        await life.host.remove(devices[1])
        assert life.types == [TYPE, -1, TYPE, TYPE]
        bigger = await life.add(config=bytes(100))
        assert bigger.slot.off > offsets[3]
        again = await life.add(config=bytes(8))
        assert again.slot.off == offsets[1]
        for d in (bigger, again):
            await life.up(d)
        assert [d.slot.off for d in life.host.devices] == [
            offsets[0],
            offsets[2],
            offsets[3],
            bigger.slot.off,
            offsets[1],
        ]
        assert all(d.driver_ok for d in life.host.devices)
        await life.host.close()


@in_loop
async def test_vop_17_random_life_of_many_slots() -> None:
    """VOP-17: 300 random adds and removals with the card up: every live device stays driven at its offset."""
    import random

    rnd = random.Random(17)
    with Life() as life:
        await life.card.start()
        live: list[tuple[VopDevice, int]] = []
        for _ in range(300):
            if live and (len(live) == 4 or rnd.random() < 0.4):
                dev, off = live.pop(rnd.randrange(len(live)))
                assert dev.slot.off == off
                await life.host.remove(dev)
            else:
                dev = await life.add(num_vq=rnd.choice((1, 2)), config=bytes(rnd.choice((0, 8, 30))))
                await life.up(dev)
                live.append((dev, dev.slot.off))
            assert all(d.driver_ok for d, _ in live)
            assert sum(t > 0 for t in life.types) == len(live)
        await life.host.close()
        assert life.gddr.used_bytes == 0


@in_loop
async def test_vop_18_orderly_shutdown_of_the_card() -> None:
    """VOP-18: h2c_config_db is -1 before the first device goes; every slot ends at -1, also undriven ones."""
    with Life() as life:
        devices = [await life.add(), await life.add(kind=NO_TYPE), await life.add()]
        await life.card.start()
        seen: list[int] = []
        for probe in life.probed:
            probe.remove = lambda: seen.append(BOOT.get(life.page, 0, "h2c_config_db")) or True  # type: ignore[func-returns-value, method-assign]
        await life.card.close()
        assert seen == [-1, -1]
        assert life.types == [-1, -1, -1]
        assert all(life.ctrl(d, "config_change") == 0 for d in devices)
        assert life.gddr.used_bytes == 0
        await life.host.close()
        assert life.types == [-1, -1, -1]


@in_loop
async def test_vop_18_even_without_a_doorbell() -> None:
    """VOP-18: a device for which the card had no doorbell left ends at -1 as well."""
    with Life() as life:
        held = [life.lines.request(f"other {i}") for i in range(15)]  # the sixteenth is the config doorbell's
        await life.add()
        await life.card.start()
        assert not life.card.devices
        await life.card.close()
        assert life.types == [-1]
        assert len(held) == 15
        await life.host.close()


@in_loop
async def test_vop_50_host_decides_by_its_own_copies() -> None:
    """VOP-50: a card that rewrites the live slots does not move, resize or free anything else on the host."""
    with Life() as life:
        used = life.memory.used_bytes
        first, second = await life.add(config=bytes(8)), await life.add(config=bytes(8))
        addresses = list(first.card_addresses)
        off = first.slot.off
        for name, value in (("num_vq", 200), ("feature_len", 255), ("config_len", 255), ("type", 0)):
            DESC.put(life.page, off, name, value)
        VQ.put(life.page, off + 8, "num", 65535)
        VQ.put(life.page, off + 8, "address", 0xDEAD000)
        life.put_ctrl(first, "c2h_vdev_db", 3)
        third = await life.add(config=bytes(8))
        assert third.slot.off == second.slot.off + second.slot.shape.total
        assert first.card_addresses == addresses
        DESC.put(life.page, second.slot.off, "type", -1)  # not ours to reuse: the host has not removed it
        fourth = await life.add(config=bytes(8))
        assert fourth.slot.off > third.slot.off
        for dev in (first, second, third, fourth):
            await life.host.remove(dev)
        assert life.memory.used_bytes == used
        assert life.smpt.mapped_bytes == 0


@in_loop
async def test_vop_54_crash_then_a_new_boot() -> None:
    """VOP-54: the card dies with everything up; close ends at once; the next boot works with new devices."""
    with Life() as life:
        alive = True
        life.host.peer_alive = lambda: alive
        dev = await life.add()
        await life.card.start()
        alive = False
        life.host.peer_died()
        await asyncio.wait_for(life.host.close(), 20)
        assert not life.host.devices
        with pytest.raises(VopError):
            await life.host.config_change(dev, b"")
        life.page.zero(24, 4096 - 24)
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        life.host, life.card = life.new_host(), life.new_card()
        again = await life.add()
        await life.card.start()
        assert again.driver_ok
        await life.host.close()


@in_loop
async def test_vop_54_death_ends_a_wait_that_runs() -> None:
    """VOP-54: a configuration change and a removal that wait for the card end when it is known to be dead."""
    clock = manual()
    with Life(clock) as life:
        alive = True
        life.host.peer_alive = lambda: alive
        dev = await life.add(config=b"abc")
        BOOT.put(life.page, 0, "h2c_config_db", 3)
        change = asyncio.ensure_future(life.host.config_change(dev, b"def"))
        removal = asyncio.ensure_future(life.host.remove(dev))
        await clock.advance(1)
        alive = False
        life.host.peer_died()
        await clock.advance(0)
        assert await asyncio.wait_for(change, 20) is False
        await asyncio.wait_for(removal, 20)
        assert clock.monotonic() == 1.0


@in_loop
async def test_vop_56_hanging_card_holds_its_memory() -> None:
    """VOP-56: the host ends the removal after 15 s; ring blocks are not reused before the card's reset."""
    clock = manual()
    with Life(clock) as life:
        held: list[Any] = []
        life.host.hold = held.append
        dev = await life.add()
        await life.card.start()
        blocks = list(dev.slot.blocks)
        asyncio.get_running_loop().remove_reader(life.card._config.fd)  # type: ignore[union-attr]
        removal = asyncio.ensure_future(life.host.remove(dev))
        await clock.advance(0)
        await clock.advance(14.9)
        assert not removal.done()
        await clock.advance(0.2)
        await removal
        assert life.types == [-1]
        assert len(held) == 1
        life.bus.host.write(blocks[0], b"a late store of the card")
        fresh = await life.add(served=False)
        assert not set(fresh.slot.blocks) & set(blocks)
        assert life.bus.host.read(fresh.slot.blocks[0], 8) == bytes(8)
        used = life.memory.used_bytes
        held[0]()
        assert life.memory.used_bytes == used - 4096 * 2
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@in_loop
async def test_vop_56_hanging_card_costs_one_limit() -> None:
    """VOP-56: five devices of a hanging card are removed after 15 s together, not each."""
    clock = manual()
    with Life(clock) as life:
        for _ in range(5):
            await life.add()
        await life.card.start()
        asyncio.get_running_loop().remove_reader(life.card._config.fd)  # type: ignore[union-attr]
        closing = asyncio.ensure_future(life.host.close())
        await clock.advance(0)
        await clock.advance(14.9)
        assert not closing.done()
        await clock.advance(0.2)
        await asyncio.wait_for(closing, 20)
        assert life.types == [-1] * 5


@in_loop
async def test_vop_56_dead_card_is_not_waited_for() -> None:
    """VOP-56: with the peer known dead three devices go without any time passing."""
    clock = manual()
    with Life(clock) as life:
        for _ in range(3):
            await life.add()
        await life.card.start()
        life.host.peer_alive = lambda: False
        await asyncio.wait_for(life.host.close(), 20)
        assert clock.monotonic() == 0.0
        assert not life.host.devices


@in_loop
async def test_removal_goes_on_when_its_caller_does_not() -> None:
    """A card that is stopped while it is asked to let a device go: vector, rings and addresses are given back all the
    same, or they would be missed at every later boot."""
    clock = manual()
    with Life(clock) as life:
        held: list[Any] = []
        life.host.hold = held.append
        before = life.memory.used_bytes, life.smpt.mapped_bytes
        dev = await life.add()
        BOOT.put(life.page, 0, "h2c_config_db", 3)  # somebody listens, and never answers
        removal = asyncio.ensure_future(life.host.remove(dev))
        await clock.advance(1)
        assert life.ctrl(dev, "config_change") == C["PARAM_DEV_REMOVE"]
        removal.cancel()
        await asyncio.gather(removal, return_exceptions=True)
        closing = asyncio.ensure_future(life.host.close())
        await clock.advance(20)
        await asyncio.wait_for(closing, 20)
        assert life.host.devices == []
        assert [users for *_, users in life.irq.rows() if users] == []
        held.pop()()
        assert (life.memory.used_bytes, life.smpt.mapped_bytes) == before
