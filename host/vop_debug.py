"""The text of the VOP driver's debug files: ``vop<dnode>/dp`` and ``vop<dnode>/vdev_info`` (VOP 10, VOP-31).

Everything that the card writes is read once and bounded; reading has no side effect on the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mic_emu import layout as L
from mic_emu.fields import device_type
from mic_emu.host import inspection
from mic_emu.memory import View
from mic_emu.vop import device_page as dp
from mic_emu.vop.device_file import COUNTERS

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.vop import VopDevice

C = L.CONSTANTS
LIMIT_S = 0.5  # a backend that hangs is shown without its counters
PER_LINE = 16
BOOTPARAM = (
    "magic", "h2c_config_db", "node_id", "c2h_scif_db", "h2c_scif_db", "scif_host_dma_addr", "scif_card_dma_addr",
)  # fmt: skip


def page(card: Card) -> str:
    """``dp``: boot parameters, then every live slot with its rings, features, configuration and control block."""
    data = inspection.page(card)

    def lines() -> Iterator[str]:
        for name in BOOTPARAM:
            value = data["bootparam"][name]
            yield f"{name}: {value:#x}" if value >= 0 else f"{name}: {value}"
        for slot in data["slots"]:
            if slot["type"] == dp.REMOVED:
                continue
            yield f"\nslot at {slot['offset']}"
            yield f"type: {slot['type']} ({slot['device']})"
            for name, label in (
                ("num_vq", "num VQ"),
                ("feature_len", "feature len"),
                ("config_len", "config len"),
            ):
                yield f"{label}: {slot[name]}"
            yield f"status: {slot['status']:#x}"
            for i, ring in enumerate(slot["rings"]):
                yield f"vqconfig[{i}]: address {ring['address']:#x} num {ring['num']} used address {ring['used_address']:#x}"
            for side in ("host", "guest"):
                bits = int.from_bytes(bytes.fromhex(slot[f"{side}_features"]), "little")
                yield f"{side} features: {bits:#x}"
            for i, byte in enumerate(bytes.fromhex(slot["config"])):
                yield f"config[{i}]: {byte:#04x}"
            for name, value in slot["control"].items():
                yield f"{name.replace('_', ' ')}: {value}"

    return "".join(f"{line}\n" for line in lines())


async def rings(card: Card) -> str:
    """``vdev_info``: every device with the bytes it moved; every ring with all of its entries."""
    counts = await counters(card)
    return "".join(
        f"{line}\n" for dev in card.vop_devices for line in _device(card, dev, counts.get(id(dev)))
    )


async def counters(card: Card) -> dict[int, dict[str, int]]:
    """Bytes by device (``id``), named as COPY_DESC counts them: in is from the card, out is to the card. Backends of
    our own copy with the CPU. Who does not answer in time is left out."""
    if card.running is None:
        return {}
    files = await card.running.files.counters(LIMIT_S)
    asked = [b for b in card.backends if b.channel and b.device]
    replies = await asyncio.gather(*(b.call("stats", limit_s=LIMIT_S) for b in asked), return_exceptions=True)
    for backend, reply in zip(asked, replies, strict=True):
        if isinstance(reply, dict):
            stats = reply.get("stats", {})
            moved = {
                "in_bytes": stats.get("from_card_bytes", stats.get("write_bytes", 0)),
                "out_bytes": stats.get("to_card_bytes", stats.get("read_bytes", 0)),
            }
            files[id(backend.device)] = dict.fromkeys(COUNTERS, 0) | moved
    return files


def _device(card: Card, dev: VopDevice, counts: dict[str, int] | None) -> Iterator[str]:
    kind = dev.slot.kind
    yield f"VDEV type {kind} ({device_type(kind)}) at {dev.slot.off} state {'UP' if dev.bottom.status() else 'DOWN'}"
    if counts is None:
        yield "bytes: the backend does not answer"
    else:
        yield " ".join(
            f"{name.removesuffix('_bytes').replace('_bytes_', '_')} {counts[name]}" for name in COUNTERS
        )
    for i, (block, used) in enumerate(zip(dev.slot.blocks, dev.bottom.used_addresses(), strict=True)):
        yield from _ring(card, dev.slot.num, i, block, used)
    yield ""


def _ring(card: Card, num: int, index: int, block: int, used: int) -> Iterator[str]:
    host, gddr = card.bus.host, card.bus.gddr
    avail = block + L.VRING_DESC.size * num
    raw = L.VRING_INFO.get(host, block + dp.vring_size(num), "avail_idx")
    yield f"VRING {index} num {num} info.avail_idx {raw & num - 1} raw {raw}"
    for i in range(num):
        d: dict[str, Any] = L.VRING_DESC.unpack(host.read(block + L.VRING_DESC.size * i, L.VRING_DESC.size))
        yield f"desc[{i}] addr {d['addr']:#x} len {d['len']} flags {d['flags']:#x} next {d['next']}"
    flags, idx = host.load(avail, 2), host.load(avail + 2, 2)
    yield f"avail flags {flags:#x} idx {idx & num - 1} raw {idx}"
    yield from _table("avail", [str(host.load(avail + 4 + 2 * i, 2)) for i in range(num)])
    if not 0 < used <= gddr.size - dp.used_size(num):
        yield "used ring: none"
        return
    flags, idx = gddr.load(used, 2), gddr.load(used + 2, 2)
    yield f"used flags {flags:#x} idx {idx & num - 1} raw {idx}"
    yield from _table("used", [_element(gddr, used + 4 + 8 * i) for i in range(num)])


def _element(gddr: View, at: int) -> str:
    return f"{gddr.load(at, 4)}:{gddr.load(at + 4, 4)}"


def _table(name: str, entries: list[str]) -> Iterator[str]:
    for i in range(0, len(entries), PER_LINE):
        yield f"{name}[{i}] " + " ".join(entries[i : i + PER_LINE])
