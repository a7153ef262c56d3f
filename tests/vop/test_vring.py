"""The split ring: geometry, order of work, suppression, and every way a card can break it."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

import pytest

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.bar import drain
from mic_emu.testing.rings import (
    DRIVER_OK,
    EVENT_IDX,
    INDIRECT,
    INDIRECT_DESC,
    NEEDS_RESET,
    NEXT,
    SMPT_BASE,
    WRITE,
    FakeDevice,
    FakeDriver,
    Rig,
)


class Pair:
    """Both halves of one rig."""

    def __init__(self, **kw: int) -> None:
        self.rig = Rig(**kw)
        self.drv = FakeDriver(self.rig)
        self.dev = FakeDevice(self.rig)

    def close(self) -> None:
        self.drv.close()
        self.dev.close()
        self.rig.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    p = Pair(num=8, num_vq=2, features=INDIRECT_DESC)
    yield p
    p.close()


@pytest.fixture
def plain() -> Iterator[Pair]:
    p = Pair(num=8, num_vq=2)
    yield p
    p.close()


def broke(dev: FakeDevice, i: int = 0) -> int:
    """Pop must fail: its errno; the ring is then dead and says so again."""
    with pytest.raises(OSError) as e:
        dev.pop(i)
    assert dev.vq[i].broken
    with pytest.raises(OSError) as again:
        dev.pop(i)
    assert again.value.errno == e.value.errno
    assert not lib.mic_vq_has_work(dev.vq[i])
    return e.value.errno or 0


def test_vop_3_ring_block_geometry() -> None:
    """VOP-3: info is at 5126 for 128 entries and every legal ring fits a block of 8192 bytes."""
    assert [lib.mic_vring_size(n) for n in (1, 8, 64, 128)] == [4110, 4166, 4614, 5126]
    assert {lib.mic_vring_block_size(1 << k) for k in range(8)} == {8192}


def test_vop_34_ring_sizes() -> None:
    """VOP-34: only powers of two up to 128 are rings."""
    assert [n for n in range(1000) if lib.mic_vring_num_ok(n)] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert not lib.mic_vring_num_ok(65535)


def test_driver_clears_the_ring_but_not_its_info(pair: Pair) -> None:
    """VOP 3.2: the card zeroes exactly the ring; the magic behind it stays."""
    base = pair.rig.blocks[0]
    size = lib.mic_vring_size(8)
    pair.rig.bus.host.write(base, b"\xff" * size)
    pair.drv.reset()
    assert pair.rig.bus.host.read(base, size) == bytes(size)
    info = layout.VRING_INFO.unpack(pair.rig.bus.host.read(base + size, 8))
    assert info["magic"] == 0xC0FFEE00 + 2


def test_chain_passes_both_ways(pair: Pair) -> None:
    """A chain arrives with its segments in order, and its completion with token and length."""
    pair.drv.add([(0x10000, 16), (0x20000, 100)], [(0x30000, 50), (0x40000, 1)], token=1 << 60)
    chain = pair.dev.pop()
    assert chain is not None
    assert chain.readable == ((0x10000, 16), (0x20000, 100))
    assert chain.writable == ((0x30000, 50), (0x40000, 1))
    assert pair.dev.pop() is None
    assert pair.drv.get() is None
    pair.dev.push(chain.head, 51)
    assert pair.drv.get() == (1 << 60, 51)
    assert pair.drv.get() is None


def test_used_len_is_never_more_than_the_room(pair: Pair) -> None:
    """VOP-25: a length that counts readable bytes too is cut to what the chain can hold."""
    pair.drv.add([(0x10000, 16)], [(0x30000, 8)], token=5)
    chain = pair.dev.pop()
    assert chain is not None
    pair.dev.push(chain.head, 24)
    assert pair.drv.get() == (5, 8)


def test_vop_24_info_follows_completion(pair: Pair) -> None:
    """VOP-24: info.avail_idx moves with the completion, not with the pop."""
    info = pair.rig.blocks[0] + lib.mic_vring_size(8)
    pair.drv.add([(0x10000, 16)], [])
    chain = pair.dev.pop()
    assert chain is not None
    assert pair.rig.bus.host.load(info, 2) == 0
    pair.dev.push(chain.head, 0)
    assert pair.rig.bus.host.load(info, 2) == 1


def test_ring_full_is_enospc(plain: Pair) -> None:
    """A full ring refuses one more descriptor and takes it after a completion."""
    for k in range(4):
        plain.drv.add([(0x1000, 1)], [(0x2000, 1)], token=k)
    with pytest.raises(OSError) as e:
        plain.drv.add([(0x1000, 1)], [])
    assert e.value.errno == errno.ENOSPC
    chain = plain.dev.pop()
    assert chain is not None
    plain.dev.push(chain.head, 0)
    assert plain.drv.get() == (0, 0)
    plain.drv.add([(0x1000, 1)], [(0x2000, 1)], token=9)


def test_indirect_chain_needs_one_descriptor(pair: Pair) -> None:
    """With INDIRECT_DESC eight chains of two segments fit a ring of eight."""
    for k in range(8):
        pair.drv.add([(0x1000, 1)], [(0x2000, 1)], token=k)
    assert [c.writable for c in iter(pair.dev.pop, None)] == [((0x2000, 1),)] * 8


def test_fill_appears_at_once(pair: Pair) -> None:
    """A batch of completions is invisible until it is published."""
    for k in range(3):
        pair.drv.add([], [(0x1000, 64)], token=k)
    heads = [c.head for c in iter(pair.dev.pop, None)]
    for h in heads:
        lib.mic_vq_fill(pair.dev.vq[0], h, 1)
    assert pair.drv.get() is None
    lib.mic_vq_publish(pair.dev.vq[0])
    assert [pair.drv.get() for _ in range(4)] == [(0, 1), (1, 1), (2, 1), None]


# --- hostile or broken card --------------------------------------------------------------------


def test_vop_44_looping_chain_is_eloop(pair: Pair) -> None:
    """VOP-44: a loop ends in ELOOP at once; the other ring works on; a reset repairs it."""
    for k in range(8):
        pair.drv.desc(k, 0x1000, 4, NEXT, (k + 1) % 8)
    pair.drv.offer(0)
    pair.drv.add([(0x1000, 4)], [], token=7, i=1)
    assert broke(pair.dev) == errno.ELOOP
    chain = pair.dev.pop(1)
    assert chain is not None
    pair.dev.push(chain.head, 0, 1)
    assert pair.drv.get(1) == (7, 0)
    pair.drv.reset()
    pair.dev.reset()
    pair.drv.add([(0x1000, 4)], [], token=8)
    assert pair.dev.pop() is not None


def test_vop_44_self_loop_of_empty_descriptors(pair: Pair) -> None:
    """VOP-44: zero-length descriptors do not hide a loop."""
    pair.drv.desc(3, 0, 0, NEXT, 3)
    pair.drv.offer(3)
    assert broke(pair.dev) == errno.ELOOP


@pytest.mark.parametrize("head", [8, 9, 0x7FFF, 0xFFFF])
def test_vop_45_head_outside_the_ring(pair: Pair, head: int) -> None:
    """VOP-45: a head that is no index of the table is EINVAL."""
    pair.drv.offer(head)
    assert broke(pair.dev) == errno.EINVAL


@pytest.mark.parametrize("nxt", [8, 0xFFFF])
def test_vop_45_next_outside_the_ring(pair: Pair, nxt: int) -> None:
    """VOP-45: a next index outside the table is EINVAL."""
    pair.drv.desc(0, 0x1000, 4, NEXT, nxt)
    pair.drv.offer(0)
    assert broke(pair.dev) == errno.EINVAL


GDDR = 64 << 20


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (GDDR, 1),
        (GDDR - 1, 2),
        (0, GDDR + 1),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 4096, 4096),
        (SMPT_BASE, 16),
        (SMPT_BASE - 8, 16),
        (1 << 63, 0xFFFFFFFF),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_vop_46_address_outside_card_memory(pair: Pair, addr: int, length: int, flags: int) -> None:
    """VOP-46: outside GDDR, wrapping, or in the window of host memory: EFAULT."""
    pair.drv.desc(0, addr, length, flags)
    pair.drv.offer(0)
    assert broke(pair.dev) == errno.EFAULT


def test_vop_46_last_byte_of_card_memory(pair: Pair) -> None:
    """VOP-46: the last byte still counts as card memory."""
    pair.drv.desc(0, GDDR - 1, 1)
    pair.drv.offer(0)
    chain = pair.dev.pop()
    assert chain is not None
    assert chain.readable == ((GDDR - 1, 1),)


def test_vop_47_used_address(pair: Pair) -> None:
    """VOP-47: misaligned is EINVAL, outside is EFAULT; 0 leaves a ring that answers work with ENXIO."""
    block = pair.rig.blocks[0]
    assert pair.dev.init(0, block, 0x1002) == -errno.EINVAL
    assert broke(pair.dev) == errno.ENXIO
    assert pair.dev.init(0, block, GDDR - 4) == -errno.EFAULT
    assert pair.dev.init(0, block, SMPT_BASE) == -errno.EFAULT
    assert pair.dev.init(0, block, (1 << 64) - 4) == -errno.EFAULT
    assert pair.dev.init(0, block, 0) == 0
    assert pair.dev.pop() is None
    pair.drv.add([(0x1000, 4)], [])
    assert broke(pair.dev) == errno.ENXIO


def test_vop_48_indirect_without_the_feature(plain: Pair) -> None:
    """VOP-48: INDIRECT that was not negotiated is EINVAL."""
    plain.drv.table(0x8000, [(0x1000, 4, 0, 0)])
    plain.drv.desc(0, 0x8000, 16, INDIRECT)
    plain.drv.offer(0)
    assert broke(plain.dev) == errno.EINVAL


def test_vop_48_readable_after_writable(pair: Pair) -> None:
    """VOP-48: a readable descriptor behind a writable one is EINVAL."""
    pair.drv.desc(0, 0x1000, 4, NEXT | WRITE, 1)
    pair.drv.desc(1, 0x1000, 4, 0)
    pair.drv.offer(0)
    assert broke(pair.dev) == errno.EINVAL


def test_vop_48_empty_descriptors_are_tolerated(pair: Pair) -> None:
    """VOP-48: zero-length descriptors, wherever they point, leave no segment."""
    pair.drv.desc(0, (1 << 64) - 1, 0, NEXT, 1)
    pair.drv.desc(1, 0x1000, 4, NEXT, 2)
    pair.drv.desc(2, 0, 0, WRITE)
    pair.drv.offer(0)
    chain = pair.dev.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == (((0x1000, 4),), ())


@pytest.mark.parametrize(
    ("rows", "length", "flags", "want"),
    [
        ([(0x1000, 4, 0, 0)], 0, INDIRECT, errno.EINVAL),
        ([(0x1000, 4, 0, 0)], 15, INDIRECT, errno.EINVAL),
        ([(0x1000, 4, 0, 0)], 16, INDIRECT | NEXT, errno.EINVAL),
        ([(0x1000, 4, 0, 0)], 16, INDIRECT | WRITE, errno.EINVAL),
        ([(0x1000, 4, 0, 0)], 16 * 129, INDIRECT, errno.EINVAL),
        ([(0x1000, 4, NEXT, 0)], 16, INDIRECT, errno.ELOOP),
        ([(0x1000, 4, NEXT, 1)], 16, INDIRECT, errno.EINVAL),
        ([(0x1000, 4, NEXT, 0xFFFF)], 16, INDIRECT, errno.EINVAL),
        ([(0x8000, 16, INDIRECT, 0)], 16, INDIRECT, errno.EINVAL),
        ([(GDDR, 1, 0, 0)], 16, INDIRECT, errno.EFAULT),
        ([(0x1000, 4, NEXT | WRITE, 1), (0x1000, 4, 0, 0)], 32, INDIRECT, errno.EINVAL),
    ],
)
def test_vop_48_malformed_indirect(
    pair: Pair, rows: list[tuple[int, int, int, int]], length: int, flags: int, want: int
) -> None:
    """VOP-48: every malformed indirect table ends in its errno."""
    pair.drv.table(0x8000, rows)
    pair.drv.desc(0, 0x8000, length, flags, 0)
    pair.drv.offer(0)
    assert broke(pair.dev) == want


def test_vop_46_indirect_table_outside(pair: Pair) -> None:
    """VOP-46: a table that is not wholly in card memory is EFAULT."""
    pair.drv.desc(0, GDDR - 16, 32, INDIRECT)
    pair.drv.offer(0)
    assert broke(pair.dev) == errno.EFAULT


def test_direct_descriptors_may_lead_to_a_table(pair: Pair) -> None:
    """Virtio 1.x: normal descriptors followed by one indirect table are one chain."""
    pair.drv.table(0x8000, [(0x3000, 5, WRITE, 0)])
    pair.drv.desc(0, 0x1000, 4, NEXT, 1)
    pair.drv.desc(1, 0x8000, 16, INDIRECT)
    pair.drv.offer(0)
    chain = pair.dev.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == (((0x1000, 4),), ((0x3000, 5),))


@pytest.mark.parametrize("idx", [9, 0x8000, 0xFFFF])
def test_vop_49_avail_index_jump(pair: Pair, idx: int) -> None:
    """VOP-49: an index more than a ring ahead flags the ring, without a loop."""
    pair.drv.set_avail_idx(idx)
    assert broke(pair.dev) == errno.EPROTO


def test_more_segments_than_the_device_takes(pair: Pair) -> None:
    """A chain with more segments than the device has room for is ENOSPC."""
    dev = FakeDevice(pair.rig, max_segs=2)
    pair.drv.add([(0x1000, 4), (0x1000, 4)], [(0x1000, 4)])
    assert broke(dev) == errno.ENOSPC
    dev.close()


@pytest.mark.parametrize(("uid", "idx"), [(8, 1), (0xFFFFFFFF, 1), (1, 1), (0, 9), (0, 0xFFFF)])
def test_driver_survives_a_hostile_device(pair: Pair, uid: int, idx: int) -> None:
    """A used element that names no chain in flight, or an index out of reach, is EIO for the driver."""
    pair.drv.add([(0x1000, 4)], [], token=1)
    used = pair.rig.used[0]
    pair.rig.bus.gddr.store(used + 4, 4, uid)
    pair.rig.bus.gddr.store(used + 2, 2, idx)
    with pytest.raises(OSError) as e:
        pair.drv.get()
    assert e.value.errno == errno.EIO
    with pytest.raises(OSError) as e:
        pair.drv.add([(0x1000, 4)], [])
    assert e.value.errno == errno.EIO


def test_init_refuses_blocks_outside_the_memories(pair: Pair) -> None:
    """Rings that do not lie wholly in their memories are refused on both sides."""
    ptr = pair.rig.bus.ptr
    vq, dq = ffi.new("struct mic_vq *"), ffi.new("struct mic_dq *")
    host = pair.rig.bus.host.size
    assert lib.mic_vq_init(vq, ptr, host - 4096, 0, 8, 0) == -errno.EFAULT
    assert lib.mic_vq_init(vq, ptr, (1 << 64) - 4096, 0, 8, 0) == -errno.EFAULT
    assert lib.mic_vq_init(vq, ptr, 0x1001, 0, 8, 0) == -errno.EINVAL
    assert lib.mic_vq_init(vq, ptr, 0, 0, 3, 0) == -errno.EINVAL
    assert lib.mic_dq_init(dq, ptr, SMPT_BASE + host - 4096, 0x1000, 8, 0, 0) == -errno.EFAULT
    assert lib.mic_dq_init(dq, ptr, SMPT_BASE, GDDR - 8, 8, 0, 0) == -errno.EFAULT
    assert lib.mic_dq_init(dq, ptr, SMPT_BASE, 0x1000, 8, INDIRECT_DESC, GDDR - 16) == -errno.EFAULT
    assert lib.mic_dq_init(dq, ptr, SMPT_BASE, 0x1002, 8, 0, 0) == -errno.EINVAL
    assert lib.mic_dq_init(dq, ptr, SMPT_BASE, 0x1000, 256, 0, 0) == -errno.EINVAL
    assert vq.broken
    assert dq.broken


# --- lines and hand-shake bytes ----------------------------------------------------------------


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_vop_28_interrupt_suppression(plain: Pair) -> None:
    """VOP-28: NO_INTERRUPT, and a doorbell of -1, keep the card's line quiet."""
    line = plain.rig.bus.irq_fd(0)
    for quiet, db, rings in ((True, 0, False), (False, -1, False), (False, 0, True)):
        plain.drv.reset()
        plain.dev.reset()
        plain.rig.put_ctrl("h2c_vdev_db", db)
        plain.drv.add([(0x1000, 4)], [])
        if quiet:
            lib.mic_dq_disable_interrupt(plain.drv.dq[0])
        else:
            assert not lib.mic_dq_enable_interrupt(plain.drv.dq[0])
        chain = plain.dev.pop()
        assert chain is not None
        plain.dev.push(chain.head, 0)
        lib.mic_vdev_complete(plain.dev.vdev, plain.dev.vq[0])
        assert readable(line) is rings
        drain(line)
        assert not readable(line)


