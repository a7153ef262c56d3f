"""``mic_emu.testing.hardware``: the card's hardware for a script of somebody's own."""

from __future__ import annotations

import errno
import select

import pytest

from mic_emu.dma import INTERRUPT, DmaError, Status
from mic_emu.host.irq import Mode
from mic_emu.pciconfig import PciIdentity
from mic_emu.testing.hardware import hardware

KiB = 1 << 10


@pytest.mark.parametrize("index", [0, 4])
def test_hw_25_completion_interrupt_of_both_owners(index: int) -> None:
    """HW-22, HW-25: one interrupt on the owner's line, then the callback runs, once."""
    done = []
    with hardware() as hw, hw.channel(index, interrupt=True) as ch:
        hw.bus.gddr.write(0, b"moved" * 13)
        ch.prep_memcpy(hw.host_address(KiB), 0, 64, INTERRUPT).submit(lambda: done.append(1))  # type: ignore[union-attr]
        ch.issue_pending()
        assert select.select([ch.irq_fd], [], [], 5)[0]
        ch.on_interrupt()
        assert done == [1]
        assert hw.bus.host.read(KiB, 5) == b"moved"
        assert hw.engine.stats()[index].interrupts == 1


def test_hw_52_reset_in_flight_mends_a_halted_channel() -> None:
    """HW-31, HW-33, HW-52: EIO names the cause, the channel stays EBUSY until the reset, then it works again."""
    with hardware() as hw:
        sick, end = hw.channel(1), hw.bus.gddr.size
        with pytest.raises(DmaError, match="DCHERR 0x20 source") as failed:
            sick.sync_wait(sick.prep_memcpy(hw.host_address(0), end, 64).submit(), 5)  # type: ignore[union-attr]
        assert failed.value.errno == errno.EIO
        sick.free(0)
        with pytest.raises(DmaError) as busy:
            hw.channel(1)
        assert busy.value.errno == errno.EBUSY
        hw.reset()
        hw.smpt.restore()
        with hw.channel(1) as ch:
            cookie = ch.prep_memcpy(hw.host_address(0), 0, 64).submit()  # type: ignore[union-attr]
            ch.sync_wait(cookie, 5)
            assert ch.tx_status(cookie) is Status.COMPLETE


def test_hw_15_identity_decides_the_mode() -> None:
    """HW-3, HW-15: what the function offers is what the driver takes."""
    with hardware(PciIdentity(revision=0x11, msix_vectors=0)) as hw:
        assert (hw.irq.mode, hw.config.stepping) == (Mode.MSI, "B1")


def test_hw_34_a_forgotten_transaction_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever prepares and does not submit is told so when the channel is given back, at once."""
    with hardware() as hw, hw.channel(0) as ch:
        assert ch.prep_memcpy(hw.host_address(0), 0, 64)
    assert "neither submitted nor discarded" in caplog.text
