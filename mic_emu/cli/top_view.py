"""``micemu top``: rates of two looks, and the table that people read, as plain text or with rich."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mic_emu.errors import MicemuError

Look = dict[str, Any]
HEAD = ("CARD", "STATE", "REQUESTS", "TO CARD", "FROM CARD", "RINGS")
OPERATIONS = (
    "to_card_packets",
    "from_card_packets",
    "reads",
    "writes",
    "flushes",
    "discards",
    "zeroes",
    "others",
    "processed",
)
STYLES = {
    "online": "bold green", "booting": "bold yellow", "resetting": "bold yellow", "shutting_down": "bold yellow",
    "crashed": "bold red", "reset_failed": "bold red", "failed": "red", "restarting": "yellow",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; ``style`` is rich's word for it."""

    cells: tuple[str, ...]
    style: str = ""


# --- rates -------------------------------------------------------------------------------------------


def _rate(now: int, before: int | None, seconds: float, modulus: int = 0) -> float | None:
    """Per second; None without an earlier figure, and when the counter began anew."""
    if before is None or seconds <= 0 or (now < before and not modulus):
        return None
    step = (now - before) % modulus if modulus else now - before
    return round(step / seconds, 3)


def _totals(counters: dict[str, int]) -> dict[str, int]:
    """What every kind of device has in common, of the counters of its own."""
    found = {}
    if any(name in counters for name in OPERATIONS):
        found["requests"] = sum(counters.get(name, 0) for name in OPERATIONS)
    for total, names in (("to_card_bytes", ("to_card_bytes", "bytes_read")),
                         ("from_card_bytes", ("from_card_bytes", "bytes_written"))):  # fmt: skip
        for name in names:
            if name in counters:
                found[total] = counters[name]
    return found


def _key(rows: Iterable[Any], *names: str) -> dict[Any, Any]:
    return {tuple(row[n] for n in names): row for row in rows}


def _device_rates(device: Any, old: Any, seconds: float) -> dict[str, float | None]:
    before = _totals(old["counters"]) if old and old["pid"] == device["pid"] else {}
    rates = {f"{k}_s": _rate(v, before.get(k), seconds) for k, v in _totals(device["counters"]).items()}
    rings = _key(old["rings"] if before or old else [], "ring")
    for ring in device["rings"]:
        was = rings.get((ring["ring"],))
        ring["used_s"] = _rate(ring["used_idx"], was["used_idx"] if was else None, seconds, 1 << 16)
    if "requests_s" not in rates:  # a device that counts no requests: what it gave back
        used = [r["used_s"] for r in device["rings"]]
        rates["requests_s"] = sum(used) if used and None not in used else None
    return rates


def _dma_rates(channel: Any, old: Any, seconds: float) -> dict[str, float | None]:
    size = channel["size"]
    same = old is not None and old["size"] == size and size
    rates = {"descriptors_s": _rate(channel["count"], old["count"] if same else None, seconds, size or 1)}
    for name, value in (channel["driver"] or {}).items():
        was = old["driver"].get(name) if old and old["driver"] else None
        rates[f"{name}_s"] = _rate(value, was, seconds)
    return rates


def add_rates(look: Look, before: Look | None) -> Look:
    """``rates`` for devices, DMA channels and SCIF, and ``used_s`` for rings, per second; null without an earlier look."""
    seconds = look["time_s"] - before["time_s"] if before else 0.0
    old_cards = _key(before["cards"] if before else [], "name")
    for card in look["cards"]:
        old = old_cards.get((card["name"],), {"devices": [], "dma": []})
        devices, channels = _key(old["devices"], "type"), _key(old["dma"], "channel")
        for device in card["devices"]:
            device["rates"] = _device_rates(device, devices.get((device["type"],)), seconds)
        was = old.get("scif", {})
        card["scif_rates"] = {
            f"{k}_s": _rate(v, was.get(k), seconds) for k, v in card.get("scif", {}).items()
        }
        for channel in card["dma"]:
            channel["rates"] = _dma_rates(channel, channels.get((channel["channel"],)), seconds)
    return look


# --- words ---------------------------------------------------------------------------------------------