@pytest.mark.parametrize("db", [16, 100, 127, -2, -128])
def test_vop_52_doorbell_out_of_range(plain: Pair, db: int) -> None:
    """VOP-52: a doorbell that does not exist is ignored; no other line rings."""
    plain.rig.put_ctrl("h2c_vdev_db", db)
    lib.mic_vdev_interrupt(plain.dev.vdev)
    assert not any(readable(plain.rig.bus.irq_fd(k)) for k in range(20))


def test_vop_53_doorbell_storm_is_one_wake(plain: Pair) -> None:
    """VOP-53: any number of kicks before a sleep is one wake; a second sleep times out."""
    for _ in range(100000):
        plain.rig.bus.ring_host(0)
    assert lib.mic_vdev_sleep(plain.dev.vdev, ffi.NULL, 0, 1000) == 1
    assert lib.mic_vdev_sleep(plain.dev.vdev, ffi.NULL, 0, 0) == 0


def test_shared_line_wakes_every_device(plain: Pair) -> None:
    """VOP 1.2: devices on one doorbell all wake from one ring; none takes it from the others."""
    other = FakeDevice(plain.rig)
    plain.rig.bus.ring_host(0)
    assert lib.mic_vdev_sleep(plain.dev.vdev, ffi.NULL, 0, 1000) == 1
    assert lib.mic_vdev_sleep(other.vdev, ffi.NULL, 0, 1000) == 1
    assert lib.mic_vdev_sleep(other.vdev, ffi.NULL, 0, 0) == 0
    other.close()


