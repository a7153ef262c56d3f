"""micemu smc"""

from __future__ import annotations

import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.ras import set_systools, systools
from mic_emu.cosm import tools_proto as P
from mic_emu.errors import MicemuError, UsageError

NA = "Not Available"
SAMPLE_MS = 100  # between the two looks at the cores' counters
Card = dict[str, Any]
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Setting:
    """A bit of a card; ``change``: the request that sets it, None: for reading only."""

    title: str
    kind: int
    at: int  # byte of the payload that holds it
    change: int | None


SETTINGS = {
    "ecc": Setting("ECC", P.MEMORY_INFO, 16, None),
    "led": Setting("LED Alert", P.DIAGNOSTICS, 0, P.SET_LED),
    "turbo": Setting("Turbo Mode", P.TURBO, 0, P.SET_TURBO),
}
NOT_HERE = ("corec6", "cpufreq", "pc3", "pc6")  # power states of real silicon


def answer(card: str, kind: int) -> bytes:
    """A payload. Raises MicemuError when the card refuses it."""
    got = systools(card, kind)
    if got is None:
        raise MicemuError(f"{card}: systoolsd does not know request {kind:#04x}")
    return got


def information(card: str) -> Rows:
    d, c = P.DEVICE_INFO_BODY.unpack(answer(card, P.DEVICE_INFO)), P.CORES_BODY.unpack(answer(card, P.CORES))
    config = client.ask("sysfs_read", path=f"class/mic/{card}/device/device")["data"].strip()
    stepping = client.ask("sysfs_read", path=f"class/mic/{card}/stepping")["data"].strip()
    words = [raw.partition(b"\0")[0].decode(errors="replace") or NA for raw in (d[9], d[10])]
    return [
        ("Device Series", "Intel(R) Xeon Phi(TM) coprocessor x100 family (emulated)"), ("Device ID", config),
        ("Number Of Cores", str(c[0])), ("Coprocessor OS Version", words[0]), ("Flash Version", words[1]),
        ("Driver Version", f"micemu {client.ask('status')['status']['host']['version']}"),
        ("Stepping", stepping), ("Substepping", NA),
    ]  # fmt: skip


def temperatures(_: str) -> Rows:
    return [
        (name, NA) for name in ("Cpu Temp", "Memory Temp", "Fan-In Temp", "Fan-Out Temp", "Core Rail Temp")
    ]


def frequency(card: str) -> Rows:
    cores = P.CORES_BODY.unpack(answer(card, P.CORES))
    return [("Core Frequency", f"{cores[1] / 1000:.2f} GHz"), ("Total Power", NA)]


def memory(card: str) -> Rows:
    total, used, free = P.MEMORY_USE_BODY.unpack(answer(card, P.MEMORY_USE))[:3]
    words = (("Free Memory", free), ("Total Memory", total), ("Memory Usage", used))
    return [(name, f"{kilobytes / 1024:.2f} MB") for name, kilobytes in words]


def core_times(card: str) -> list[tuple[int, ...]]:
    """user, nice, system, idle, total ticks: the sum, then each logical core."""
    raw = answer(card, P.CORE_USE)[P.CORE_USE_HEAD.size :]
    return list(P.CORE_USE_ROW.iter_unpack(raw[: len(raw) - len(raw) % P.CORE_USE_ROW.size]))


def cores(card: str) -> Rows:
    before = core_times(card)
    select.select([], [], [], SAMPLE_MS / 1000)  # the sample's length, not a wait for something
    rows = []
    for n, (a, b) in enumerate(zip(before, core_times(card), strict=False)):
        user, nice, system, idle, total = (max(y - x, 0) for x, y in zip(a, b, strict=True))
        share = [f"{100 * v / total if total else 0:6.2f}%" for v in (user + nice, system, idle)]
        name = "Total Utilization" if n == 0 else f"Core #{n:03}"
        rows.append((name, f"User: {share[0]}, System: {share[1]}, Idle: {share[2]}"))
    return rows


SECTIONS: dict[str, tuple[str, Callable[[str], Rows]]] = {
    "info": ("Coprocessor Information", information), "temp": ("Thermal Information", temperatures),
    "freq": ("Observed Frequency and Power Usage", frequency), "mem": ("Memory Usage", memory),
    "cores": ("Core Utilization", cores),
}  # fmt: skip


