"""The disk backend against a hostile card: every attack is contained, and a reset repairs all."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from mic_emu import layout
from mic_emu.testing.disk import BLK_FEATURES, MODERN, SECTOR, Disk
from mic_emu.testing.hostile import Attack, attacks, scribble, storm
from mic_emu.testing.machine import eventually
from mic_emu.testing.rings import NEEDS_RESET, FakeDevice, FakeDriver, Rig

SECTORS = 256
IN = layout.CONSTANTS["VIRTIO_BLK_T_IN"]
SEEDS = range(4)


@pytest.fixture
def image() -> Iterator[int]:
    fd = os.memfd_create("disk")
    os.pwrite(fd, random.Random(3).randbytes(SECTORS * SECTOR), 0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("features", [MODERN, BLK_FEATURES], ids=["modern", "plain"])
@pytest.mark.parametrize("seed", SEEDS)
def test_vop_44_to_49_ring_library(features: int, seed: int) -> None:
    """VOP-44..49: every attack ends in its documented errno; the ring stays dead until it is set up again."""
    with Rig(16, features=features) as rig:
        drv, dev = FakeDriver(rig), FakeDevice(rig)
        for attack in attacks(rig, seed):
            drv.reset()
            dev.reset()
            attack.launch(drv)
            if attack.error is None:
                assert dev.pop() is not None, attack.name
                continue
            for _ in range(2):
                with pytest.raises(OSError) as e:
                    dev.pop()
                assert e.value.errno == attack.error, attack.name
        drv.close()
        dev.close()


def reset_works(d: Disk, image: int, attack: Attack) -> None:
    """After the hand-shake the disk reads again."""
    d.reset()
    head = layout.BLK_REQ.pack(type=IN, sector=1)
    d.rig.bus.gddr.write(d.pool, head)
    d.drv.add([(d.pool, 16)], [(d.pool + 4096, 513)], token=7)
    d.drv.kick()
    eventually(lambda: d.drv.get() == (7, 513), 20, f"a read after {attack.name!r} and a reset")
    assert d.rig.bus.gddr.read(d.pool + 4096, 513) == os.pread(image, SECTOR, SECTOR) + b"\0"


@pytest.mark.parametrize("features", [MODERN, BLK_FEATURES], ids=["modern", "plain"])
@pytest.mark.parametrize("seed", SEEDS)
def test_vop_44_to_49_disk_recovers(image: int, features: int, seed: int) -> None:
    """VOP-44..49: the backend process flags the device after each attack and works after each reset."""
    before = os.pread(image, SECTORS * SECTOR, 0)
    with Disk(image, SECTORS, features=features, num=16) as d:
        for attack in attacks(d.rig, seed):
            attack.launch(d.drv)
            d.rig.bus.ring_host(0)
            if attack.error is not None:
                eventually(lambda: d.rig.status & NEEDS_RESET, 20, f"NEEDS_RESET after {attack.name!r}")
            reset_works(d, image, attack)
    assert os.pread(image, SECTORS * SECTOR, 0) == before


def test_vop_50_rewritten_slot_has_no_effect(image: int) -> None:
    """VOP-50: num, lengths, type and addresses of a live slot are the host's private copies."""
    with Disk(image, SECTORS) as d:
        slot, host = d.rig.slot_off, d.rig.bus.host
        for off in (0, 1, 2, 3, *range(8, 32)):
            host.store(slot + off, 1, 0xFF)
        assert d.read(2, SECTOR) == os.pread(image, SECTOR, 2 * SECTOR)


@pytest.mark.parametrize("seed", SEEDS)
def test_vop_51_scribbling_card(image: int, seed: int) -> None:
    """VOP-51, VOP-53: random stores into rings under doorbell storms never take the backend down."""
    with Disk(image, SECTORS, num=16) as d:
        for round_no in range(20):
            scribble(d.rig, seed * 100 + round_no, 200)
            storm(d.rig, 50)
            d.drv.set_avail_idx(round_no)
            d.rig.bus.ring_host(0)
        d.reset()
        assert not d.rig.status & NEEDS_RESET
        assert os.waitpid(d.backend.pid, os.WNOHANG) == (0, 0), "the backend died"


def test_vop_47_no_used_ring(image: int) -> None:
    """VOP-47: DRIVER_OK without a usable used ring: flagged, no crash; a good hand-over repairs it."""
    with Rig(16) as rig:
        drv, dev = FakeDriver(rig), FakeDevice(rig)
        for bad, want in ((0, errno.ENXIO), (2, errno.ENXIO), (rig.bus.gddr.size, errno.ENXIO)):
            dev.init(0, rig.blocks[0], bad)
            drv.reset()
            drv.add([(4096, 16)], [])
            with pytest.raises(OSError) as e:
                dev.pop()
            assert e.value.errno == want
        drv.reset()
        dev.reset()
        drv.add([(4096, 16)], [])
        assert dev.pop() is not None
        drv.close()
        dev.close()