def test_sleep_names_what_is_ready(plain: Pair) -> None:
    """The mask has bit 0 for the line, 1 for control, 2 and up for the caller's descriptors."""
    a, b = os.pipe()
    c, d = os.pipe()
    dev = FakeDevice(plain.rig, control_fd=a)
    extra = ffi.new("int[]", [c])
    os.write(b, b"x")
    assert lib.mic_vdev_sleep(dev.vdev, extra, 1, 1000) == 0b010
    os.write(d, b"x")
    plain.rig.bus.ring_host(0)
    assert lib.mic_vdev_sleep(dev.vdev, extra, 1, 1000) == 0b111
    dev.close()
    for fd in (a, b, c, d):
        os.close(fd)


def test_handshake_bytes(plain: Pair) -> None:
    """The loop leaves for each request byte until it is cleared, for a new status once."""
    vdev = plain.dev.vdev
    assert not lib.mic_vdev_handshake(vdev)
    for name in ("vdev_reset", "used_address_updated", "guest_ack"):
        plain.rig.put_ctrl(name, 1)
        assert lib.mic_vdev_handshake(vdev)
        assert lib.mic_vdev_handshake(vdev)
        plain.rig.put_ctrl(name, 0)
        assert not lib.mic_vdev_handshake(vdev)
    assert not lib.mic_vdev_driver_ok(vdev)
    plain.rig.status = DRIVER_OK
    assert lib.mic_vdev_handshake(vdev)
    assert not lib.mic_vdev_handshake(vdev)
    assert lib.mic_vdev_driver_ok(vdev)


