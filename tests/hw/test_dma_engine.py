"""The DMA engine, driven by hand-written descriptors: HW-22 to HW-25, HW-31, 32, 35, 52."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterator

import pytest
from hwcard import (
    NOP,
    GiB,
    MiB,
    RawChannel,
    general_desc,
    memcpy_desc,
    new_card,
    rang,
    status_desc,
    wait_for,
)

from mic_emu import pciconfig
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.host.smpt import Smpt
from mic_emu.layout import CONSTANTS as C

SMPT = C["SMPT_BASE"]
RING = 32 * MiB  # where tests put rings: above all buffers
OWN_MMIO = C["CARD_MMIO_BASE"]


@pytest.fixture
def engine(bus: Bus) -> Iterator[DmaEngine]:
    Smpt(bus, logging.getLogger("t")).init()
    with DmaEngine(bus) as e:
        yield e


@pytest.fixture
def chan(bus: Bus, engine: DmaEngine) -> RawChannel:
    """Channel 4, ring of 64 in GDDR, running."""
    ch = RawChannel(bus, 4, RING, 64)
    ch.setup()
    return ch


def irq_line(c: int) -> int:
    return C["CARD_IRQ_DMA"] + c - 4


def test_hw_22_reset_value_and_bits(bus: Bus, engine: DmaEngine) -> None:
    """HW-22: after reset the host owns channels 0-3 and nothing is enabled."""
    assert bus.read("dcr") == 0x55
    assert bus.read("dcr") & 0xAA == 0


def test_hw_22_disabled_channel_does_no_work(bus: Bus, engine: DmaEngine) -> None:
    """HW-22: with the enable bit clear nothing moves; enabling starts what waits."""
    ch = RawChannel(bus, 5, RING, 8)
    ch.setup()
    ch.enable(False)
    other = RawChannel(bus, 6, RING + 4096, 8)
    other.setup()
    ch.go(general_desc(0x100, 7))
    other.go(general_desc(0x200, 8))
    other.done()  # the engine is alive
    assert (ch.count, bus.gddr.load(0x100, 4)) == (0, 0)
    ch.enable()
    ch.done()
    assert bus.gddr.load(0x100, 4) == 7


def test_hw_23_real_ring_wraps_at_131068(bus: Bus, engine: DmaEngine) -> None:
    """HW-23: head, tail and count wrap at 131068, not at 2^17."""
    size = C["DMA_RING_SIZE"]
    for c in (1, 4):
        ch = RawChannel(bus, c, RING, size)
        ch.setup()
        ch.head = size - 2
        bus.write("dhpr", size - 2, c)  # zeroed slots are NOPs: run almost around
        ch.done()
        assert bus.read("dtpr", c) == size - 2
        ch.go(general_desc(0x100, 1), general_desc(0x104, 2), general_desc(0x108, 3))
        ch.done()
        assert (ch.head, ch.count, bus.read("dtpr", c)) == (1, 1, 1)
        assert bus.gddr.read(0x100, 12) == struct.pack("<III", 1, 2, 3)


PAIRS = [
    (0, "gddr", "gddr"),
    (0, "gddr", "host"),
    (0, "host", "gddr"),
    (4, "gddr", "gddr"),
    (4, "host", "gddr"),
]
PAIRS += [(7, "gddr", "host"), (3, "host", "gddr")]


@pytest.mark.parametrize(("c", "src", "dst"), PAIRS)
@pytest.mark.parametrize("length", [64, 4096 + 64, 16383 * 64])
def test_hw_24_memcpy_moves_exactly(
    bus: Bus, engine: DmaEngine, c: int, src: str, dst: str, length: int
) -> None:
    """HW-24: exactly the named bytes move, for each pair of memories, by channels of both sides."""
    memory = {"gddr": (bus.gddr, 0), "host": (bus.host, SMPT)}
    (from_view, from_base), (to_view, to_base) = memory[src], memory[dst]
    data = os.urandom(length)
    from_view.write(1 * MiB, data)
    to_view.write(8 * MiB - 64, b"\xa5" * (length + 128))
    ch = RawChannel(bus, c, RING, 64)
    ch.setup()
    ch.go(memcpy_desc(from_base + 1 * MiB, to_base + 8 * MiB, length))
    ch.done()
    assert to_view.read(8 * MiB - 64, length + 128) == b"\xa5" * 64 + data + b"\xa5" * 64


def test_hw_24_copy_across_smpt_entries(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-24: a buffer that crosses a 16 GiB boundary follows both entries."""
    smpt = Smpt(bus, logging.getLogger("t"))
    smpt.init()
    data = os.urandom(256)
    bus.host.write(16 * GiB - 128, data)
    chan.go(memcpy_desc(SMPT + 16 * GiB - 128, 0x10000, 256))
    chan.done()
    assert bus.gddr.read(0x10000, 256) == data
    # The two halves may lie anywhere in host memory.
    bus.write("smpt", 1 << 2, 0)
    bus.write("smpt", 0 << 2, 1)
    bus.host.write(32 * GiB - 128, b"A" * 128)
    bus.host.write(0, b"B" * 128)
    chan.go(memcpy_desc(SMPT + 16 * GiB - 128, 0x10000, 256))
    chan.done()
    assert bus.gddr.read(0x10000, 256) == b"A" * 128 + b"B" * 128


