"""The virtual DMA devices of both sides: HW 5.1, HW-22, HW-33, HW-44, HW-47, HW-49."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Iterator

import pytest
from hwcard import MiB, RawChannel, memcpy_desc, new_card

from mic_emu import mbus
from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.card.os import dma as card_dma
from mic_emu.dma import INTERRUPT, DmaError
from mic_emu.host import dma as host_dma
from mic_emu.host.irq import Interrupts, Kind
from mic_emu.host.smpt import Smpt
from mic_emu.mbus import DmaDevice, MbusId
from mic_emu.memory import PageAllocator

LOG = logging.getLogger("test.mbus")


class Rig:
    """Both drivers' surroundings on one card."""

    def __init__(self, bus: Bus, engine: DmaEngine) -> None:
        self.bus, self.engine = bus, engine
        self.smpt = Smpt(bus, LOG)
        self.smpt.init()
        self.irqs = Interrupts(bus)
        self.irqs.enable()
        self.host_pages = PageAllocator(bus.fds[2], 0, 64 * MiB)
        self.card_pages = PageAllocator(bus.fds[0], 64 * MiB, 128 * MiB)

    def host(self) -> DmaDevice:
        return host_dma.acquire(0, self.bus, self.irqs, self.smpt, self.host_pages, LOG)

    def card(self) -> DmaDevice:
        return card_dma.acquire(self.bus, self.card_pages, LOG)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with new_card(gddr=128 * MiB, host=64 * MiB) as bus, DmaEngine(bus) as engine:
        yield Rig(bus, engine)


def halt(bus: Bus, c: int) -> None:
    raw = RawChannel(bus, c, 0, 8, host=False)
    raw.setup()
    raw.go(memcpy_desc(0, 0, 0))
    raw.halted()


def test_hw_22_each_side_takes_its_four_channels(rig: Rig) -> None:
    """HW-22: the host owns 0-3, the card 4-7; after release nothing is enabled, mapped or kept."""
    host, card = rig.host(), rig.card()
    assert [c.index for c in host.channels] == [0, 1, 2, 3]
    assert [c.index for c in card.channels] == [4, 5, 6, 7]
    assert rig.bus.read("dcr") == 0x55 | 0xAAAA
    host.release()
    card.release()
    assert rig.bus.read("dcr") == 0x55
    assert rig.host_pages.used_bytes == rig.card_pages.used_bytes == 0
    assert not any(r.refs for r in rig.smpt.rows())


def test_hw_47_four_vectors_are_used(rig: Rig) -> None:
    """HW-47: the host's channels take four of the nine vectors and give them back."""
    host = rig.host()
    taken = [rig.irqs.request(Kind.DB, n % 4, f"db{n}") for n in range(5)]
    with pytest.raises(OSError, match="tenth") as e:
        rig.irqs.request(Kind.DB, 0, "tenth")
    assert e.value.errno == errno.ENOSPC
    host.release()
    for irq in taken:
        irq.free()


def test_hw_47_without_vectors_nothing_is_taken(rig: Rig) -> None:
    """HW 5.4: an interrupt that cannot be had undoes the whole device."""
    for n in range(7):
        rig.irqs.request(Kind.DB, n % 4, f"db{n}")
    with pytest.raises(OSError, match="vectors") as e:
        rig.host()
    assert e.value.errno == errno.ENOSPC
    assert rig.bus.read("dcr") == 0x55
    assert rig.host_pages.used_bytes == 0


def test_hw_33_a_broken_channel_is_left_out(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """HW-33: the other channels of the side work without it."""
    halt(rig.bus, 5)
    card = rig.card()
    assert [c.index for c in card.channels] == [4, 6, 7]
    assert "channel 5 is left out" in caplog.text
    card.release()


def test_hw_44_no_channel_at_all(rig: Rig) -> None:
    """HW-44: with every channel broken the driver's start fails with ENODEV and keeps nothing."""
    for c in range(8):
        halt(rig.bus, c)
    for make in (rig.host, rig.card):
        with pytest.raises(DmaError) as e:
            make()
        assert e.value.errno == errno.ENODEV
    assert rig.host_pages.used_bytes == rig.card_pages.used_bytes == 0
    assert rig.irqs.request(Kind.DB, 0, "all vectors are free").vector == 0


def test_hw_29_small_ring_when_memory_is_short(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """HW 5.3: without room for 2 MiB rings the channels get small ones, and work."""
    rig.card_pages = PageAllocator(rig.bus.fds[0], 64 * MiB, 65 * MiB)
    card = rig.card()
    assert len(card.channels) == 4
    assert "ring of 4096" in caplog.text
    for ch in card.channels:
        tx = ch.prep_imm_data(8 * ch.index, 0x77)
        assert tx
        ch.sync_wait(tx.submit())
    card.release()


def test_hw_26_interrupts_in_an_event_loop(rig: Rig) -> None:
    """HW-26: attached to a loop, each channel's callback runs from its own interrupt."""

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        devices = [rig.host(), rig.card()]
        done: list[int] = []
        finished = asyncio.Event()

        def note(index: int) -> None:
            done.append(index)
            if len(done) == 8:
                finished.set()

        for dev in devices:
            dev.attach(loop)
            for ch in dev.channels:
                tx = ch.prep_memcpy(64 * ch.index, 8 * MiB, 64, INTERRUPT)
                assert tx
                tx.submit(lambda i=ch.index: note(i))  # type: ignore[misc]
                ch.issue_pending()
        await asyncio.wait_for(finished.wait(), 10)
        for dev in devices:
            dev.release()
        return done

    assert sorted(asyncio.run(main())) == list(range(8))


def test_hw_49_release_and_acquire_again(rig: Rig) -> None:
    """HW-49: start and stop may follow each other often and fast."""
    start = time.monotonic()
    for _ in range(10):
        host, card = rig.host(), rig.card()
        host.release()
        card.release()
    assert time.monotonic() - start < 60


def test_hw_05_mbus_identity() -> None:
    """HW 5.1: names, matching and attributes of the virtual devices."""
    assert mbus.host_id(3).attributes() == {
        "device": "0x0002",
        "vendor": "0xffffffff",
        "modalias": "mbus:d00000002vFFFFFFFF",
    }
    assert mbus.host_id(3).name == "mbus-dev3"
    assert MbusId("mbus-dev0", 3) == mbus.CARD_ID
    assert mbus.CARD_ID.matches(3)
    assert mbus.CARD_ID.matches(mbus.ANY_ID)
    assert not mbus.CARD_ID.matches(2)
