"""What ``micemu dump`` shows: registers, device page, vrings, SMPT, the card's log (HW 9, VOP 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mic_emu import dma_dump
from mic_emu import layout as L
from mic_emu.errors import UsageError
from mic_emu.fields import decode, device_type, feature_words, status_words
from mic_emu.pciconfig import ConfigSpace
from mic_emu.vop import device_page as dp

if TYPE_CHECKING:
    from mic_emu.bar import Bus
    from mic_emu.host.card import Card
    from mic_emu.host.vop import VopDevice

C = L.CONSTANTS
MOST_SHOWN = 1 << 14  # descriptors of a ring: more than drivers have, 128 chains of 1 + 127
WHAT = ("registers", "page", "vring", "smpt", "interrupts", "lines", "dma", "log", "pci")


def dump(card: Card, what: str, device: str | None) -> Any:
    """Plain data of one thing. Raises UsageError for an unknown one."""
    views: dict[str, Callable[[Card], Any]] = {
        "registers": registers, "page": page, "vring": vrings, "smpt": smpt, "interrupts": interrupts, "lines": lines,
        "dma": dma, "log": log, "pci": pci,
    }  # fmt: skip
    if what not in views:
        raise UsageError(f"cannot dump {what!r}: use one of {', '.join(WHAT)}")
    rows = views[what](card)
    if what == "vring" and device:
        found = [r for r in rows if device in (r["name"], r["device"], str(r["slot"]))]
        if not found:
            there = ", ".join(sorted({r["name"] or r["device"] for r in rows})) or "no device"
            raise UsageError(f"{card.name} has no device {device!r}: there is {there}")
        return found
    return rows


def registers(card: Card) -> list[dict[str, Any]]:
    """Every register with its value and what its bits mean."""
    return [
        {
            "offset": off,
            "name": name,
            "value": (value := card.bus.mmio.load(off, 4)),
            "fields": decode(name, value),
            "doc": row.doc,
            "clause": row.clause,
        }
        for off, name, row in L.register_words()
    ]


def page(card: Card) -> dict[str, Any]:
    """Boot parameters and every slot of the device page."""
    view = card.driver.page
    slots = []
    for slot in dp.walk(view):
        shape = slot.shape
        status = L.DEVICE_DESC.get(view, slot.off, "status")
        offered, accepted = (
            view.read(slot.off + at, shape.feature_len) for at in (shape.features_off, shape.accepted_off)
        )
        slots.append({
            "offset": slot.off, "type": slot.type, "device": device_type(slot.type), "num_vq": shape.num_vq,
            "feature_len": shape.feature_len, "config_len": shape.config_len,
            "status": status, "status_words": status_words(status),
            "host_features": offered.hex(), "host_feature_words": _features(slot.type, offered),
            "guest_features": accepted.hex(), "guest_feature_words": _features(slot.type, accepted),
            "config": view.read(slot.off + shape.config_off, shape.config_len).hex(),
            "rings": [
                {f.name: L.VQCONFIG.get(view, slot.off + shape.vq_off(i), f.name) for f in L.VQCONFIG.fields}
                for i in range(min(shape.num_vq, L.CONSTANTS["MAX_VRINGS"]))
            ],
            "control": {f.name: L.DEVICE_CTRL.get(view, slot.ctrl, f.name) for f in L.DEVICE_CTRL.fields},
        })  # fmt: skip
    boot = {f.name: L.BOOTPARAM.get(view, 0, f.name) for f in L.BOOTPARAM.fields}
    return {"bootparam": boot, "slots": slots}


def _features(kind: int, bits: bytes) -> list[str]:
    return feature_words(kind, int.from_bytes(bits, "little"))


@dataclasses.dataclass(frozen=True)
class Ring:
    """One ring as the card left its indices."""

    device: VopDevice
    index: int
    num: int
    block: int  # offset in host memory
    used: int  # card address, as the card says
    ready: bool  # it lies in card memory
    avail_idx: int
    used_idx: int

    @property
    def avail(self) -> int:
        """Offset of the available ring in host memory."""
        return self.block + L.VRING_DESC.size * self.num

    @property
    def pending(self) -> int:
        """Chains that wait."""
        return min(self.num, (self.avail_idx - self.used_idx) & 0xFFFF)


def rings(card: Card) -> Iterator[Ring]:
    """Every ring of every live device, cheap enough for every second."""
    host, gddr = card.bus.host, card.bus.gddr
    for dev in card.vop_devices:
        num = dev.slot.num
        for i, (block, used) in enumerate(zip(dev.slot.blocks, dev.bottom.used_addresses(), strict=True)):
            ready = 0 < used <= gddr.size - dp.used_size(num)
            avail_idx = host.load(block + L.VRING_DESC.size * num + 2, 2)
            used_idx = gddr.load(used + 2, 2) if ready else 0
            yield Ring(dev, i, num, block, used, ready, avail_idx, used_idx)


def vrings(card: Card) -> list[dict[str, Any]]:
    """Indices of every ring of every live device, and the chains that wait in it, as far as they are ``MOST_SHOWN``
    descriptors: a card may link each of them through all others."""
    rows: list[dict[str, Any]] = []
    names = {id(b.device): b.name for b in card.backends if b.device is not None}
    host, gddr = card.bus.host, card.bus.gddr
    for r in rings(card):
        dev = r.device
        rows.append({
            "name": names.get(id(dev), ""), "device": dev.name, "slot": dev.slot.off, "ring": r.index, "num": r.num,
            "block": r.block, "used": r.used,
            "avail_flags": host.load(r.avail, 2), "avail_idx": r.avail_idx, "used_idx": r.used_idx,
            "used_flags": gddr.load(r.used, 2) if r.ready else 0,
            "pending": _chains(card.bus, r),
        })  # fmt: skip
    return rows


def _chains(bus: Bus, ring: Ring) -> list[list[dict[str, Any]]]:
    """Those that wait, the oldest first."""
    chains: list[list[dict[str, Any]]] = []
    left = MOST_SHOWN
    for k in range(ring.used_idx, ring.used_idx + ring.pending):
        head = bus.host.load(ring.avail + 4 + 2 * (k % ring.num), 2)
        chains.append(_chain(bus, ring.block, ring.num, head))
        left -= sum(1 + len(d.get("table", ())) for d in chains[-1])
        if left <= 0:
            break
    return chains


def _chain(bus: Bus, block: int, num: int, head: int) -> list[dict[str, Any]]:
    """The descriptors of one chain, those of an indirect table under ``table``; bounded, whatever the card wrote."""
    out: list[dict[str, Any]] = []
    index = head
    while index < num and len(out) < num:
        desc: dict[str, Any] = L.VRING_DESC.unpack(
            bus.host.read(block + L.VRING_DESC.size * index, L.VRING_DESC.size)
        )
        out.append({"index": index, **desc})
        if desc["flags"] & C["VRING_DESC_F_INDIRECT"]:
            out[-1]["table"] = _table(bus, desc["addr"], desc["len"])
        if not desc["flags"] & C["VRING_DESC_F_NEXT"]:
            break
        index = desc["next"]
    return out


def _table(bus: Bus, addr: int, length: int) -> list[dict[str, int]]:
    """Entries of an indirect table in the order in which they are linked; what lies outside memory is left out."""
    size = L.VRING_DESC.size
    entries, index = min(length // size, C["MAX_VRING_ENTRIES"]), 0
    out: list[dict[str, int]] = []
    while index < entries and len(out) < entries and addr + size * (index + 1) <= bus.gddr.size:
        desc = L.VRING_DESC.unpack(bus.gddr.read(addr + size * index, size))
        out.append({"index": index, **desc})
        if not desc["flags"] & C["VRING_DESC_F_NEXT"]:
            break
        index = desc["next"]
    return out


def smpt(card: Card) -> list[dict[str, int]]:
    """The software table, as the real driver's debug file shows it."""
    return [dataclasses.asdict(row) for row in card.driver.smpt.rows()]


