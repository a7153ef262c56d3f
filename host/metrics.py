"""Prometheus text of an instance (format 0.0.4): states, boots, crashes, doorbells, devices, rings, DMA, SCIF."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mic_emu import layout as L
from mic_emu.clock import wait_for
from mic_emu.cosm.states import State, Status
from mic_emu.host import inspection, report
from mic_emu.host.card_os import ask_os
from mic_emu.scif.state import State as EndpointState
from mic_emu.scif.traffic import checked
from mic_emu.version import VERSION

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.daemon import Instance

C = L.CONSTANTS
Sample = tuple[str, dict[str, str], float]
HELP = {
    "micemu_info": ("gauge", "Version and instance, always 1."),
    "micemu_uptime_seconds": ("gauge", "Seconds since the host process started."),
    "micemu_card_state": ("gauge", "1 for the state the card is in."),
    "micemu_card_shutdown_status": ("gauge", "1 for the card's shutdown status."),
    "micemu_card_state_changes_total": ("counter", "State changes of the card."),
    "micemu_card_boots_total": ("counter", "Boots begun."),
    "micemu_card_crashes_total": ("counter", "Ends of the card OS or the board that nobody asked for."),
    "micemu_card_heartbeats_total": ("counter", "Heartbeats heard."),
    "micemu_card_memory_bytes": ("gauge", "Size of the card's memory."),
    "micemu_device_running": ("gauge", "1 when the card drives the device."),
    "micemu_device_restarts_total": ("counter", "Starts of a backend after it died."),
    "micemu_device_stats_total": ("counter", "What the backend counted: requests, bytes, packets, errors."),
    "micemu_fault_events_total": ("counter", "Events that a fault filter has looked at."),
    "micemu_fault_hits_total": ("counter", "Events that a fault filter has acted on."),
    "micemu_vring_pending": ("gauge", "Chains the card has made available and the backend not yet used."),
    "micemu_smpt_mapped_bytes": ("gauge", "Host memory that the card's page table shows for transfers."),
    "micemu_doorbells_total": ("counter", "Rings of a doorbell, towards the host or the card."),
    "micemu_dma_bytes_total": (
        "counter",
        "Bytes that the host driver submitted to a DMA channel since the boot.",
    ),
    "micemu_dma_transactions_total": (
        "counter",
        "Transactions of a DMA channel of the host, by what became of them.",
    ),
    "micemu_dma_ring_depth": ("gauge", "Descriptors that wait in a channel's ring."),
    "micemu_scif_connections": ("gauge", "Connections between the host and the card."),
    "micemu_dma_engine_bytes_total": (
        "counter",
        "Bytes that a DMA channel has copied; 0-3 are the host's, 4-7 the card's.",
    ),
    "micemu_dma_engine_descriptors_total": ("counter", "Descriptors that a DMA channel has carried out."),
    "micemu_dma_engine_faults_total": ("counter", "Times that a DMA channel halted."),
    "micemu_scif_bytes_total": (
        "counter",
        "Bytes of SCIF messages that a node's programs and services have sent to a peer, and received from it.",
    ),
    "micemu_scif_dma_bytes_total": (
        "counter",
        "Bytes that a node's DMA channels have copied for its programs, to windows of a peer or from them.",
    ),
    "micemu_scif_nodes": ("gauge", "Online SCIF nodes, the host included."),
    "micemu_scif_endpoints": ("gauge", "Endpoints of node 0 by state."),
}


def _card(card: Card) -> Iterator[Sample]:
    label = {"card": card.name}
    for state in State:
        yield "micemu_card_state", {**label, "state": state.word}, card.cosm.state is state
    for status in Status:
        row = {**label, "status": status.word}
        yield "micemu_card_shutdown_status", row, card.cosm.shutdown_status is status
    yield "micemu_card_state_changes_total", label, card.cosm.changes
    yield "micemu_card_boots_total", label, card.boots
    yield "micemu_card_crashes_total", label, card.crashes
    yield "micemu_card_heartbeats_total", label, card.cosm.heartbeats
    yield "micemu_card_memory_bytes", label, card.config.memory
    yield "micemu_smpt_mapped_bytes", label, card.driver.smpt.mapped_bytes
    for row in report.devices(card):
        device = {**label, "device": row["type"]}
        yield "micemu_device_running", device, row["state"] == "running"
        yield "micemu_device_restarts_total", device, int(row["restarts"])
    for fault in card.faults.rows():
        which = {**label, "fault": str(fault["id"]), "kind": str(fault["kind"])}
        yield "micemu_fault_events_total", which, fault["seen"]
        yield "micemu_fault_hits_total", which, fault["hits"]
    for ring in inspection.rings(card):
        where = {**label, "device": ring.device.name, "ring": str(ring.index)}
        yield "micemu_vring_pending", where, ring.pending
    counts = card.bus.counts()
    for to, rings in (("host", counts.doorbells), ("card", counts.lines[: C["CARD_IRQ_DMA"]])):
        for number, count in enumerate(rings):
            yield "micemu_doorbells_total", {**label, "to": to, "doorbell": str(number)}, count
    yield from _dma(card, label)
    ends = card.node.endpoints.values()
    connected = [
        e for e in ends if e.state is EndpointState.CONNECTED and e.peer and e.peer[0] == card.index + 1
    ]
    yield "micemu_scif_connections", label, len(connected)


def _dma(card: Card, label: dict[str, str]) -> Iterator[Sample]:
    for row in inspection.dma(card):
        channel = {**label, "channel": str(row["channel"]), "owner": row["owner"]}
        if row["size"]:
            yield "micemu_dma_ring_depth", channel, (row["head"] - row["tail"]) % row["size"]
        for what in ("bytes", "descriptors", "faults"):
            yield f"micemu_dma_engine_{what}_total", channel, row["engine"][what]
        if row["driver"]:
            yield "micemu_dma_bytes_total", channel, row["driver"]["bytes"]
            for what in ("transactions", "completed"):
                name = "submitted" if what == "transactions" else what
                yield "micemu_dma_transactions_total", {**channel, "what": name}, row["driver"][what]


def samples(instance: Instance) -> Iterator[Sample]:
    """Everything, card by card."""
    yield "micemu_info", {"version": VERSION, "instance": instance.rundir.instance}, 1
    yield "micemu_uptime_seconds", {}, round(instance.uptime_s, 3)
    yield "micemu_scif_nodes", {}, len(instance.node.node_ids())
    states = [ep.state for ep in instance.node.endpoints.values()]
    for state in EndpointState:
        yield "micemu_scif_endpoints", {"state": state.name.lower()}, states.count(state)
    for card in instance.cards.values():
        yield from _card(card)


async def counters(instance: Instance, limit_s: float = 1.0) -> dict[tuple[str, str], dict[str, int]]:
    """What the backends counted, by card and device; one that does not answer in time is left out."""
    asked = [(c, b) for c in instance.cards.values() for b in c.backends if b.channel]
    replies = await asyncio.gather(
        *(b.call("stats", limit_s=limit_s) for _, b in asked), return_exceptions=True
    )
    found: dict[tuple[str, str], dict[str, int]] = {}
    for (card, backend), reply in zip(asked, replies, strict=True):
        if isinstance(reply, dict):
            stats = reply.get("stats", {}).items()
            found[card.name, backend.name] = {k: v for k, v in stats if isinstance(v, int)}
    return found


async def traffic(instance: Instance, limit_s: float = 1.0) -> dict[int, dict[int, dict[str, int]]]:
    """SCIF bytes by node and peer; a card that does not answer in time is left out."""
    cards = [c for c in instance.cards.values() if c.is_online]
    asked = (wait_for(_ask_card(c), limit_s) for c in cards)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    found = {instance.node.id: instance.node.traffic.sums()}
    for card, answer in zip(cards, answers, strict=True):
        if isinstance(answer, dict):
            found[card.index + 1] = answer
    return found


async def _ask_card(card: Card) -> dict[int, dict[str, int]]:
    """What the card's node has counted. Raises OSError."""
    return checked((await ask_os(card.dir, "traffic")).get("peers"))


