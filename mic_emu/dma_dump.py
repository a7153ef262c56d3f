"""What a DMA channel is doing and has done, from registers, ring and counters (for ``micemu dma`` and ``micemu dump dma``)."""

from __future__ import annotations

from typing import Any

from mic_emu._native import ffi, lib
from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS as C
from mic_emu.layout import DMA_DESC

ERRORS = {v: k.removeprefix("DMA_ERR_").lower() for k, v in C.items() if k.startswith("DMA_ERR_")}
TYPES = {0: "nop", 1: "memcpy", 2: "status", 3: "general"}
SHOWN = 8  # waiting descriptors of a channel that are decoded


def describe(qw0: int, qw1: int) -> dict[str, Any]:
    """One descriptor in words."""
    kind, dst = TYPES.get(qw1 >> C["DMA_TYPE_SHIFT"], "unknown"), qw1 & C["DMA_ADDR_MASK"]
    if kind == "memcpy":
        units = qw0 >> C["DMA_MEMCPY_LEN_SHIFT"] & C["DMA_MEMCPY_LEN_MASK"]
        return {"type": kind, "src": qw0 & C["DMA_ADDR_MASK"], "dst": dst, "bytes": units * C["DMA_ALIGN"]}
    if kind in ("status", "general"):
        return {"type": kind, "dst": dst, "value": qw0, "interrupt": bool(qw1 & C["DMA_STATUS_INTERRUPT"])}
    return {"type": kind}


def ring_address(bus: Bus, c: int) -> int:
    """Card address of the channel's ring, as the engine computes it (HW 5.3)."""
    lo, hi = bus.read("drar_lo", c), bus.read("drar_hi", c)
    if hi & C["DMA_DRAR_SYS"]:
        entry = hi >> C["DMA_DRAR_SMPT_SHIFT"] & 0x1F
        return int(C["SMPT_BASE"]) + (entry << C["SMPT_SHIFT"]) + ((hi & 3) << 32) + lo
    return ((hi & 0xF) << 32) + lo


def _waiting(bus: Bus, c: int, ring: int, size: int, head: int, tail: int) -> list[dict[str, Any]]:
    out = []
    for slot in [(tail + i) % size for i in range(min((head - tail) % size, SHOWN))]:
        try:
            raw = bus.card_view(ring + slot * 16, 16).read(0, 16)
        except IndexError:
            break  # a ring that is not in memory: the engine says so in DCHERR
        out.append({"slot": slot, **describe(**DMA_DESC.unpack(raw))})
    return out


def counters(bus: Bus, c: int) -> dict[str, int]:
    """What the engine did on channel ``c`` since the board's power was switched on, whoever asked for it:
    descriptors retired, bytes copied, interrupts, faults, wake-ups of its thread, descriptors cut off by a reset.
    """
    out = ffi.new("struct mic_dma_stats *")
    lib.mic_dma_bus_stats(bus.ptr, c, out)
    names = ("descriptors", "bytes", "interrupts", "faults", "wakeups", "aborts")
    return {name: int(getattr(out, name)) for name in names}


def channel(bus: Bus, c: int) -> dict[str, Any]:
    """Registers of one channel, decoded; its counters; the first descriptors that wait."""
    dcr, dcar, dstat = bus.read("dcr"), bus.read("dcar", c), bus.read("dstat", c)
    head, tail, error = bus.read("dhpr", c), bus.read("dtpr", c), bus.read("dcherr", c)
    size = bus.read("drar_hi", c) >> C["DMA_DRAR_SIZE_SHIFT"] & 0x1FFFF
    host = bool(dcr >> 2 * c & 1)
    ring = ring_address(bus, c)
    sane = size and head < size and tail < size
    return {
        "channel": c,
        "owner": "host" if host else "card",
        "enabled": bool(dcr >> 2 * c & 2),
        "masked": bool(dcar & C["DMA_DCAR_IM1" if host else "DMA_DCAR_IM0"]),
        "ring": ring,
        "size": size,
        "head": head,
        "tail": tail,
        "count": dstat & C["DMA_DSTAT_COUNT"],
        "active": bool(dstat & C["DMA_DSTAT_ACTIVE"]),
        "halted": bool(dstat & C["DMA_DSTAT_QUIESCED"]),
        "error": [name for bit, name in ERRORS.items() if error & bit],
        "engine": counters(bus, c),
        "waiting": _waiting(bus, c, ring, size, head, tail) if sane else [],
    }


def channels(bus: Bus) -> list[dict[str, Any]]:
    """All eight."""
    return [channel(bus, c) for c in range(C["DMA_CHANNELS"])]