def settings(names: str) -> list[str]:
    """``ecc,led`` or ``all``. Raises UsageError."""
    chosen = list(SETTINGS) if names == "all" else names.split(",")
    for name in chosen:
        if name in NOT_HERE:
            raise UsageError(f"{name} belongs to real silicon and cannot be emulated")
        if name not in SETTINGS:
            raise UsageError(f"{name!r} is no setting: use {', '.join(SETTINGS)} or all")
    return chosen


def each(cards: list[Card], show: Callable[[str], None]) -> None:
    """``show`` every card that is online; one that is not, or fails, is an error, and the next one follows."""
    failed = False
    for card in cards:
        try:
            if card["state"] != "online":
                raise MicemuError(f"{card['name']} is {card['state']}, not online")
            click.echo(f"\n{card['name']}:")
            show(card["name"])
        except MicemuError as e:
            click.echo(f"micemu: {e}", err=True)
            failed = True
    if failed:
        raise click.exceptions.Exit(1)


def rows_of(title: str, rows: Rows) -> None:
    click.echo(f"   {title}:")
    for name, value in rows:
        click.echo(f"      {name:<25}: {value}")


@click.group()
def command() -> None:
    """Live data and settings of cards, in the manner of micsmc.

    Exit status 1 when a card is not online or refuses; the others are shown.

    \b
    Examples:
      micemu smc show-data
      micemu smc show-data --mem --cores mic0
      micemu smc enable led mic0
    """


@command.command("show-data")
@client.cards_argument
@click.option("-i", "--info", "chosen", flag_value="info", multiple=True, help="Coprocessor information.")
@click.option("-t", "--temp", "chosen", flag_value="temp", multiple=True, help="Temperatures.")
@click.option("-f", "--freq", "chosen", flag_value="freq", multiple=True, help="Frequency and power.")
@click.option("-m", "--mem", "chosen", flag_value="mem", multiple=True, help="Memory usage.")
@click.option("-c", "--cores", "chosen", flag_value="cores", multiple=True, help="Utilisation of the cores.")
@click.option("-a", "--all", "chosen", flag_value="all", multiple=True, help="Everything (the default).")
@click.option("--online", is_flag=True, help="Only list the cards that are online.")
@click.option("--offline", is_flag=True, help="Only list the others.")
def show_data(cards: tuple[str, ...], chosen: tuple[str, ...], online: bool, offline: bool) -> None:
    """Show live data; what the emulator does not model is Not Available.

    \b
    Examples:
      micemu smc show-data --freq
      micemu smc show-data --online
    """
    rows = client.cards(cards)
    for wanted, title in ((online, "Online"), (offline, "Offline")):
        if wanted:
            names = [c["name"] for c in rows if (c["state"] == "online") == (title == "Online")]
            click.echo(f"{title} Cards: {', '.join(names) or 'None'}")
    if online or offline:
        return
    names = list(SECTIONS) if not chosen or "all" in chosen else [n for n in SECTIONS if n in chosen]

    def show(card: str) -> None:
        for name in names:
            title, make = SECTIONS[name]
            rows_of(title, make(card))

    each(rows, show)


@command.command("show-settings")
@click.argument("names", metavar="LIST")
@client.cards_argument
def show_settings(names: str, cards: tuple[str, ...]) -> None:
    """Show settings: ecc, led, turbo, a list with commas, or all.

    \b
    Examples:
      micemu smc show-settings all
    """
    chosen = settings(names)

    def show(card: str) -> None:
        for name in chosen:
            s = SETTINGS[name]
            on = answer(card, s.kind)[s.at]
            click.echo(f"   {s.title:<25}: {'enabled' if on else 'disabled'}")

    each(client.cards(cards), show)


def change(names: str, cards: tuple[str, ...], value: int) -> None:
    chosen = settings("led,turbo" if names == "all" else names)

    def act(card: str) -> None:
        for name in chosen:
            s = SETTINGS[name]
            if s.change is None:
                raise MicemuError(f"{card}: {name} can only be read")
            set_systools(card, s.change, value)
            click.echo(f"   {s.title:<25}: Successful")

    each(client.cards(cards), act)


@command.command()
@click.argument("names", metavar="LIST")
@client.cards_argument
def enable(names: str, cards: tuple[str, ...]) -> None:
    """Switch led or turbo on; the bit is kept as long as the card's OS runs.

    \b
    Examples:
      micemu smc enable led,turbo mic0
    """
    change(names, cards, 1)


@command.command()
@click.argument("names", metavar="LIST")
@client.cards_argument
def disable(names: str, cards: tuple[str, ...]) -> None:
    """Switch led or turbo off.

    \b
    Examples:
      micemu smc disable turbo
    """
    change(names, cards, 0)
