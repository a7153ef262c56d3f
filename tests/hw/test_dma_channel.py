"""A DMA channel's life: set-up, errors, terminate, pause, change and loss of its owner (HW-10, 22, 28, 33, 34)."""

from __future__ import annotations

import errno
import time

import pytest
from dmalab import Lab, local
from hwcard import GiB, MiB, RawChannel, memcpy_desc, wait_for

from mic_emu._native import lib
from mic_emu.dma import DmaChannel, DmaError, DmaMemory, Status
from mic_emu.faults import FaultTable, parse
from mic_emu.layout import CONSTANTS as C
from mic_emu.memory import PageAllocator


@pytest.mark.parametrize("c", [3, 7])
def test_hw_33_broken_channel_is_busy(lab: Lab, c: int) -> None:
    """HW-33: DCHERR or the quiesced bit make allocation fail EBUSY, channel disabled and masked."""
    raw = RawChannel(lab.bus, c, 0, 8, host=False)
    raw.setup()
    raw.go(memcpy_desc(0, 0, 0))
    raw.halted()
    with pytest.raises(DmaError) as e:
        lab.channel(c)
    assert e.value.errno == errno.EBUSY
    assert not lab.bus.read("dcr") & 2 << 2 * c
    assert lab.bus.read("dcar", c) & C["DMA_DCAR_IM1" if c < 4 else "DMA_DCAR_IM0"]
    lab.engine.reset()
    lab.channel(c).free()


@pytest.mark.parametrize(
    ("register", "value"), [("dcherr", C["DMA_ERR_RING"]), ("dstat", C["DMA_DSTAT_QUIESCED"])]
)
@pytest.mark.parametrize("c", [0, 4])
def test_hw_33_either_sign_of_a_broken_channel(lab: Lab, register: str, value: int, c: int) -> None:
    """HW-33: DCHERR alone, and bit 29 of DSTAT alone, are EBUSY; without them the channel works."""
    lab.bus.hw_store(register, value, c)
    with pytest.raises(DmaError) as e:
        lab.channel(c)
    assert e.value.errno == errno.EBUSY
    assert not lab.bus.read("dcr") & 2 << 2 * c
    assert lab.bus.read("dcar", c) & C["DMA_DCAR_IM1" if c < 4 else "DMA_DCAR_IM0"]
    lab.bus.hw_store(register, 0, c)
    lab.channel(c).free()


def test_hw_33_no_memory(lab: Lab) -> None:
    """HW-33: a ring that cannot be had is ENOMEM, one that cannot be mapped too; nothing is kept."""
    tiny = DmaMemory(PageAllocator(lab.bus.fds[0], 0, 4096))
    with pytest.raises(OSError, match="room") as e:
        DmaChannel(lab.bus, 4, tiny)
    assert e.value.errno == errno.ENOMEM
    unmappable = DmaMemory(lab.host.pages, lambda off, size: 0)
    with pytest.raises(DmaError) as e2:
        DmaChannel(lab.bus, 0, unmappable)
    assert e2.value.errno == errno.ENOMEM