def test_broken_ring_asks_for_a_reset(plain: Pair) -> None:
    """VOP 11: NEEDS_RESET appears in the status, the card is told, the other bits stay."""
    plain.rig.status = DRIVER_OK | 3
    lib.mic_vdev_broken(plain.dev.vdev, plain.dev.vq[0])
    assert plain.rig.status == DRIVER_OK | 3 | NEEDS_RESET
    assert readable(plain.rig.bus.irq_fd(0))
    assert plain.dev.vq[0].broken
    assert not plain.dev.vq[1].broken


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_kick_asked_for_is_kick_given(features: int) -> None:
    """With and without EVENT_IDX: the device that found nothing is kicked by the next chain, once."""
    p = Pair(num=8, features=features)
    for _ in range(5):
        assert not lib.mic_vq_enable_kick(p.dev.vq[0])
        p.drv.add([(0x1000, 4)], [])
        assert lib.mic_dq_should_kick(p.drv.dq[0])
        assert not lib.mic_dq_should_kick(p.drv.dq[0])
        lib.mic_vq_disable_kick(p.dev.vq[0])
        p.drv.add([(0x1000, 4)], [])
        assert not lib.mic_dq_should_kick(p.drv.dq[0])
        assert lib.mic_vq_enable_kick(p.dev.vq[0])
        for c in list(iter(p.dev.pop, None)):
            p.dev.push(c.head, 0)
        while p.drv.get():
            pass
    p.close()