SCIF_NAMES = {
    "sent": ("micemu_scif_bytes_total", "sent"), "received": ("micemu_scif_bytes_total", "received"),
    "dma_written": ("micemu_scif_dma_bytes_total", "written"), "dma_read": ("micemu_scif_dma_bytes_total", "read"),
}  # fmt: skip


async def _counters(instance: Instance) -> list[Sample]:
    """What others count: backends and cards, all asked at once."""
    stats, nodes = await asyncio.gather(counters(instance), traffic(instance))
    found: list[Sample] = [
        ("micemu_device_stats_total", {"card": card, "device": device, "stat": name}, value)
        for (card, device), row in stats.items()
        for name, value in row.items()
    ]
    for node, peers in nodes.items():
        for peer, row in peers.items():
            for counter, value in row.items():
                name, direction = SCIF_NAMES[counter]
                found.append((name, {"node": str(node), "peer": str(peer), "direction": direction}, value))
    return found


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))


async def values(instance: Instance) -> list[dict[str, Any]]:
    """The same samples as plain data, for the event stream."""
    return [
        {"name": name, **labels, "value": value}
        for name, labels, value in [*samples(instance), *await _counters(instance)]
    ]


async def render(instance: Instance) -> str:
    """The text; samples of one name stand together."""
    by_name: dict[str, list[str]] = {name: [] for name in HELP}
    for name, labels, value in [*samples(instance), *await _counters(instance)]:
        inner = ",".join(f'{k}="{_quote(v)}"' for k, v in labels.items())
        by_name[name].append(f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}")
    lines = []
    for name, rows in by_name.items():
        if rows:
            kind, text = HELP[name]
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *rows]
    return "\n".join(lines) + "\n"
