"""micemu log"""

from __future__ import annotations

import json
import re
import select
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mic_emu import inotify
from mic_emu.cli import client
from mic_emu.errors import NotRunning
from mic_emu.log import LEVELS


def clock(seconds: float) -> str:
    """Seconds since 1970 as people read them: local time with milliseconds; what is no time as it stands."""
    try:
        whole = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return str(seconds)
    return time.strftime("%H:%M:%S", whole) + f".{int(seconds % 1 * 1000):03d}"


def harmless(said: str, keep: str = "") -> str:
    """Control characters as ``\\xNN``: what a card or its programs said reaches a terminal as text, not as its commands."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda m: m[0] if m[0] in keep else f"\\x{ord(m[0]):02x}", said)


def record(line: str) -> dict[str, Any] | None:
    """The record of a line; None for what is none: half a line of a writer that was killed, or what a card's code wrote."""
    try:
        r = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(r, dict) or r.get("level") not in LEVELS or "message" not in r:
        return None
    if not isinstance(r.get("time"), int | float) or not isinstance(r.get("traceback", ""), str):
        return None
    return r


def text(line: str) -> str:
    """A record as people read it: a line, and below it the traceback of an exception."""
    if (r := record(line)) is None:
        return harmless(line.rstrip("\n"))
    who = " ".join(str(r[k]) for k in ("process", "card", "device") if r.get(k))
    trace = textwrap.indent(harmless(r.get("traceback", ""), "\n\t").rstrip("\n"), "    ")
    return harmless(f"{clock(r['time'])} {r['level']:<7} {who}: {r['message']}", "\t") + (
        f"\n{trace}" if trace else ""
    )


@dataclass
class Filter:
    """Which records to print, and how."""

    as_json: bool
    minimum: int
    card: str

    def show(self, line: str) -> None:
        """Print one record if it is wanted; what is none is not."""
        if (r := record(line)) is None:
            return
        if LEVELS.index(r["level"]) >= self.minimum and self.card in ("", r.get("card", self.card)):
            click.echo(line.rstrip("\n") if self.as_json else text(line))


def follow(path: Path, position: int, chosen: Filter) -> None:
    """Print what is appended, until the file goes away with its instance."""
    watch = inotify.watch(path, inotify.MODIFY | inotify.ATTRIB | inotify.DELETE_SELF)
    with path.open("rb") as f:
        f.seek(position)
        while True:
            for line in f:
                chosen.show(line.decode(errors="replace"))
            sys.stdout.flush()
            if not path.exists():
                return
            if f.tell() > path.stat().st_size:  # rotated
                f.seek(0)
                continue
            select.select([watch], [], [])
            inotify.drain(watch)


@click.command()
@client.cards_argument
@click.option("-f", "--follow", "keep", is_flag=True, help="Print what comes, until the emulator ends.")
@click.option("-n", "--lines", type=int, default=0, metavar="N", help="Only the last N records.")
@click.option(
    "--level", type=click.Choice(LEVELS), default="info", show_default=True, help="Least level to show."
)
@client.json_option
def command(cards: tuple[str, ...], keep: bool, lines: int, level: str, as_json: bool) -> None:
    """Show the log of all processes. A card's own kernel log: micemu dump log CARD.

    \b
    Examples:
      micemu log
      micemu log -f mic0
      micemu log --level error --json
    """
    chosen = Filter(as_json, LEVELS.index(level), cards[0] if cards and cards[0] != "all" else "")
    path = client.rundir().log
    if not path.exists():
        raise NotRunning(f"no emulator runs (instance {client.rundir().instance}), and none left a log")
    content = path.read_bytes()
    records = content.splitlines(keepends=True)
    for line in records[-lines:] if lines > 0 else records:
        chosen.show(line.decode(errors="replace"))
    if keep:
        follow(path, len(content), chosen)
