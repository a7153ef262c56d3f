"""What ADD_DEVICE refuses: VOP-33 to 39 (over the channel of a backend, which is our ioctl)."""

from __future__ import annotations

import errno

import pytest
from life import TYPE, Life, in_loop

from mic_emu.host.vop import VopError

EINVAL = errno.EINVAL


async def refused(life: Life, **what: object) -> int:
    """errno of an ADD_DEVICE that must fail; page, memory, SMPT and vectors are as before."""
    before = (life.page.read(0, 4096), life.memory.used_bytes, life.smpt.mapped_bytes, len(life.irq.rows()))
    with pytest.raises((VopError, OSError)) as e:
        await life.add(served=False, **what)  # type: ignore[arg-type]
    assert (
        life.page.read(0, 4096),
        life.memory.used_bytes,
        life.smpt.mapped_bytes,
        len(life.irq.rows()),
    ) == before
    return int(e.value.errno or 0)


@in_loop
async def test_vop_33_block_and_ring_limits() -> None:
    """VOP-33: a block of more than 256 bytes, and more than 4 rings: EINVAL, the page is unchanged."""
    with Life() as life:
        assert await refused(life, config=bytes(209)) == EINVAL  # 8 + 24 + 16 + 209 = 257
        assert await refused(life, num_vq=5) == EINVAL
        assert await refused(life, config=bytes(4096)) == EINVAL
        await life.add(config=bytes(208))
        await life.add(num_vq=4, config=bytes(136))
        await life.host.close()


@pytest.mark.parametrize("num", [0, -1, 3, 100, 129, 256, 65535, 65536])
@in_loop
async def test_vop_34_entries(num: int) -> None:
    """VOP-34: not a power of two up to 128: EINVAL, nothing leaks, the next ADD works."""
    with Life() as life:
        assert await refused(life, num=num, num_vq=2) == EINVAL
        await life.add(num=128)
        assert life.types == [TYPE]
        await life.host.close()


@pytest.mark.parametrize(
    "what", [{"num_vq": 0}, {"kind": 0}, {"kind": -1}, {"kind": 128}, {"feature_len": 0}, {"feature_len": 5}]
)
@in_loop
async def test_vop_35_policy(what: dict[str, int]) -> None:
    """VOP-35: no rings, no type, no features: EINVAL."""
    with Life() as life:
        assert await refused(life, **what) == EINVAL


@in_loop
async def test_vop_36_one_copy_of_the_header() -> None:
    """VOP-36: ADD_DEVICE works on values, not on memory of the caller: nothing can change during the call."""
    with Life() as life:
        config = bytearray(b"before")
        dev = await life.add(config=config)  # type: ignore[arg-type]
        config[:] = b"after!"
        assert life.page.read(dev.slot.off + dev.slot.shape.config_off, 6) == b"before"
        await life.host.close()


@in_loop
async def test_vop_37_full_page() -> None:
    """VOP-37: page full: EINVAL; after one removal of equal size the next add succeeds, at that place."""
    with Life() as life:
        # Only slots matter here: the vectors of a real card would end before the page does.
        class NoVector:
            fd, vector, offset = life.bus.vector_fd(0), 0, 0

            def free(self) -> None:
                """Nothing to give back."""

        life.irq.request = lambda *a, **k: NoVector()  # type: ignore[method-assign, assignment, return-value]
        devices = []
        while True:
            if len(devices) == (4096 - 24) // 272:
                assert await refused(life, config=bytes(208)) == EINVAL
                break
            devices.append(await life.add(config=bytes(208), served=False))
        middle = devices[len(devices) // 2]
        await life.host.remove(middle)
        assert (await life.add(config=bytes(208), served=False)).slot.off == middle.slot.off
        assert await refused(life, config=bytes(208)) == EINVAL


@in_loop
async def test_vop_37_no_memory_no_vector() -> None:
    """VOP 6.3: no ring memory is ENOMEM, no interrupt vector is ENOSPC; both leave nothing."""
    with Life() as life:
        while life.memory.free_bytes > 8192:
            life.memory.alloc(4096)
        assert await refused(life, num_vq=2) == errno.ENOMEM
    with Life() as life:
        for _ in range(9):
            await life.add()
        assert await refused(life) == errno.ENOSPC
        await life.host.close()


@in_loop
async def test_vop_39_two_devices_of_one_type() -> None:
    """VOP-39: two devices of the same type have their own slots, rings and lines, and both are driven."""
    with Life() as life:
        one, two = await life.add(config=b"one"), await life.add(config=b"two")
        await life.card.start()
        assert one.driver_ok
        assert two.driver_ok
        assert one.irq.fd != two.irq.fd
        assert not set(one.slot.blocks) & set(two.slot.blocks)
        assert {p.dev.read_config(0, 3) for p in life.probed if p.dev} == {b"one", b"two"}
        await life.host.remove(one)
        assert two.driver_ok
        await life.host.close()
