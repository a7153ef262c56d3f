"""Fault filters: the kinds there are, their words, and the table in memory that C reads (docs/faults.md).

One table of kinds serves the command line, the ``[[card.fault]]`` tables of the configuration, the host
process and the tests. A filter is a row of words (``{"kind": "packet-loss", "rate": 0.1}``);
``parse`` checks it and gives a ``Fault``; ``FaultTable.install`` writes that where every process of
the card sees it (``native/include/mic/fault.h``).
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.errors import UsageError
from mic_emu.memory import View

C = L.CONSTANTS
FILTER = L.FAULT_FILTER
ALWAYS = 1 << 32
HOUR_NS = 3600 * 10**9
ANY = C["FAULT_ANY"]
NOWHERE = 0  # the target of a filter whose device is not there now

# --- words ------------------------------------------------------------------------------------------

_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9}
_RATES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _rate(text: Any) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("use a number from 0 to 1")
    return value


def _number(least: int, most: int = 2**63) -> Callable[[Any], int]:
    def parse_number(text: Any) -> int:
        if isinstance(text, (bool, float)):
            raise ValueError("use a whole number")
        value = int(str(text), 0)
        if not least <= value <= most:
            raise ValueError(
                f"use {least} or more" if most == 2**63 else f"use a number from {least} to {most}"
            )
        return value

    return parse_number


def duration_ns(text: Any) -> int:
    """Nanoseconds from ``5ms``, ``10us``, ``1.5s``, or seconds. Raises ValueError."""
    m = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(ns|us|ms|s|)", str(text).strip())
    ns = float(m[1]) * _TIMES[m[2]] if m else -1
    if not 0 <= ns <= HOUR_NS:
        raise ValueError("use a time up to an hour, for example 10us, 5ms or 1.5s")
    return int(ns)


def _bandwidth(text: Any) -> int:
    m = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMG]?)(?:B(?:/s)?)?", str(text).strip())
    value = float(m[1]) * _RATES[m[2]] if m else 0
    if not 1 <= value < 2**63:
        raise ValueError("use bytes per second, for example 100M or 6.5G")
    return int(value)


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse_choice(text: Any) -> str:
        if text not in allowed:
            raise ValueError(f"use one of {', '.join(allowed)}")
        return str(text)

    return parse_choice


def _device(text: Any) -> str:
    if not re.fullmatch(r"[\w.+-]{1,64}", str(text)):
        raise ValueError("use a device's name, as micemu status shows it")
    return str(text)


DMA_ERRORS = {
    name.removeprefix("DMA_ERR_").lower(): bit for name, bit in C.items() if name.startswith("DMA_ERR_")
}
DISK_ERRNOS = {"EIO": errno.EIO, "EOPNOTSUPP": errno.EOPNOTSUPP}  # all that virtio-blk can say (VOP 9.4)
DIRECTIONS = {
    "to-card": C["FAULT_TO_CARD"],
    "to-host": C["FAULT_TO_HOST"],
    "both": C["FAULT_TO_CARD"] | C["FAULT_TO_HOST"],
}
DISK_OPS = {
    "read": C["FAULT_READ"], "write": C["FAULT_WRITE"], "flush": C["FAULT_FLUSH"], "discard": C["FAULT_DISCARD"],
    "any": C["FAULT_READ"] | C["FAULT_WRITE"] | C["FAULT_FLUSH"] | C["FAULT_DISCARD"],
}  # fmt: skip
# Published for the X100 in Documentation/mic/scif_overview.txt (spec/scif.md section 5): DMA levels off at
# 6.5 GB/s; 4 KiB move at 1.3 GB/s, which is 3.15 us: 0.63 us on the wire at that rate, 2.5 us to get going.
PRESETS = {"x100": {"bandwidth": 6_500_000_000, "latency": 2_500}}


@dataclass(frozen=True)
class Word:
    """One parameter: how its text is read, and what it means."""

    parse: Callable[[Any], Any]
    metavar: str
    help: str


WORDS: Mapping[str, Word] = {
    "device": Word(_device, "NAME", "Only this device (net, block, vda, ...; doorbells also: scif)."),
    "channel": Word(_number(0, C["DMA_CHANNELS"] - 1), "N", "Only this DMA channel, 0 to 7."),
    "direction": Word(_choice(*DIRECTIONS), "WAY", "to-card, to-host or both."),
    "op": Word(_choice(*DISK_OPS), "OP", "read, write, flush, discard or any."),
    "rate": Word(_rate, "P", "Probability per event, 0 to 1 (default 1)."),
    "after": Word(_number(0), "N", "Let N events pass first."),
    "count": Word(_number(1), "N", "The filter goes after acting N times."),
    "seed": Word(_number(0, 2**64 - 1), "N", "Of the random decisions (default: the filter's number)."),
    "delay": Word(duration_ns, "TIME", "How long, for example 10us, 5ms or 1.5s."),
    "jitter": Word(duration_ns, "TIME", "At random up to TIME more."),
    "error": Word(_choice(*DMA_ERRORS), "NAME", f"DCHERR bit: {', '.join(DMA_ERRORS)}."),
    "errno": Word(_choice(*DISK_ERRNOS), "NAME", "EIO or EOPNOTSUPP."),
    "keep": Word(_number(0, 2**32), "SECTORS", "How many sectors reach the disk (default: at random)."),
    "report": Word(_choice("error", "success"), "WHAT", "What the writer is told: error or success."),
    "gap": Word(_number(1, 63), "N", "How many frames overtake."),
    "bandwidth": Word(_bandwidth, "RATE", "Bytes per second in each direction: 100M, 6.5G."),
    "latency": Word(duration_ns, "TIME", "Added to every transfer."),
    "preset": Word(_choice(*PRESETS), "NAME", "x100: what was published for the card."),
}
COMMON = ("rate", "after", "count", "seed")

# --- kinds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of fault. ``words``: its own parameters with their defaults; ``required`` ones have none."""

    name: str
    does: str
    effect: str  # FAULT_*
    points: tuple[str, ...]  # FAULT_AT_*
    words: Mapping[str, Any]
    required: tuple[str, ...] = ()
    common: tuple[str, ...] = COMMON
    params: Callable[[Mapping[str, Any]], tuple[int, int]] = lambda w: (0, 0)

    @property
    def accepts(self) -> tuple[str, ...]:
        """Every word that the kind understands."""
        return (*self.words, *self.common)


