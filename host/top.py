"""What ``micemu top`` shows: one look at every card, cheap enough for every second.

Everything is a counter or a state; the client makes rates of two looks, by ``time_s``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mic_emu import layout as L
from mic_emu.host import inspection, report
from mic_emu.host.metrics import counters
from mic_emu.scif.traffic import COUNTERS

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.daemon import Instance

C = L.CONSTANTS
STATS_LIMIT_S = 0.2  # a backend that hangs is shown without its counters


def rings(card: Card) -> dict[str, list[dict[str, int]]]:
    """Per device type and slot: indices of every ring, as the card left them."""
    found: dict[str, list[dict[str, int]]] = {}
    for r in inspection.rings(card):
        row = {
            "ring": r.index,
            "num": r.num,
            "avail_idx": r.avail_idx,
            "used_idx": r.used_idx,
            "pending": r.pending,
        }
        found.setdefault(r.device.name, []).append(row)
    return found


def devices(card: Card, stats: dict[tuple[str, str], dict[str, int]]) -> list[dict[str, Any]]:
    """Every backend with its counters and rings; then the devices of programs, whose counters only ``vdev_info`` asks for."""
    by_name = rings(card)
    programs = card.running.files.programs() if card.running else []
    return [
        {
            "type": b.name, "state": b.state, "pid": b.pid or None, "restarts": b.restarts,
            "counters": stats.get((card.name, b.name), {}), "rings": by_name.get(b.device.name, []) if b.device else [],
        }
        for b in card.backends
    ] + [
        {
            "type": dev.name, "state": "running" if dev.driver_ok else "added", "pid": pid or None, "restarts": 0,
            "counters": {}, "rings": by_name.get(dev.name, []),
        }
        for dev, pid in programs
    ]  # fmt: skip


def channels(card: Card) -> list[dict[str, Any]]:
    """The enabled DMA channels, or those with an error. ``count`` is the engine's, modulo ``size``; ``driver`` the
    host driver's counters of its own channels."""
    bus, dcr = card.bus, card.bus.read("dcr")
    own = {ch.index: ch.counters() for ch in card.driver.dma.channels} if card.driver.dma else {}
    found = []
    for c in range(C["DMA_CHANNELS"]):
        status, error = bus.read("dstat", c), bus.read("dcherr", c)
        if not (dcr >> 2 * c & 2 or error):
            continue
        driver = own.get(c)
        found.append({
            "channel": c, "owner": "host" if dcr >> 2 * c & 1 else "card",
            "active": bool(status & C["DMA_DSTAT_ACTIVE"]), "error": error,
            "size": bus.read("drar_hi", c) >> C["DMA_DRAR_SIZE_SHIFT"] & 0x1FFFF, "count": status & C["DMA_DSTAT_COUNT"],
            "driver": {"transactions": driver.completed, "bytes": driver.bytes} if driver else None,
        })  # fmt: skip
    return found


def one(card: Card, stats: dict[tuple[str, str], dict[str, int]]) -> dict[str, Any]:
    """One card."""
    cosm = card.cosm
    silent = cosm.clock.monotonic() - cosm.heard if cosm.heard and card.is_online else None
    return {
        "name": card.name, "state": cosm.state.word, "shutdown_status": cosm.shutdown_status.word,
        "post_code": report.post_code(card.bus), "boots": card.boots, "crashes": card.crashes,
        "heartbeat": {
            "enabled": cosm.heartbeat_enable, "count": cosm.heartbeats,
            "silent_s": None if silent is None else round(silent, 3),
        },
        "scif": card.node.traffic.sums().get(card.index + 1, dict.fromkeys(COUNTERS, 0)),
        "devices": devices(card, stats), "dma": channels(card), "smpt_mapped_bytes": card.driver.smpt.mapped_bytes,
    }  # fmt: skip


async def look(instance: Instance) -> dict[str, Any]:
    """Everything. ``time_s`` counts on one clock for all looks."""
    stats = await counters(instance, STATS_LIMIT_S)
    return {
        "schema": 1,
        "instance": instance.rundir.instance,
        "time_s": round(time.monotonic(), 6),
        "uptime_s": round(instance.uptime_s, 1),
        "scif": {"nodes": len(instance.node.node_ids()), "endpoints": len(instance.node.endpoints)},
        "cards": [one(card, stats) for card in instance.cards.values()],
    }