def test_hw_34_freeing_a_stalled_channel(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """HW-34: free waits its time, logs, and gives everything back although nothing completes."""
    ch = lab.channel(5)
    bad = ch.prep_memcpy(0, 127 * MiB, 2 * MiB)  # runs out of GDDR
    assert bad
    called: list[int] = []
    bad.submit(lambda: called.append(1))
    start = time.monotonic()
    assert ch.free(timeout_s=0.2) is False
    assert 0.19 < time.monotonic() - start < 4.5
    assert "not drained: Connection timed out within 0.2 s" in caplog.text
    assert called == []
    assert ch.free() is True  # nothing left to do


def test_hw_34_sync_wait_tells_a_halted_channel_at_once(lab: Lab) -> None:
    """HW-31: our wait reports the halt with its DCHERR instead of sitting out five seconds."""
    ch = lab.channel(4)
    tx = ch.prep_memcpy(0, 127 * MiB, 2 * MiB)
    assert tx
    start = time.monotonic()
    with pytest.raises(DmaError, match="DCHERR 0x20") as e:
        ch.sync_wait(tx.submit())
    assert e.value.errno == errno.EIO
    assert time.monotonic() - start < 4.5
    assert ch.halted
    ch.free(timeout_s=0)


def test_hw_34_sync_wait_times_out(lab: Lab) -> None:
    """HW-34: a channel that does not run ends the wait with ETIMEDOUT."""
    with lab.channel(4) as ch:
        raw = lab.bus.read("dcr")
        lab.bus.write("dcr", raw & ~(2 << 8))
        tx = ch.prep_memcpy(0, 64, 64)
        assert tx
        cookie = tx.submit()
        with pytest.raises(DmaError) as e:
            ch.sync_wait(cookie, timeout_s=0.1)
        assert e.value.errno == errno.ETIMEDOUT
        lab.bus.write("dcr", raw)
        ch.sync_wait(cookie)


def test_hw_28_terminate_all(lab: Lab, chan: DmaChannel) -> None:
    """dmaengine: terminate_all drops what is not complete, without callbacks; the channel goes on."""
    seen: list[str] = []
    bit = 2 << 2 * chan.index
    tx = chan.prep_imm_data(local(chan), 1)
    assert tx
    first = tx.submit(lambda: seen.append("first"))
    chan.sync_wait(first)
    raw = lab.bus.read("dcr")
    lab.bus.write("dcr", raw & ~bit)
    cookies = []
    for _ in range(10):
        tx = chan.prep_imm_data(local(chan) + 64, 0xBAD)
        assert tx
        cookies.append(tx.submit(lambda: seen.append("dropped")))
    chan.issue_pending()
    chan.terminate_all()
    assert [chan.tx_status(c) for c in (first, *cookies)] == [Status.COMPLETE] + [Status.TERMINATED] * 10
    with pytest.raises(DmaError) as e:
        chan.sync_wait(cookies[0])
    assert e.value.errno == errno.ECANCELED
    tx = chan.prep_imm_data(local(chan) + 128, 7)
    assert tx
    chan.sync_wait(tx.submit(lambda: seen.append("after")))
    assert seen == ["first", "after"]
    assert lab.bus.card_view(local(chan), 256).load(64, 8) == 0
    assert lab.bus.card_view(local(chan), 256).load(128, 8) == 7


def test_hw_28_terminate_under_load(lab: Lab, chan: DmaChannel) -> None:
    """dmaengine: after terminate_all returns, no byte of a dropped copy moves."""
    lab.bus.gddr.write(0, b"\x01" * MiB)
    dst = local(chan) + 4 * MiB
    view = lab.bus.card_view(dst, MiB)
    for _ in range(10):
        for _ in range(50):
            tx = chan.prep_memcpy(dst, 0, MiB)
            assert tx
            tx.submit()
        chan.issue_pending()
        chan.terminate_all()
        view.zero(0, MiB)
        assert view.read(0, MiB) == bytes(MiB)
    tx = chan.prep_memcpy(dst, 0, MiB)
    assert tx
    chan.sync_wait(tx.submit())
    assert view.read(0, MiB) == b"\x01" * MiB


def test_hw_28_second_owner_continues_where_the_first_stood(lab: Lab) -> None:
    """HW 5.4: count and tail survive a change of owner; the next one works without a head rewrite."""
    for n in range(4):
        with lab.channel(6) as ch:
            tx = ch.prep_imm_data(8 * n, n + 1)
            assert tx
            ch.sync_wait(tx.submit())
        assert lab.bus.read("dcherr", 6) == 0
    assert [lab.bus.gddr.load(8 * n, 8) for n in range(4)] == [1, 2, 3, 4]


def test_hw_28_hostile_status_is_not_believed(lab: Lab) -> None:
    """HW-28: a count that was never issued retires nothing."""
    with lab.channel(4) as ch:
        tx = ch.prep_imm_data(0, 1)
        assert tx
        cookie = tx.submit()
        for lie in (5, 131068, 0x1FFFF):
            lab.bus.hw_store("dstat", lie, 4)
            assert ch.tx_status(cookie) is Status.IN_PROGRESS
        assert ch.counters().bad_status >= 3
        lab.bus.hw_store("dstat", 0, 4)
        ch.sync_wait(cookie)


def test_hw_22_pause_and_resume(lab: Lab, chan: DmaChannel) -> None:
    """HW-22: a paused channel stands still between descriptors and loses nothing."""
    chan.pause()
    cookies = []
    for n in range(8):
        tx = chan.prep_imm_data(local(chan) + 8 * n, n + 1)
        assert tx
        cookies.append(tx.submit())
    with pytest.raises(DmaError) as e:
        chan.sync_wait(cookies[-1], timeout_s=0.05)
    assert e.value.errno == errno.ETIMEDOUT
    assert lab.bus.card_view(local(chan), 64).read(0, 64) == bytes(64)
    chan.resume()
    chan.sync_wait(cookies[-1])
    assert lab.bus.card_view(local(chan) + 56, 8).load(0, 8) == 8


def test_hw_10_channel_set_up_before_the_smpt_is_restored(lab: Lab) -> None:
    """HW-10: after a reset the channels are set up (step 5) before the SMPT is (step 10)."""
    far = DmaMemory(PageAllocator(lab.bus.fds[2], 16 * GiB, 16 * GiB + 8 * MiB), lab.host.map, lab.host.unmap)
    registers = [lab.bus.read("smpt", i) for i in range(32)]
    lab.engine.reset()
    lab.bus.hw_reset()
    with DmaChannel(lab.bus, 0, far) as ch:
        for i, value in enumerate(registers):
            lab.bus.write("smpt", value, i)
        tx = ch.prep_imm_data(0x40, 0x1234)
        assert tx
        ch.sync_wait(tx.submit())
    assert lab.bus.gddr.load(0x40, 8) == 0x1234


def test_hw_34_channels_of_a_lost_owner_stand_still(lab: Lab) -> None:
    """HW-34: after quiesce nothing moves, though descriptors wait; ETIMEDOUT while one is in progress."""
    with lab.channel(4) as ch, lab.channel(5) as other:
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 1000) == 0
        lab.bus.gddr.write(0, b"x" * 64)
        tx = ch.prep_memcpy(MiB, 0, 64)
        assert tx
        tx.submit()
        ch.issue_pending()
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 0) == 0
        assert lab.bus.gddr.read(MiB, 64) == bytes(64)
        ch.resume()
        wait_for("copied", lambda: lab.bus.gddr.read(MiB, 64) == b"x" * 64)
        FaultTable(lab.bus.faults).install(parse({"kind": "dma-delay", "delay": "300ms", "count": 1}))
        other.resume()
        tx = other.prep_interrupt()
        assert tx
        tx.submit()
        other.issue_pending()
        wait_for("at work", lambda: bool(lab.bus.read("dstat", 5) & C["DMA_DSTAT_ACTIVE"]))
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 10) == -errno.ETIMEDOUT
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 5000) == 0
        ch.resume()
        other.resume()