def number(value: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: ``1.24 M``; ``-`` when it is not known."""
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G"):
        if value < 999.5 or prefix == "G":
            break
        value /= 1000
    digits = f"{value:.0f}" if not prefix or value >= 99.5 else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def _speed(value: float | None) -> str:
    return number(value, "B/s")


def title(look: Look) -> str:
    """The line above the table."""
    minutes, seconds = divmod(int(look["uptime_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    scif = look["scif"]
    return (f"instance {look['instance']}, up {hours}:{minutes:02}:{seconds:02}, "
            f"{scif['nodes']} SCIF nodes, {scif['endpoints']} endpoints on the host")  # fmt: skip


def _card_row(card: Any) -> Row:
    heart = card["heartbeat"]
    beat = "heartbeat off" if not heart["enabled"] else "no heartbeat"
    if heart["enabled"] and heart["silent_s"] is not None:
        beat = f"heard {heart['silent_s']:.1f} s ago"
    status = card["shutdown_status"]
    state = card["state"] + ("" if status == "nop" else f" ({status})")
    style = STYLES.get("crashed" if status == "crashed" else card["state"], "bold")
    cells = (card["name"], state, beat, f"boots {card['boots']}", f"crashes {card['crashes']}",
             f"post {card['post_code']}, SMPT {number(card['smpt_mapped_bytes'], 'B')}")  # fmt: skip
    return Row(cells, style)


def _device_row(device: Any) -> Row:
    rates = device["rates"]
    rings = "  ".join(f"{r['pending']}/{r['num']}" for r in device["rings"])
    cells = ("  " + device["type"], device["state"], f"{number(rates['requests_s'])}/s",
             _speed(rates.get("to_card_bytes_s")), _speed(rates.get("from_card_bytes_s")), rings)  # fmt: skip
    return Row(cells, STYLES.get(device["state"], "") if device["state"] != "running" else "")


def _scif_rows(card: Any) -> Iterator[Row]:
    """Messages, and copies by the host's channels, between the host's programs and the card."""
    rates = card.get("scif_rates")
    if rates and card["state"] == "online":
        yield Row(("  scif", "messages", "", _speed(rates["sent_s"]), _speed(rates["received_s"]), ""))
        if any(card["scif"][k] for k in ("dma_written", "dma_read")):
            yield Row(
                ("  scif", "DMA copies", "", _speed(rates["dma_written_s"]), _speed(rates["dma_read_s"]), "")
            )


def _dma_rows(channels: list[Any]) -> Iterator[Row]:
    idle = 0
    for ch in channels:
        rates = ch["rates"]
        if not (ch["active"] or ch["error"] or rates["descriptors_s"]):
            idle += 1
            continue
        what = f"error {ch['error']:#x}" if ch["error"] else "active" if ch["active"] else "idle"
        speed = _speed(rates["bytes_s"]) if "bytes_s" in rates else ""
        cells = (
            f"  dma {ch['channel']}",
            f"{ch['owner']}, {what}",
            f"{number(rates['descriptors_s'])}/s",
            speed,
            "",
            "",
        )
        yield Row(cells, "red" if ch["error"] else "")
    if idle:
        yield Row(("  dma", f"{idle} idle", "", "", "", ""), "dim")


def rows(look: Look) -> list[Row]:
    """The table: a line for each card, and below it its devices and DMA channels."""
    found = []
    for card in look["cards"]:
        found.append(_card_row(card))
        found += [_device_row(d) for d in card["devices"]]
        found += _scif_rows(card)
        found += _dma_rows(card["dma"])
    return found


# --- output ------------------------------------------------------------------------------------------


def plain(look: Look) -> str:
    """Aligned text, no control characters."""
    table = [Row(HEAD), *rows(look)]
    widths = [max(len(r.cells[i]) for r in table) for i in range(len(HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r.cells, widths, strict=True)).rstrip() for r in table]
    return "\n".join([title(look), *lines])


class Painter:
    """Renders with rich; ``lines`` fit a screen. Raises MicemuError when rich is missing."""

    def __init__(self) -> None:
        try:
            import rich.console
            import rich.table
            import rich.text
        except ImportError:
            raise MicemuError(
                "the screen of top needs rich: pip install 'micemu[top]', or use micemu top --plain"
            ) from None
        self._table, self._text = rich.table.Table, rich.text.Text
        self._console = rich.console.Console

    def lines(self, look: Look, foot: str, height: int, width: int) -> list[str]:
        """``height`` lines of at most ``width`` columns, with escape sequences for colour."""
        out = io.StringIO()
        console = self._console(file=out, width=width, height=height, force_terminal=True, highlight=False)
        table = self._table(box=None, pad_edge=False, header_style="bold reverse", expand=True)
        for i, name in enumerate(HEAD):
            table.add_column(name, no_wrap=True, justify="right" if i in (2, 3, 4) else "left")
        for row in rows(look):
            table.add_row(*(self._text(c) for c in row.cells), style=row.style)
        console.print(self._text(title(look), style="bold"), no_wrap=True, overflow="ellipsis")
        console.print(table)
        body = out.getvalue().splitlines()
        if len(body) > height - 1:
            body[height - 2 :] = [
                f"... {len(body) - height + 2} more lines: give the terminal more rows, or name cards"
            ]
        return [*body[: height - 1], foot[: width - 1]]
