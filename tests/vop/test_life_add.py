"""A device from ADD_DEVICE to DRIVER_OK: VOP-1, 4, 6 to 12."""

from __future__ import annotations

import asyncio
import select
import threading
import time
from typing import Any

import pytest
from life import BOOT, CTRL, DESC, TYPE, VERSION_1, VQ, C, Life, ProbeDriver, Trace, in_loop, manual, until

from mic_emu import layout as L
from mic_emu.card.os.vop import VirtioDevice
from mic_emu.vop import device_page as dp


@in_loop
async def test_vop_01_bytes_of_the_page() -> None:
    """VOP-1: first slot at 24; header, vqconfigs, features, config and control block at the offsets of 2.4."""
    with Life() as life:
        dev = await life.add(num_vq=2, features=0x1122334455667788, config=b"0123456789")
        raw = life.page.read(0, 512)
        assert raw[24:29] == bytes([TYPE, 2, 8, 10, 0])
        ring0, ring1 = (int.from_bytes(raw[32 + 24 * i : 40 + 24 * i], "little") for i in (0, 1))
        assert (ring0, ring1) == tuple(dev.card_addresses)
        assert raw[48:50] == raw[72:74] == (8).to_bytes(2, "little")
        assert raw[80:88] == (0x1122334455667788).to_bytes(8, "little")
        assert raw[88:96] == bytes(8)
        assert raw[96:106] == b"0123456789"
        control = 24 + 88  # align8(8 + 48 + 16 + 10)
        assert raw[control + 8 : control + 13] == bytes(5)
        assert raw[control + 13] == dev.irq.offset
        assert raw[control + 14] == 0xFF
        second = await life.add()
        assert second.slot.off == control + 16
        await life.host.close()


def test_vop_02_sizes() -> None:
    """VOP-2: desc 8, vqconfig 24, ctrl 16, vring info 8, copy_desc 24, boot parameters 24 bytes."""
    sizes = [s.size for s in (DESC, VQ, CTRL, L.VRING_INFO, L.COPY_DESC, BOOT)]
    assert sizes == [8, 24, 16, 8, 24, 24]


@in_loop
async def test_vop_04_every_ring_has_its_magic() -> None:
    """VOP-4: ring i of type t carries 0xc0ffee00 + t + i behind the rings."""
    with Life() as life:
        dev = await life.add(num_vq=3, num=128)
        for i, block in enumerate(dev.slot.blocks):
            assert int.from_bytes(life.bus.host.read(block + 5130, 4), "little") == 0xC0FFEE00 + TYPE + i
        await life.host.close()


@pytest.mark.parametrize("ring", [0, 1])
@in_loop
async def test_vop_04_card_refuses_another_magic(ring: int) -> None:
    """VOP-4: a wrong magic is EIO for the driver; FAILED instead of DRIVER_OK; rings are given back."""

    class Two(ProbeDriver):
        rings = 2

    with Life(driver=Two) as life:
        dev = await life.add(num_vq=2)
        life.bus.host.store(dev.slot.blocks[ring] + dp.vring_size(8) + 4, 4, 0xC0FFEE00)
        await life.card.start()
        assert life.desc(dev, "status") == 1 | 2 | 8 | C["VIRTIO_FAILED"]
        assert life.probed[0].calls == ["probe", "remove"]
        assert any("magic" in r["message"] for r in life.records)
        assert life.gddr.used_bytes == 0
        await life.host.close()


@in_loop
async def test_vop_06_the_type_is_the_last_store() -> None:
    """VOP-6: whatever ADD_DEVICE stores in a slot comes before the type; a reused slot is -1 meanwhile."""
    with Life() as life:
        first = await life.add(config=b"abc")
        await life.host.remove(first)
        stores: list[tuple[int, Any]] = []
        trace = Trace(life.page.pointer, life.page.size)
        trace.seen = lambda off, size, value: stores.append((off, value))
        life.host.page = trace
        for dev in (await life.add(config=b"abc"), await life.add(num_vq=2)):
            mine = [
                (off, v) for off, v in stores if dev.slot.off <= off < dev.slot.off + dev.slot.shape.total
            ]
            assert mine[-1] == (dev.slot.off, TYPE)
            assert all(off != dev.slot.off or v in (0, -1) for off, v in mine[:-1])
            assert len(mine) >= 14
        await life.host.close()


@in_loop
async def test_vop_06_a_scanning_card_never_sees_half_a_slot() -> None:
    """VOP-6: a live slot always has its doorbell, its ring address and its number of entries."""
    with Life() as life:
        seen, bad, stop = 0, [], threading.Event()

        def scan() -> None:
            nonlocal seen
            while not stop.is_set():
                for slot in dp.walk(life.card.page):
                    if slot.type <= 0:
                        continue
                    what = (
                        CTRL.get(life.card.page, slot.ctrl, "c2h_vdev_db"),
                        VQ.get(life.card.page, slot.off + 8, "address"),
                        VQ.get(life.card.page, slot.off + 8, "num"),
                    )
                    if DESC.get(life.card.page, slot.off, "type") <= 0:
                        continue  # removed while we looked
                    seen += 1
                    if what[0] < 0 or not what[1] or what[2] != 8:
                        bad.append(what)

        thread = threading.Thread(target=scan)
        thread.start()
        try:
            rounds, end = 0, time.monotonic() + 30
            while rounds < 150 or (not seen and time.monotonic() < end):
                await life.host.remove(await life.add(config=bytes(5)))
                rounds += 1
        finally:
            stop.set()
            thread.join()
        assert seen > 0
        assert not bad