_DB: dict[str, Any] = {"device": None, "direction": "both"}
_DMA: dict[str, Any] = {"channel": None}
_NET: dict[str, Any] = {"direction": "both"}
_CARD_DB: dict[str, Any] = {"delay": 0, "device": None}


def _wait(w: Mapping[str, Any]) -> tuple[int, int]:
    return w["delay"], w.get("jitter") or 0


_KINDS = (
    Kind("doorbell-drop", "A doorbell is lost.", "DROP", ("DOORBELL",), _DB),
    Kind("doorbell-delay", "A doorbell arrives late.", "DELAY", ("DOORBELL",),
         {**_DB, "delay": None, "jitter": 0}, ("delay",), params=_wait),
    Kind("doorbell-duplicate", "A doorbell rings again after DELAY.", "DUPLICATE", ("DOORBELL",),
         {**_DB, "delay": 10**6}, params=_wait),
    Kind("dma-delay", "A descriptor waits before it is executed.", "DELAY", ("DMA",),
         {**_DMA, "delay": None, "jitter": 0}, ("delay",), params=_wait),
    Kind("dma-fail", "A descriptor halts its channel with a DCHERR bit.", "FAIL", ("DMA",),
         {**_DMA, "error": "memory"}, params=lambda w: (DMA_ERRORS[w["error"]], 0)),
    Kind("dma-corrupt", "One byte of what a descriptor wrote is changed.", "CORRUPT", ("DMA",), _DMA),
    Kind("dma-skip", "A descriptor completes without having done anything.", "SKIP", ("DMA",), _DMA),
    Kind("dma-lose-interrupt", "A descriptor completes without its interrupt.", "LOSE_INTERRUPT", ("DMA",), _DMA),
    Kind("os-hang", "The card OS stops dead; removing the filter lets it go on.", "HANG", ("DOORBELL",), _CARD_DB),
    Kind("os-kill", "The card OS dies.", "KILL", ("DOORBELL",), _CARD_DB),
    Kind("heartbeat-stop", "The card OS lives and sends no heartbeat.", "DROP", ("HEARTBEAT",), {}),
    Kind("link", "Bandwidth and latency between card and host.", "LINK", ("DMA", "DISK", "PACKET"),
         {"preset": None, "bandwidth": 0, "latency": 0}, common=(),
         params=lambda w: (w["bandwidth"], w["latency"])),
    Kind("disk-error", "A request fails and does nothing.", "FAIL", ("DISK",),
         {"device": None, "op": "any", "errno": "EIO"}, params=lambda w: (DISK_ERRNOS[w["errno"]], 0)),
    Kind("disk-delay", "A request completes late.", "DELAY", ("DISK",),
         {"device": None, "op": "any", "delay": None, "jitter": 0}, ("delay",), params=_wait),
    Kind("disk-torn", "Only the first sectors of a write reach the disk.", "TORN", ("DISK",),
         {"device": None, "keep": None, "report": "error"},
         params=lambda w: (0 if w["keep"] is None else w["keep"] + 1, int(w["report"] == "success"))),
    Kind("packet-loss", "A frame is lost.", "DROP", ("PACKET",), _NET),
    Kind("packet-duplicate", "A frame arrives twice.", "DUPLICATE", ("PACKET",), _NET),
    Kind("packet-delay", "A frame arrives late.", "DELAY", ("PACKET",),
         {**_NET, "delay": None, "jitter": 0}, ("delay",), params=_wait),
    Kind("packet-reorder", "GAP later frames overtake one.", "REORDER", ("PACKET",),
         {**_NET, "gap": 1}, params=lambda w: (w["gap"], 0)),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {k.name: k for k in _KINDS}


@dataclass(frozen=True)
class Fault:
    """One filter: its kind, and the words that were given, read; times in nanoseconds."""

    kind: Kind
    given: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, word: str) -> Any:
        return self.given.get(word, self.kind.words.get(word))

    @property
    def device(self) -> str | None:
        """The device that it is about, if it names one."""
        device: str | None = self["device"]
        return device

    @property
    def by_time(self) -> bool:
        """A hang or death of the card OS at a time, not at a doorbell: the host process does it."""
        at_doorbell = ("device", "after", "rate", "seed")
        return self.kind.effect in ("HANG", "KILL") and not any(w in self.given for w in at_doorbell)

    @property
    def count(self) -> int:
        """How often it acts until it is spent, 0: without end."""
        default = 1 if self.kind.effect in ("HANG", "KILL") else 0
        return int(self.given.get("count", default))

    def words(self) -> dict[str, Any]:
        """As they may be written again."""
        return {"kind": self.kind.name, **{k: _write(k, v) for k, v in self.given.items()}}

    def __str__(self) -> str:
        return " ".join([self.kind.name, *(f"{k}={_write(k, v)}" for k, v in self.given.items())])


