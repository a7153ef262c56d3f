"""Debug views of the hardware layer: HW-54 and the dump of the DMA channels."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hwcard import MiB, RawChannel, memcpy_desc, new_card, status_desc

from mic_emu import dma_dump, pciconfig
from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.host import debugfs
from mic_emu.host.irq import Interrupts, Kind, Mode
from mic_emu.host.smpt import Smpt
from mic_emu.layout import CONSTANTS as C


@pytest.fixture
def card() -> Iterator[Bus]:
    with new_card(host=MiB) as bus:
        pciconfig.build(bus)
        yield bus


def test_hw_54_smpt(card: Bus) -> None:
    """HW-54: titles, a rule of 52, 32 rows with base in hex and references in bytes, a rule."""
    smpt = Smpt(card, logging.getLogger("t"))
    smpt.init()
    smpt.map(0x1000, 0x3000)
    lines = debugfs.smpt(7, smpt).splitlines()
    assert len(lines) == 35
    assert lines[0].split() == ["MIC", "7", "|SMPT", "entry|", "SW", "DMA", "addr", "RefCount"]
    assert lines[1] == lines[-1] == "=" * 52
    assert lines[2].replace("|", " ").split() == ["0", "0x0", "12288"]
    assert lines[4].replace("|", " ").split() == ["2", "0x800000000", "0"]


@pytest.mark.parametrize("code", ["01", "12", "FF"])
def test_hw_54_post_code(card: Bus, code: str) -> None:
    """HW-54: exactly two characters, low byte first, no newline."""
    card.write("postcode", ord(code[0]) | ord(code[1]) << 8)
    assert debugfs.post_code(card) == code


def test_hw_54_msi_irq_info(card: Bus) -> None:
    """HW-54: per vector MXAR in eight digits, the offsets 31..0, the software map, a blank line."""
    with Interrupts(card) as irqs:
        irqs.request(Kind.DB, 2, "db2")
        irqs.request(Kind.DMA, 1, "dma1")
        lines = debugfs.msi_irq_info(irqs, card).splitlines()
    assert len(lines) == 36
    assert lines[0].endswith("MXAR[0]: 00000004")
    assert lines[4].endswith("MXAR[1]: 00000200")
    assert lines[1].split()[1:] == [str(b) for b in range(31, -1, -1)]
    assert lines[6].split() == ["1" if b == 9 else "0" for b in range(31, -1, -1)]
    assert lines[3] == lines[7] == ""


def test_hw_54_msi_irq_info_without_msi(card: Bus) -> None:
    """HW-54: one fixed line when neither MSI-X nor MSI is in use."""
    with Interrupts(card, Mode.INTX) as irqs:
        assert debugfs.msi_irq_info(irqs, card) == "MSI/MSIx interrupts not enabled\n"


def test_hw_54_dma_registers(card: Bus) -> None:
    """HW-54: DCR, titles, and a row per owned channel in the order of the chapter."""
    card.write("drar_lo", 0xABC000, 5)
    text = debugfs.mic_dma_reg("mbus-dev0", card, range(4, 8))
    lines = text.splitlines()
    assert lines[0] == "SBOX_DCR: 00000055"
    assert lines[2].split() == ["Channel", *debugfs.DMA_COLUMNS]
    assert [line.split()[0] for line in lines[3:]] == ["4", "5", "6", "7"]
    assert lines[4].split()[5] == "0x00abc000"


def test_hw_54_channel_dump(card: Bus) -> None:
    """The dump names owner, state, error and the descriptors that wait, whatever the ring holds."""
    with DmaEngine(card):
        ch = RawChannel(card, 6, 32 * MiB, 16)
        card.write("dcr", card.read("dcr") & ~(3 << 12))
        ch.setup()
        ch.go(status_desc(0x100, 1))
        ch.done()
        ch.enable(False)
        ch.go(memcpy_desc(0, MiB, 128), status_desc(0x1008, 9, interrupt=True), memcpy_desc(0, 0, 0))
        row = dma_dump.channel(card, 6)
        assert (row["owner"], row["enabled"], row["size"], row["head"], row["tail"]) == (
            "card",
            False,
            16,
            4,
            1,
        )
        assert row["ring"] == 32 * MiB
        assert row["waiting"] == [
            {"slot": 1, "type": "memcpy", "src": 0, "dst": MiB, "bytes": 128},
            {"slot": 2, "type": "status", "dst": 0x1008, "value": 9, "interrupt": True},
            {"slot": 3, "type": "memcpy", "src": 0, "dst": 0, "bytes": 0},
        ]
        ch.enable()
        ch.halted()
        row = dma_dump.channel(card, 6)
        assert (row["halted"], row["error"], row["count"]) == (True, ["length"], 3)
    assert len(dma_dump.channels(card)) == 8


def test_hw_54_channel_dump_of_nonsense(card: Bus) -> None:
    """A dump of registers that make no sense shows them and reads nothing outside memory."""
    for name in ("drar_lo", "drar_hi", "dhpr"):
        for c in range(8):
            card.write(name, 0xFFFFFFF0 + c, c)
    for row in dma_dump.channels(card):
        assert row["waiting"] == []
    card.write("dhpr", 3, 2)
    card.write("drar_hi", 8 << 4 | C["DMA_DRAR_SYS"] | 31 << 21, 2)
    assert dma_dump.channel(card, 2)["waiting"] == []