@in_loop
async def test_vop_07_first_scan_finds_early_devices() -> None:
    """VOP-7: devices added before the card boots come up, and no card doorbell was rung for them."""
    with Life() as life:
        rung: list[int] = []
        life.bus.ring_card = rung.append  # type: ignore[method-assign]
        devices = [await life.add() for _ in range(3)]
        assert rung == []
        del life.bus.ring_card
        await life.card.start()
        assert [d.driver_ok for d in devices] == [True] * 3
        await life.host.close()


@pytest.mark.parametrize("step", range(0, 40, 3))
@in_loop
async def test_vop_08_no_window_at_boot(step: int) -> None:
    """VOP-8: a device added at any step of the card's first scan is found."""
    with Life() as life:
        early = await life.add()
        booting = asyncio.ensure_future(life.card.start())
        for _ in range(step):
            await asyncio.sleep(0)
        late = await life.add()
        await booting
        await life.up(early)
        await life.up(late)
        await life.host.close()


@in_loop
async def test_vop_09_config_doorbell_only_when_published() -> None:
    """VOP-9: -1 means no ring at all; afterwards exactly one per ADD, of the published doorbell."""
    with Life() as life:
        rung: list[int] = []
        life.bus.ring_card = rung.append  # type: ignore[method-assign]
        await life.add(served=False)
        assert rung == []
        BOOT.put(life.page, 0, "h2c_config_db", 5)
        await life.add(served=False)
        assert rung == [5]
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@pytest.mark.parametrize("db", [16, 100, 127, -2, -128])
@in_loop
async def test_vop_52_config_doorbell_out_of_range(db: int) -> None:
    """VOP-52: a config doorbell that does not exist is ignored by ADD_DEVICE and CONFIG_CHANGE; no line rings."""
    clock = manual()
    with Life(clock) as life:
        BOOT.put(life.page, 0, "h2c_config_db", db)
        before = life.page.read(0, 24)
        dev = await life.add(config=b"old!")
        change = asyncio.ensure_future(life.host.config_change(dev, b"new!"))
        await clock.advance(11)
        assert await change is False
        assert select.select([life.bus.irq_fd(n) for n in range(20)], [], [], 0)[0] == []
        assert life.page.read(0, 24) == before
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@pytest.mark.parametrize(("features", "statuses"), [(VERSION_1, [0, 1, 3, 11, 11, 15]), (0, [0, 1, 3, 3, 7])])
@in_loop
async def test_vop_10_reset_then_status_one_ring_each(features: int, statuses: list[int]) -> None:
    """VOP-10: reset hand-shake first, then 1, 3, (11), used rings, 7 or 15; one doorbell after each store."""
    with Life() as life:
        dev = await life.add(features=features)
        DESC.put(life.page, dev.slot.off, "status", 0x55)  # left by somebody: the reset clears it
        at_ring: list[int] = []
        ring = life.card_bus.ring_host

        def note(db: int) -> None:
            assert db == dev.irq.offset
            at_ring.append(life.desc(dev, "status") if life.ctrl(dev, "vdev_reset") == 0 else 0)
            ring(db)

        life.card_bus.ring_host = note  # type: ignore[method-assign]
        await life.card.start()
        assert at_ring == statuses
        await life.host.close()


@in_loop
async def test_vop_11_used_rings_before_the_flag() -> None:
    """VOP-11: when the card stores used_address_updated = 1, every used_address is there and page aligned."""

    class Three(ProbeDriver):
        rings = 3

    with Life(driver=Three) as life:
        dev = await life.add(num_vq=3)
        flag = dev.slot.off + dev.slot.shape.ctrl_off + 12
        found: list[list[int]] = []

        def seen(off: int, size: int, value: object) -> None:
            if off == flag and value == 1:
                found.append(dev.bottom.used_addresses())

        trace = Trace(life.card.page.pointer, life.card.page.size)
        trace.seen = seen
        life.card.page = trace
        await life.card.start()
        (addresses,) = found
        assert len(set(addresses)) == 3
        assert all(a and a % 4096 == 0 for a in addresses)
        assert life.ctrl(dev, "used_address_updated") == 0
        await life.host.close()


@in_loop
async def test_vop_12_host_never_takes_the_used_rings() -> None:
    """VOP-12: after 9.9 s ENODEV, FAILED; the rings are freed and no longer offered."""
    clock = manual()
    with Life(clock) as life:
        dev = await life.add(served=False)
        life.answer(dev, lambda: dev.bottom.acknowledge_reset() if dev.bottom.reset_wanted else None)
        booting = asyncio.ensure_future(life.card.start())
        await until(lambda: life.ctrl(dev, "used_address_updated") == 1, "the offer")
        await clock.advance(9.8)
        assert not booting.done()
        assert life.gddr.used_bytes > 0
        await clock.advance(0.2)
        await booting
        assert life.desc(dev, "status") & C["VIRTIO_FAILED"]
        assert dev.bottom.used_addresses() == [0]
        assert life.ctrl(dev, "used_address_updated") == 0
        assert life.gddr.used_bytes == 0
        assert any("did not take" in r["message"] for r in life.records)
        BOOT.put(life.page, 0, "h2c_config_db", -1)
        await life.host.close()


@in_loop
async def test_vop_12_more_rings_than_offered() -> None:
    """VOP 4.3 step 9: a driver that wants more rings than there are gets ENOENT, and the device FAILED."""

    class Two(ProbeDriver):
        rings = 2

        async def probe(self, dev: VirtioDevice) -> None:
            with pytest.raises(FileNotFoundError):
                await super().probe(dev)
            raise OSError("no rings")

    with Life(driver=Two) as life:
        dev = await life.add(num_vq=1)
        await life.card.start()
        assert life.desc(dev, "status") & C["VIRTIO_FAILED"]
        await life.host.close()
