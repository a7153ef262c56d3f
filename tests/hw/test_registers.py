"""BARs and registers: HW-1, HW-2, HW-4, HW-42, HW-52, and the bits of the command register."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hwcard import MiB, new_card, rang
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu import layout, layout_c, pciconfig
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.layout import CONSTANTS as C


@pytest.fixture
def other(bus: Bus) -> Iterator[Bus]:
    """The same card attached a second time, as another process does."""
    with Bus([os.dup(fd) for fd in bus.fds]) as second:
        yield second


def in_child(work: object) -> bytes:
    """What ``work()`` returns in a forked process."""
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(w, work())  # type: ignore[operator]
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as f:
        out = f.read()
    assert os.waitpid(pid, 0)[1] == 0
    return out


@pytest.mark.parametrize("offset", [0, 0x1000, 64 * MiB - 1])
def test_hw_01_aperture_offset_is_card_physical(bus: Bus, offset: int) -> None:
    """HW-1: a byte at aperture N is the byte at card physical N, in both directions and processes."""
    bus.gddr.write(offset, b"H")
    assert in_child(lambda: bus.card_view(offset, 1).read(0, 1)) == b"H"
    in_child(lambda: (bus.card_view(offset, 1).write(0, b"C"), b"")[1])
    assert bus.gddr.read(offset, 1) == b"C"


def test_hw_01_nothing_beyond_the_aperture(bus: Bus) -> None:
    """HW-1: an address at or beyond the end of GDDR is an error, not other memory."""
    for addr, length in (
        (64 * MiB, 1),
        (64 * MiB - 4, 8),
        (0x10_0000_0000, 1),
        ((1 << 39) - 1, 1),
        (1 << 40, 1),
    ):
        with pytest.raises(IndexError):
            bus.card_view(addr, length)


def test_hw_02_both_sides_see_the_same_registers(bus: Bus, other: Bus) -> None:
    """HW-2: scratchpads written by one side are read by the other, all sixteen."""
    for k in range(16):
        (bus if k % 2 else other).write("spad", 0xA000_0000 + k, k)
    for k in range(16):
        assert bus.read("spad", k) == other.read("spad", k) == 0xA000_0000 + k


def test_hw_02_register_words_do_not_overlap() -> None:
    """HW-2: the offsets of the chapter, spot by spot, and no two registers in one word."""
    layout_c.check()
    for name, index, off in (
        ("postcode", 0, 0x242C), ("smpt", 31, 0x1317C), ("rgcr", 0, 0x14010), ("sicr0", 0, 0x19004),
        ("sice0", 0, 0x1900C), ("sicc0", 0, 0x19010), ("siac0", 0, 0x19014), ("mxar", 8, 0x19064),
        ("msixpbacr", 0, 0x19084), ("dcar", 7, 0x1A1C0), ("dstat", 2, 0x1A0A0), ("dcherr", 0, 0x1A02C),
        ("dcr", 0, 0x1A280), ("apicicr", 7, 0x1AA08), ("apicicr_hi", 7, 0x1AA0C), ("spad", 2, 0x1AB28),
        ("spad", 14, 0x1AB58), ("rdmasr", 7, 0x1B19C), ("sdbic", 3, 0x1CC9C),
    ):  # fmt: skip
        assert layout.reg(name, index) == off


def snapshot(bus: Bus) -> bytes:
    return bus.mmio.read(0, bus.mmio.size)


def test_hw_04_unknown_registers(bus: Bus) -> None:
    """HW-4: every offset without a register reads 0, and writes to it are counted and change nothing."""
    known = {off for off, _, _ in layout.register_words()}
    before, ignored = snapshot(bus), lib.mic_mmio_ignored(bus.ptr)
    unknown = [off for off in range(0, layout.MMIO_SIZE, 4) if off not in known]
    for off in unknown:
        lib.mic_mmio_write(bus.ptr, off, 0xFFFFFFFF)
        assert lib.mic_mmio_read(bus.ptr, off) == 0
    assert snapshot(bus) == before
    assert lib.mic_mmio_ignored(bus.ptr) == ignored + len(unknown)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_hw_04_any_offset_at_all(shared: Bus, off: int, value: int) -> None:
    """HW-4: outside the table (misaligned, beyond the BAR) nothing is read or written."""
    if any(off == o for o, _, _ in layout.register_words()):
        return
    before = snapshot(shared)
    lib.mic_mmio_write(shared.ptr, off, value)
    assert lib.mic_mmio_read(shared.ptr, off) == 0
    assert snapshot(shared) == before


@pytest.fixture(scope="module")
def shared() -> Iterator[Bus]:
    with new_card(gddr=MiB, host=4096) as b:
        yield b


def test_hw_04_read_only_registers(bus: Bus) -> None:
    """HW-4: what only the engine writes ignores software."""
    for name in ("dtpr", "dstat", "dcherr", "msix_pba"):
        bus.write(name, 0xFFFFFFFF)
        assert bus.read(name) == 0


def test_hw_04_reset_values(bus: Bus) -> None:
    """HW 2: after power-on only POSTCODE and DCR are not 0."""
    values = {name: bus.read(row.name, 0) for _, name, row in layout.register_words() if row.count == 1}
    assert {n: v for n, v in values.items() if v} == {"postcode": 0x3130, "dcr": 0x55}


def test_hw_42_boot_interrupt_is_the_low_write(bus: Bus) -> None:
    """HW-42: the high dword alone does nothing; 0x20E5 in the low one is the boot interrupt."""
    boot = bus.fds[lib.MIC_FD_BOOT]
    bus.write("apicicr_hi", 4, 7)
    assert rang(boot) == 0
    bus.write("apicicr", 0x00E5, 7)  # without the send bit
    assert rang(boot) == 0
    bus.write("apicicr", 0x20E5, 7)
    assert rang(boot) == 1
    bus.write("apicicr", 0x2000 | 200, 7)  # the card's kernel has its own vector: an ordinary doorbell
    assert rang(boot) == 0
    assert rang(bus.irq_fd(7)) >= 1


def test_hw_42_line_7_of_a_running_card_is_a_doorbell_like_others(bus: Bus) -> None:
    """HW-42, 4.1: APICICR7 keeps the bootstrap's vector until the card's kernel gives the line to a device."""
    bus.write("apicicr", 0x20E5, 7)
    boot = bus.fds[lib.MIC_FD_BOOT]
    rang(boot)
    lines = CardInterrupts(bus)
    line = [lines.request(f"device {n}") for n in range(8)][7]
    bus.ring_card(line.doorbell)
    assert rang(line.fd) == 1
    assert rang(boot) == 0


def test_hw_36_reset_register_wakes_the_board(bus: Bus) -> None:
    """HW-36: only bit 0 of RGCR resets."""
    reset = bus.fds[lib.MIC_FD_RESET]
    bus.write("rgcr", 0xFFFFFFFE)
    assert rang(reset) == 0
    bus.write("rgcr", 1)
    assert rang(reset) == 1


def test_hw_52_doorbells_die_with_the_reset(bus: Bus) -> None:
    """HW-52: whatever was rung before the reset is not delivered after it."""
    bus.write("sice0", C["IRQ_ENABLE_MASK"])
    bus.write("mxar", 0xF, 0)
    for d in range(4):
        bus.ring_host(d)
    for d in range(16):
        bus.ring_card(d)
    bus.hw_reset()
    assert [rang(fd) for fd in bus.fds[lib.MIC_FD_VEC : lib.MIC_FD_CHAN]] == [0] * 36
    bus.write("sice0", C["IRQ_ENABLE_MASK"])
    bus.write("mxar", 0xF, 0)
    assert rang(bus.vector_fd(0)) == 0


def test_hw_01_memory_decoding_and_power_state(bus: Bus, other: Bus) -> None:
    """HW-1: with memory decoding off, or in D3hot, the host reads all ones; the card is not affected."""
    config = pciconfig.build(bus)
    other.set_over_pci()
    other.write("spad", 5, 1)
    for off, size, bit in ((C["PCI_COMMAND"], 2, C["PCI_COMMAND_MEMORY"]), (C["PCI_CAP_PM"] + 4, 2, 3)):
        is_power = bit == 3
        config.update(off, size, **({"set_": bit} if is_power else {"clear": bit}))
        other.write("spad", 6, 1)
        assert other.read("spad", 1) == 0xFFFFFFFF
        assert bus.read("spad", 1) == 5
        config.update(off, size, **({"clear": bit} if is_power else {"set_": bit}))
        assert other.read("spad", 1) == 5


def test_hw_12_no_interrupt_in_d3(bus: Bus) -> None:
    """HW-12: a sleeping function sends nothing; the message comes when it wakes up."""
    from mic_emu.host.irq import Interrupts, Kind

    config = pciconfig.build(bus)
    with Interrupts(bus) as irqs:
        irqs.enable()
        irq = irqs.request(Kind.DB, 0, "db0")
        config.update(C["PCI_CAP_PM"] + 4, 2, set_=3)
        bus.ring_host(0)
        assert rang(irq.fd) == 0
        config.update(C["PCI_CAP_PM"] + 4, 2, clear=3)
        assert rang(irq.fd) == 1
