"""micemu info"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.ras import systools
from mic_emu.cosm import tools_proto as P
from mic_emu.errors import MicemuError
from mic_emu.version import VERSION

NA = "Not Available"
Rows = dict[str, str]
GROUPS = ("system", "version", "board", "core", "thermal", "memory")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace").strip() or NA


class CardFacts:
    """One card's data; what cannot be had is None."""

    def __init__(self, card: dict[str, Any]) -> None:
        self.card = card
        self.config = self._read("device/config")
        self.device = P.DEVICE_INFO_BODY.unpack(raw) if (raw := self._ask(P.DEVICE_INFO)) else None
        self.memory = P.MEMORY_INFO_BODY.unpack(raw) if (raw := self._ask(P.MEMORY_INFO)) else None
        self.cores = P.CORES_BODY.unpack(raw) if (raw := self._ask(P.CORES)) else None
        self.processor = P.PROCESSOR_BODY.unpack(raw) if (raw := self._ask(P.PROCESSOR)) else None

    def _ask(self, kind: int) -> bytes | None:
        if self.card["state"] != "online":
            return None
        try:
            return systools(self.card["name"], kind)
        except MicemuError:
            return None

    def _read(self, name: str) -> bytes:
        answer = client.ask("sysfs_read", path=f"class/mic/{self.card['name']}/{name}")
        return bytes(answer["data"].encode("latin-1"))

    def word(self, at: int, size: int = 2) -> int:
        """A little-endian word of configuration space."""
        return int.from_bytes(self.config[at : at + size], "little")


def system(_: CardFacts) -> Rows:
    uname = platform.uname()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "Host OS": uname.system, "OS Version": uname.release, "MPSS Version": f"micemu {VERSION}",
        "Host Physical Memory": f"{total >> 20} MB",
    }  # fmt: skip


def version(f: CardFacts) -> Rows:
    d = f.device
    return {
        "Flash Version": _text(d[10]) if d else NA, "SMC Boot Loader Version": NA, "SMC Firmware Version": NA,
        "Coprocessor OS Version": _text(d[9]) if d else NA, "Device Serial Number": _text(d[15]) if d else NA,
    }  # fmt: skip


_SPEEDS = {1: "2.5 GT/s", 2: "5 GT/s"}


def board(f: CardFacts) -> Rows:
    control, link = f.word(0x54), f.word(0x5E)
    p, d = f.processor, f.device
    on = {True: "Enabled", False: "Disabled"}
    return {
        "Vendor ID": f"{f.word(0):#06x}", "Device ID": f"{f.word(2):#06x}", "Subsystem ID": f"{f.word(0x2E):#06x}",
        "Coprocessor Stepping ID": str(p[0]) if p else NA, "UUID": NA,
        "PCIe Width": f"x{link >> 4 & 0x3F}", "PCIe Speed": _SPEEDS.get(link & 0xF, NA),
        "PCIe Ext Tag Field": on[bool(control & 0x100)], "PCIe No Snoop": on[bool(control & 0x800)],
        "PCIe Relaxed Ordering": on[bool(control & 0x10)],
        "PCIe Max payload size": f"{128 << (control >> 5 & 7)} bytes",
        "PCIe Max read request size": f"{128 << (control >> 12 & 7)} bytes",
        "Coprocessor Model": f"{p[1]:#04x}" if p else NA, "Coprocessor Model Ext": NA,
        "Coprocessor Type": f"{p[3]:#04x}" if p else NA, "Coprocessor Family": f"{p[2]:#04x}" if p else NA,
        "Coprocessor Family Ext": NA, "Coprocessor Stepping": _text(f._read("stepping")),
        "Board SKU": _text(d[13]) if d else NA,
        "ECC Mode": on[bool(f.memory[4])] if f.memory else NA, "SMC HW Revision": NA,
        "PCIe Bus Information": _slot(f), "Coprocessor SMBus Address": NA,
    }  # fmt: skip


def _slot(f: CardFacts) -> str:
    lines = f._read("device/uevent").decode().splitlines()
    return next((w.removeprefix("PCI_SLOT_NAME=") for w in lines if w.startswith("PCI_SLOT_NAME=")), NA)


def core(f: CardFacts) -> Rows:
    c = f.cores
    return {
        "Total No. of Active Cores": str(c[0]) if c else NA, "Threads per Core": str(c[3]) if c else NA,
        "Voltage": NA, "Frequency": f"{c[1] / 1000:.3f} GHz" if c else NA,
    }  # fmt: skip


def thermal(_: CardFacts) -> Rows:
    return {"Fan RPM": NA, "Fan PWM": NA, "Die Temp": NA}


def memory(f: CardFacts) -> Rows:
    m = f.memory
    return {
        "Vendor": _text(m[5]) if m else NA, "Version": NA, "Density": NA,
        "Size": f"{f.card['memory'] >> 20} MB", "Technology": "GDDR5",
        "Speed": f"{m[1] / 1000:.3f} GT/s" if m else NA, "Frequency": f"{m[2] / 1000:.3f} GHz" if m else NA,
    }  # fmt: skip


SECTIONS: dict[str, tuple[str, Callable[[CardFacts], Rows]]] = {
    "system": ("System Info", system), "version": ("Version", version), "board": ("Board", board),
    "core": ("Core", core), "thermal": ("Thermal", thermal), "memory": ("Memory", memory),
}  # fmt: skip


def section(title: str, rows: Rows, depth: int) -> None:
    """A title and its rows, 4 blanks per level."""
    pad = "    " * depth
    click.echo(f"\n{pad}{title}:")
    for name, value in rows.items():
        click.echo(f"{pad}    {name:<{30 - 4 * depth}} : {value}")


@click.command()
@client.cards_argument
@click.option(
    "-g", "--group", "groups", multiple=True, type=click.Choice(GROUPS), help="Only these sections."
)
@client.json_option
def command(cards: tuple[str, ...], groups: tuple[str, ...], as_json: bool) -> None:
    """Show the inventory of host and cards, in the manner of micinfo.

    Data that the emulator does not model is `Not Available`.

    \b
    Examples:
      micemu info
      micemu info mic0 -g board -g core
    """
    facts = [CardFacts(c) for c in client.cards(cards)]
    chosen = [g for g in GROUPS if g in groups] if groups else list(GROUPS)
    if as_json:
        client.emit({f.card["name"]: {g: SECTIONS[g][1](f) for g in chosen} for f in facts})
        return
    click.echo(f"micinfo Utility Log\nCreated On {time.strftime('%a %b %d %H:%M:%S %Y')}")
    if "system" in chosen and facts:
        section("System Info", system(facts[0]), 0)
    for f in facts:
        click.echo(f"\nDevice No: {f.card['name'][3:]}, Device Name: {f.card['name']} [x100]")
        for group in chosen:
            if group != "system":
                title, make = SECTIONS[group]
                section(title, make(f), 1)