def _write(word: str, value: Any) -> Any:
    """A value in its shortest exact spelling."""
    if word in ("delay", "jitter", "latency"):
        unit = next(u for u in ("s", "ms", "us", "ns") if value % _TIMES[u] == 0)
        return f"{value // _TIMES[unit]}{unit}"
    return value


def parse(words: Mapping[str, Any], where: str = "fault") -> Fault:
    """Check a filter's words (``kind`` among them; None counts as not given). Raises UsageError."""
    given = {k: v for k, v in words.items() if v is not None}
    name = given.pop("kind", None)
    if name is None:
        raise UsageError(f"{where}: it has no kind; micemu fault kinds lists them")
    kind = KINDS.get(str(name))
    if kind is None:
        raise UsageError(
            f"{where}: there is no kind {name!r}{_near(str(name), KINDS)}; micemu fault kinds lists them"
        )
    values: dict[str, Any] = {}
    for word, text in given.items():
        if word not in kind.accepts:
            hint = _near(word, kind.accepts) if word not in WORDS else ""
            raise UsageError(
                f"{where}: {kind.name} has no {word!r}{hint}; it takes {', '.join(kind.accepts) or 'nothing'}"
            )
        try:
            values[word] = WORDS[word].parse(text)
        except (ValueError, TypeError) as e:
            why = str(e) if "use" in str(e) else f"use {WORDS[word].metavar}"
            raise UsageError(f"{where}: {word} {text!r}: {why}") from None
    for word in kind.required:
        if word not in values:
            what = WORDS[word].help.rstrip(".")
            raise UsageError(f"{where}: {kind.name} needs {word} ({what[0].lower()}{what[1:]})")
    return _complete(kind, values, where)