def test_hw_24_host_ring_behind_a_far_entry(bus: Bus, engine: DmaEngine) -> None:
    """HW-24: the ring itself is read through the SMPT entry that DRAR names."""
    ch = RawChannel(bus, 2, 33 * GiB, 8)
    ch.setup()
    ch.go(general_desc(0x40, 0xCAFE))
    ch.done()
    assert bus.gddr.load(0x40, 4) == 0xCAFE


def test_hw_25_status_stores_and_interrupts(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-25: 64 bits are stored; only bit 59 interrupts, and then the count has moved."""
    chan.go(status_desc(0x1008, 0x1122334455667788))
    chan.done()
    assert bus.gddr.load(0x1008, 8) == 0x1122334455667788
    assert rang(bus.irq_fd(irq_line(4))) == 0
    chan.go(status_desc(SMPT + 0x2000, 99, interrupt=True))
    wait_for("interrupt of channel 4", lambda: rang(bus.irq_fd(irq_line(4))) == 1)
    assert chan.count == 2
    assert bus.host.load(0x2000, 8) == 99


def test_hw_25_host_channel_raises_its_cause(bus: Bus, engine: DmaEngine) -> None:
    """HW-25: channel c of the host sets SICR0 bit 8 + c and fires the vector that maps it."""
    bus.write("sice0", 0xFF0F)
    for c in range(4):
        bus.write("mxar", 1 << 8 + c, c)
        ch = RawChannel(bus, c, RING + c * 4096, 8)
        ch.setup()
        ch.go(status_desc(0x1000, c, interrupt=True))
        wait_for(f"vector {c}", lambda c=c: rang(bus.vector_fd(c)) == 1)  # type: ignore[misc]
        assert bus.read("sicr0") == 1 << 8 + c
        bus.write("sicr0", 0xFFFFFFFF)


def test_hw_25_data_before_status_before_interrupt(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-25: when the status word shows the round, all earlier data of the round is there."""
    for n in range(1, 300):
        bus.gddr.store(0, 8, n)
        chan.go(memcpy_desc(0, 0x4000, 4096), status_desc(0x9000, n))
        wait_for("status word", lambda n=n: bus.gddr.load(0x9000, 8) == n)  # type: ignore[misc]
        assert bus.gddr.load(0x4000, 8) == n


def test_hw_25_other_descriptor_types(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW 5.3: NOP does nothing, general stores 32 bits, memcpy can interrupt and write DSTAT back."""
    bus.gddr.store(0x1000, 8, 0xFFFFFFFFFFFFFFFF)
    chan.go(NOP, general_desc(0x1000, 0x12345678))
    chan.done()
    assert bus.gddr.load(0x1000, 8) == 0xFFFFFFFF12345678
    bus.write("dstatwb_lo", 0x2000, 4)
    chan.go(memcpy_desc(0, 0x4000, 64, extra=1 << 55 | 1 << 56))
    wait_for("interrupt", lambda: rang(bus.irq_fd(irq_line(4))) == 1)
    assert bus.gddr.load(0x2000, 4) == chan.count == 3


def test_hw_25_stores_into_own_registers(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW 1: a descriptor may address the card's own MMIO; the write has its usual effect."""
    off = 0x1CC90  # SDBIC0: the engine rings the host
    bus.write("sice0", 1)
    bus.write("mxar", 1, 0)
    chan.go(general_desc(OWN_MMIO + off, 0x80000000))
    wait_for("doorbell 0", lambda: rang(bus.vector_fd(0)) == 1)
    for k in range(16):
        bus.write("spad", 0x100 + k, k)
    chan.go(memcpy_desc(OWN_MMIO + 0x1AB00, 0x8000, 128))
    chan.done()
    assert bus.gddr.load(0x8020, 4) == 0x100
    assert bus.gddr.load(0x8000, 8) == 0  # no register there


BAD = {
    "type": (struct.pack("<QQ", 0, 9 << 60), "TYPE"),
    "key type": (struct.pack("<QQ", 0, 4 << 60), "TYPE"),
    "no length": (memcpy_desc(0, 4096, 0), "LENGTH"),
    "source alignment": (memcpy_desc(32, 4096, 64), "ALIGN"),
    "destination alignment": (memcpy_desc(0, 4096 + 8, 64), "ALIGN"),
    "status alignment": (status_desc(0x1004, 1), "ALIGN"),
    "general alignment": (general_desc(0x1002, 1), "ALIGN"),
    "source beyond GDDR": (memcpy_desc(64 * MiB - 64, 0, 128), "SOURCE"),
    "destination beyond GDDR": (memcpy_desc(0, 64 * MiB - 64, 128), "DEST"),
    "hole between GDDR and SMPT": (memcpy_desc(0x10_0000_0000, 0, 64), "SOURCE"),
    "SMPT entry without memory": (status_desc(SMPT + 3 * 16 * GiB, 1), "DEST"),
    "second half without memory": (memcpy_desc(0, SMPT + 40 * GiB - 64, 128), "DEST"),
    "host to host": (memcpy_desc(SMPT, SMPT + MiB, 64), "PAIR"),
    "beyond own MMIO": (general_desc(OWN_MMIO + 0x20000, 1), "DEST"),
}


@pytest.mark.parametrize("name", BAD)
def test_hw_31_bad_descriptor_halts_its_channel(
    bus: Bus, engine: DmaEngine, chan: RawChannel, name: str
) -> None:
    """HW-31: DCHERR says why, the count stays before it, nothing after it runs, others go on."""
    bad, cause = BAD[name]
    chan.go(general_desc(0x100, 1), bad, general_desc(0x104, 2))
    assert chan.halted() == C[f"DMA_ERR_{cause}"]
    assert bus.read("dstat", 4) & 0xFFFE0000 == C["DMA_DSTAT_ERROR"] | C["DMA_DSTAT_QUIESCED"]
    assert (chan.count, bus.read("dtpr", 4)) == (1, 1)
    assert bus.gddr.read(0x100, 8) == struct.pack("<II", 1, 0)
    assert bus.gddr.read(0, 64) == bytes(64)
    assert bus.gddr.read(64 * MiB - 64, 64) == bytes(64)
    assert bus.host.read(40 * GiB - 64, 64) == bytes(64)
    other = RawChannel(bus, 5, RING + MiB, 64)
    other.setup()
    other.go(general_desc(0x200, 3))
    other.done()
    assert bus.gddr.load(0x200, 4) == 3
    chan.go(general_desc(0x108, 4))  # still halted
    other.go(general_desc(0x204, 5))
    other.done()
    assert (chan.count, bus.gddr.load(0x108, 4)) == (1, 0)


def test_hw_31_error_source_is_raised_unless_masked(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-31: a fault sets the ERR cause (bit 30) unless DCHERRMSK names it."""
    chan.go(memcpy_desc(0, 64, 0))
    chan.halted()
    wait_for("ERR cause", lambda: bus.read("sicr0") == 1 << 30)
    bus.write("sicr0", 1 << 30)
    quiet = RawChannel(bus, 5, RING + MiB, 64)
    bus.write("dcherrmsk", 0xFFFFFFFF, 5)
    quiet.setup()
    quiet.go(memcpy_desc(0, 64, 0))
    assert quiet.halted() == C["DMA_ERR_LENGTH"]
    assert bus.read("sicr0") == 0


@pytest.mark.parametrize(("size", "head", "cause"), [(0, 1, "RING"), (64, 64, "HEAD"), (64, 0x1FFFF, "HEAD")])
def test_hw_31_bad_ring_registers(bus: Bus, engine: DmaEngine, size: int, head: int, cause: str) -> None:
    """HW-31: a head outside the ring, or a ring of nothing, halts the channel."""
    ch = RawChannel(bus, 6, RING, size)
    ch.setup()
    bus.write("dhpr", head, 6)
    assert ch.halted() == C[f"DMA_ERR_{cause}"]
    assert ch.count == 0


@pytest.mark.parametrize("ring", [64 * MiB, RING + 4])
def test_hw_31_ring_without_memory(bus: Bus, engine: DmaEngine, ring: int) -> None:
    """HW-31: a ring outside GDDR, or misaligned, halts the channel at its first fetch."""
    ch = RawChannel(bus, 6, ring, 8)
    ch.setup()
    bus.write("dhpr", 1, 6)
    assert ch.halted() == C["DMA_ERR_RING"]


def test_hw_31_memory_that_fails_is_a_channel_error(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-31: a page that cannot be had (here: the file was cut) halts the channel, not the board."""
    os.ftruncate(bus.fds[lib.MIC_FD_HOST], 1 * GiB)
    chan.go(memcpy_desc(0, SMPT + 2 * GiB, 4096))
    assert chan.halted() == C["DMA_ERR_MEMORY"]
    other = RawChannel(bus, 5, RING + MiB, 64)
    other.setup()
    other.go(memcpy_desc(0, SMPT + MiB, 4096))
    other.done()
    host_ring = RawChannel(bus, 0, 2 * GiB, 8)
    host_ring.setup()
    bus.write("dhpr", 1, 0)
    assert host_ring.halted() == C["DMA_ERR_MEMORY"]


def test_hw_31_no_bus_mastering_no_host_memory() -> None:
    """HW-31: while the command register forbids mastering, host memory is out of reach, GDDR is not."""
    with new_card(host=MiB) as bus, DmaEngine(bus):
        config = pciconfig.build(bus)
        ch = RawChannel(bus, 4, RING, 8)
        ch.setup()
        ch.go(general_desc(0x100, 1))
        ch.done()
        config.update(C["PCI_COMMAND"], 2, set_=C["PCI_COMMAND_MASTER"])
        ch.go(general_desc(SMPT + 0x100, 2))
        ch.done()
        config.update(C["PCI_COMMAND"], 2, clear=C["PCI_COMMAND_MASTER"])
        ch.go(general_desc(SMPT + 0x104, 3))
        assert ch.halted() == C["DMA_ERR_DEST"]
        assert bus.host.read(0x100, 8) == struct.pack("<II", 2, 0)


def test_hw_32_same_head_twice(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-32: rewriting the head of an enabled channel is an error; of a disabled one it is not."""
    chan.go(NOP, NOP)
    chan.done()
    chan.enable(False)
    bus.write("dhpr", 2, 4)
    assert chan.error == 0
    chan.enable()
    bus.write("dhpr", 2, 4)
    assert chan.halted() == C["DMA_ERR_HEAD"]
    assert chan.count == 2


@pytest.mark.parametrize("c", [1, 5])
def test_hw_35_masked_interrupt_waits(bus: Bus, engine: DmaEngine, c: int) -> None:
    """HW-35: masked: DSTAT advances, nothing is delivered; unmasking delivers it once."""
    bus.write("sice0", 0xFF0F)
    bus.write("mxar", 1 << 8 + c, 0)
    fd = bus.vector_fd(0) if c < 4 else bus.irq_fd(irq_line(c))
    mask = C["DMA_DCAR_IM1"] if c < 4 else C["DMA_DCAR_IM0"]
    ch = RawChannel(bus, c, RING, 64)
    bus.write("dcar", mask, c)
    ch.setup(unmask=False)
    ch.go(status_desc(0x1000, 1, interrupt=True))
    ch.done()
    assert (ch.count, rang(fd)) == (1, 0)
    bus.write("dcar", 0, c)
    assert rang(fd) == 1
    bus.write("dcar", 0, c)
    assert rang(fd) == 0


def test_hw_35_masking_acknowledges(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-35: writing the mask bit drops what is pending; the other side's mask bit does not count."""
    im0, im1 = C["DMA_DCAR_IM0"], C["DMA_DCAR_IM1"]
    bus.write("dcar", im0, 4)
    chan.go(status_desc(0x1000, 1, interrupt=True))
    chan.done()
    bus.write("dcar", im0, 4)
    bus.write("dcar", 0, 4)
    assert rang(bus.irq_fd(irq_line(4))) == 0
    bus.write("dcar", im1, 4)
    chan.go(status_desc(0x1000, 2, interrupt=True))
    wait_for("interrupt", lambda: rang(bus.irq_fd(irq_line(4))) == 1)


def test_hw_52_reset_in_flight(bus: Bus, engine: DmaEngine) -> None:
    """HW-52: reset cuts off eight busy channels quickly; afterwards nothing moves and all is new."""
    channels = [RawChannel(bus, c, RING + c * 64 * 1024, 4096) for c in range(8)]
    for ch in channels:
        ch.setup()
        for _ in range(2000):  # 2 GB each if it were allowed to end
            ch.put(memcpy_desc(0, MiB * (1 + ch.c), MiB - 64))
        ch.put(status_desc(0x1000 + 8 * ch.c, 1, interrupt=True))
    for ch in channels:
        ch.go()
    wait_for("all channels busy", lambda: all(ch.count > 0 for ch in channels))
    start = time.monotonic()
    engine.reset()
    took = time.monotonic() - start
    bus.hw_reset()
    assert took < 20, f"reset took {took:.3f} s"
    stats = engine.stats()
    for ch in channels:
        regs = ("dcar", "dhpr", "dtpr", "drar_lo", "drar_hi", "dstat", "dcherr")
        assert [bus.read(r, ch.c) for r in regs] == [0] * len(regs)
        assert bus.gddr.load(0x1000 + 8 * ch.c, 8) == 0
    assert bus.read("dcr") == 0x55
    assert bus.read("sicr0") == 0
    assert engine.stats() == stats
    again = RawChannel(bus, 4, RING, 64)
    again.setup()
    again.go(general_desc(0x100, 1))
    again.done()


def test_hw_52_reset_clears_a_halted_channel(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-31: only the card reset brings a halted channel back."""
    chan.go(memcpy_desc(0, 64, 0))
    chan.halted()
    engine.reset()
    again = RawChannel(bus, 4, RING, 64)
    again.setup()
    again.go(general_desc(0x100, 5))
    again.done()
    assert (again.error, bus.gddr.load(0x100, 4)) == (0, 5)


def test_hw_22_idle_engine_uses_no_cpu(bus: Bus, engine: DmaEngine, chan: RawChannel) -> None:
    """HW-22: with nothing to do no thread wakes up."""
    chan.go(NOP)
    chan.done()
    before = [s.wakeups for s in engine.stats()]
    other = RawChannel(bus, 5, RING + MiB, 64)
    other.setup()
    other.go(*[memcpy_desc(0, MiB, MiB - 64)] * 20)
    other.done()
    after = [s.wakeups for s in engine.stats()]
    assert [b - a for a, b in zip(before, after, strict=True) if b - a] == [after[5] - before[5]]


# --- against a model ------------------------------------------------------------------------------
