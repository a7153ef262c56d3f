"""The text of the real driver's debug files (HW 9, HW-54): same facts, same order, read-only.

Reading has no side effect here: the two files that had one are calls of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mic_emu.bar import Bus
from mic_emu.host.irq import VECTORS, Interrupts, Mode
from mic_emu.host.smpt import Smpt

RULE = "=" * 52
DMA_COLUMNS = ("DCAR", "DTPR", "DHPR", "DRAR_HI", "DRAR_LO", "DCHERR", "DCHERRMSK", "DSTAT")


def _lines(lines: Iterator[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def smpt(index: int, table: Smpt) -> str:
    """``mic_host/mic<id>/smpt``: the software table."""

    def lines() -> Iterator[str]:
        yield f"MIC {index:<2} |{'SMPT entry':<10}| {'SW DMA addr':<14} {'RefCount':<10}"
        yield RULE
        for row in table.rows():
            yield f"{'':<7}|{row.index:<10}| {row.host_addr:<#14x} {row.refs:<10}"
        yield RULE

    return _lines(lines())


def post_code(bus: Bus) -> str:
    """``mic_host/mic<id>/post_code``: two characters, no newline."""
    code = bus.read("postcode")
    return chr(code & 0xFF) + chr(code >> 8 & 0xFF)


def msi_irq_info(irqs: Interrupts, bus: Bus) -> str:
    """``mic_host/mic<id>/msi_irq_info``: the vector map in hardware and in software."""
    if irqs.mode is Mode.INTX:
        return "MSI/MSIx interrupts not enabled\n"

    def lines() -> Iterator[str]:
        for vector in range(VECTORS if irqs.mode is Mode.MSIX else 1):
            yield f"irq: {vector} entry: {vector} MXAR[{vector}]: {bus.read('mxar', vector):08x}"
            yield f"{'offset:':<8}" + "".join(f"{bit:>3}" for bit in range(31, -1, -1))
            used = irqs.software_map(vector)
            yield f"{'':<8}" + "".join(f"{used >> bit & 1:>3}" for bit in range(31, -1, -1))
            yield ""

    return _lines(lines())


def mic_dma_reg(name: str, bus: Bus, channels: Sequence[int]) -> str:
    """``mic_x100_dma/mbus-dev<n>/mic_dma_reg``: the registers of the channels that one side owns."""

    def lines() -> Iterator[str]:
        yield f"SBOX_DCR: {bus.read('dcr'):08x}"
        yield f"DMA channel registers of {name}"
        yield f"{'Channel':<8}" + "".join(f"{title:<11}" for title in DMA_COLUMNS)
        for c in channels:
            yield f"{c:<8}" + "".join(f"{bus.read(title.lower(), c):#010x} " for title in DMA_COLUMNS)

    return _lines(lines())