def _complete(kind: Kind, values: dict[str, Any], where: str) -> Fault:
    """What depends on several words."""
    if kind.effect == "LINK":
        values = {**PRESETS.get(values.get("preset", ""), {}), **values}
        if "bandwidth" not in values and "latency" not in values:
            raise UsageError(f"{where}: link needs bandwidth, latency or preset")
    fault = Fault(kind, values)
    if kind.effect in ("HANG", "KILL") and not fault.by_time and "delay" in values:
        raise UsageError(f"{where}: {kind.name} happens after a delay, or at a doorbell: not both")
    return fault


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


# --- the table in memory ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """``seen``: events that matched; ``hits``: those that the filter acted on."""

    seen: int
    hits: int


class FaultTable:
    """The filters of one card, over its ``MIC_FD_FAULTS`` object. One writer: the host process, or a test."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._slots: dict[int, int] = {}  # filter number -> offset
        self._faults: dict[int, Fault] = {}
        self._last = 0

    def install(self, fault: Fault, target: int = ANY) -> int:
        """Put a filter in; returns its number. Raises OSError ENOSPC when there are 31 already."""
        taken = set(self._slots.values())
        places = (C["FAULT_FIRST"] + i * FILTER.size for i in range(C["FAULT_SLOTS"]))
        at = next((p for p in places if p not in taken), None)
        if at is None:
            raise OSError(errno.ENOSPC, f"the card has {C['FAULT_SLOTS']} fault filters already")
        self._last += 1
        number = self._last
        self._view.write(at, FILTER.pack(**self._row(fault, target, number)))
        FILTER.put(self._view, at, "id", number)
        self._slots[number], self._faults[number] = at, fault
        self._arm()
        return number

    @staticmethod
    def _row(fault: Fault, target: int, number: int) -> dict[str, int]:
        kind = fault.kind
        channel = fault["channel"]
        ways = DISK_OPS[fault["op"]] if fault["op"] else DIRECTIONS[fault["direction"] or "both"]
        if kind.effect == "TORN":
            ways = C["FAULT_WRITE"]
        elif kind.effect in ("HANG", "KILL"):
            ways = C["FAULT_TO_HOST"]
        values = {w: fault[w] for w in kind.words}
        first, second = (0, 0) if kind.effect in ("HANG", "KILL") else kind.params(values)
        points = () if fault.by_time else kind.points
        return {
            "effect": C[f"FAULT_{kind.effect}"],
            "points": sum(1 << C[f"FAULT_AT_{p}"] for p in points),
            "target": 1 << channel if channel is not None else target,
            "ways": ways,
            "chance": int(fault.given.get("rate", 1.0) * ALWAYS),
            "after": fault.given.get("after", 0),
            "count": fault.count,
            "seed": fault.given.get("seed", number),
            "param0": first,
            "param1": second,
        }

    def remove(self, number: int) -> Counts:
        """Take a filter out; its last counts. Raises KeyError."""
        at = self._slots.pop(number)
        FILTER.put(self._view, at, "id", 0)
        del self._faults[number]
        self._arm()
        return self._counts(at)

    def counts(self, number: int) -> Counts:
        """What it has done so far. Raises KeyError."""
        return self._counts(self._slots[number])

    def _counts(self, at: int) -> Counts:
        return Counts(FILTER.get(self._view, at, "seen"), FILTER.get(self._view, at, "hits"))

    def aim(self, number: int, target: int) -> None:
        """The device that it is about is now this one (``NOWHERE``: there is none)."""
        FILTER.put(self._view, self._slots[number], "target", target)

    def count_hit(self, number: int) -> None:
        """A hit that happened outside C."""
        at = self._slots[number]
        for name in ("seen", "hits"):
            FILTER.put(self._view, at, name, FILTER.get(self._view, at, name) + 1)

    def listen_again(self, number: int) -> None:
        """Hits from now on ring the host's line again; look at the counts afterwards."""
        FILTER.put(self._view, self._slots[number], "notify", 0)
        lib.mic_shm_fence()  # pairs with the exchange in tell_host(): it sees 0, or we see its hit

    def _arm(self) -> None:
        """The word that everybody looks at first: the points of all filters."""
        armed = 0
        for at in self._slots.values():
            armed |= FILTER.get(self._view, at, "points")
        self._view.store(0, 4, armed)

    @property
    def faults(self) -> dict[int, Fault]:
        """By number, in the order in which they act."""
        return dict(self._faults)