def interrupts(card: Card) -> list[dict[str, Any]]:
    """Vectors with the sources mapped to them, who asked for them, and how often each was sent."""
    irq, counts = card.driver.irq, card.bus.counts().vectors
    return [
        {
            "mode": irq.mode.value,
            "vector": v,
            "mxar": mxar,
            **decode("mxar", sources),
            "masked": card.bus.read("msix_ctrl", v),
            "users": users,
            "count": counts[v],
        }
        for v, mxar, sources, users in irq.rows()
    ]


def lines(card: Card) -> list[dict[str, Any]]:
    """Interrupts towards the card: every line with how often it was signalled (HW 4.4)."""
    counts = card.bus.counts().lines
    first = C["CARD_IRQ_DMA"]
    names = [
        f"doorbell {i}" if i < first else f"dma {C['DMA_HOST_CHANNELS'] + i - first}"
        for i in range(len(counts))
    ]
    return [{"line": i, "name": name, "count": counts[i]} for i, name in enumerate(names)]


def dma(card: Card) -> list[dict[str, Any]]:
    """Every DMA channel: registers, waiting descriptors, and the host driver's counters for its own."""
    own = (
        {ch.index: dataclasses.asdict(ch.counters()) for ch in card.driver.dma.channels}
        if card.driver.dma
        else {}
    )
    return [{**row, "driver": own.get(row["channel"])} for row in dma_dump.channels(card.bus)]


def pci(card: Card) -> str:
    """Configuration space in the hex form that ``lspci -F`` reads."""
    return ConfigSpace(card.bus).hexdump(f"{card.index + 1:02x}:00.0")


def log(card: Card) -> str:
    """The card's kernel log out of GDDR; it outlives the card OS."""
    return card.log_buffer().decode(errors="replace")
