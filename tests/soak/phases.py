"""The faults of the soak, one at a time, and what each may do: docs/faults.md in a form that can be checked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum


class Contract(Enum):
    """What a fault may cost."""

    TIME = "nothing is lost or wrong, everybody goes on while it lasts"
    STALL = "nothing is lost or wrong, everybody goes on at the latest when it is removed"
    DISK_FAILS = "requests fail with an errno of the disk and change nothing"
    DISK_TEARS = "the first sectors of a write are new, the others old"
    DMA_CHANGES = "copies of the channel are wrong in as many bytes as descriptors were hit"
    DMA_SKIPS = "at most as many copies of the channel are wrong as descriptors were hit"
    DMA_FAILS = "the channel halts with EIO; the card's reset mends it"


@dataclass(frozen=True)
class Phase:
    """One fault on one card."""

    kind: str
    words: dict[str, object] = field(default_factory=dict)
    contract: Contract = Contract.TIME
    card: str = "mic0"

    def __str__(self) -> str:
        return " ".join([self.card, self.kind, *(f"{k}={v}" for k, v in self.words.items())])


def _dma(kind: str, contract: Contract = Contract.TIME, **words: object) -> Phase:
    """On the soak's own channel."""
    return Phase(kind, {"channel": 7, **words}, contract, "mic1")


_VDA = {"device": "vda"}
PHASES = (
    Phase("doorbell-delay", {"delay": "1ms", "jitter": "1ms", "rate": 0.2}),
    Phase("doorbell-duplicate", {"rate": 0.5}),
    *(Phase("doorbell-drop", {"device": d, "rate": 0.3}, Contract.STALL) for d in ("vda", "net", "console", "scif")),
    Phase("link", {"bandwidth": "200M", "latency": "100us"}),
    Phase("link", {"preset": "x100"}),
    Phase("disk-delay", {**_VDA, "delay": "2ms", "jitter": "5ms", "rate": 0.3}),
    Phase("packet-loss", {"rate": 0.02}),
    Phase("packet-duplicate", {"rate": 0.2}),
    Phase("packet-delay", {"delay": "1ms", "jitter": "3ms", "rate": 0.3}),
    Phase("packet-reorder", {"rate": 0.2, "gap": 3}),
    Phase("disk-error", {**_VDA, "rate": 0.1}, Contract.DISK_FAILS),
    Phase("disk-error", {**_VDA, "op": "write", "errno": "EOPNOTSUPP", "rate": 0.2}, Contract.DISK_FAILS),
    Phase("disk-torn", {**_VDA, "rate": 0.3}, Contract.DISK_TEARS),
    Phase("disk-torn", {**_VDA, "rate": 0.3, "report": "success"}, Contract.DISK_TEARS),
    _dma("dma-delay", delay="1ms", jitter="1ms", rate=0.2),
    _dma("dma-lose-interrupt", rate=0.5),
    # Every channel of mic0 is SCIF's: the fences of both sides are late, nothing more.
    Phase("dma-delay", {"delay": "1ms", "jitter": "1ms", "rate": 0.2}),
    Phase("dma-lose-interrupt", {"rate": 0.5}),
    _dma("dma-corrupt", Contract.DMA_CHANGES, rate=0.1),
    _dma("dma-skip", Contract.DMA_SKIPS, rate=0.1),
)  # fmt: skip
LAST = _dma("dma-fail", Contract.DMA_FAILS, after=20, count=1)


def shuffled(seed: int) -> Iterator[Phase]:
    """All of them in a random order, then again in another one, without end."""
    dice = random.Random(seed)
    while True:
        order = list(PHASES)
        dice.shuffle(order)
        yield from order
