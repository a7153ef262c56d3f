"""micemu check"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.ping import WAIT_S, from_the_card
from mic_emu.cli.ras import ras, systools
from mic_emu.cosm import tools_proto as P
from mic_emu.errors import MicemuError, NotRunning

X100_IDS = range(0x2250, 0x225F)
Card = dict[str, Any]


class Failed(Exception):
    """A test failed; the text says what was found."""


def card_list(text: str) -> list[str]:
    """``mic0``, ``mic0,mic2``, ``mic0-mic3``; none for ``all``. Raises click.BadParameter."""
    names: list[str] = []
    for word in text.split(","):
        first, dash, last = word.partition("-")
        ends = [first, last] if dash else [first]
        if word == "all":
            return []
        if not all(re.fullmatch(r"mic[0-9]{1,3}", e) for e in ends):
            raise click.BadParameter(f"{word!r} is no card or range of cards", param_hint="-d")
        names += [f"mic{n}" for n in range(int(ends[0][3:]), int(ends[-1][3:]) + 1)]
    return names


# --- the host ---------------------------------------------------------------------------------------


def _word(card: str, name: str) -> int:
    return int(client.ask("sysfs_read", path=f"class/mic/{card}/device/{name}")["data"], 16)


def pci_functions(cards: list[Card]) -> None:
    found = [
        c for c in cards if _word(c["name"], "vendor") == 0x8086 and _word(c["name"], "device") in X100_IDS
    ]
    if not found:
        raise Failed("no devices detected")
    if len(found) != len(cards):
        raise Failed(f"{len(cards) - len(found)} of {len(cards)} functions are no MIC X100")


def drivers(cards: list[Card]) -> None:
    files = client.ask("sysfs_list")["files"]
    missing = [d for d in ("mic_cosm", "mic_host") if not any(f"debug/{d}/" in f for f in files)]
    if missing:
        raise Failed(f"drivers not loaded: {', '.join(missing)}")


def driver_cards(cards: list[Card]) -> None:
    paths = client.ask("sysfs_list")["files"]
    seen = {p.split("/")[2] for p in paths if p.startswith("class/mic/mic") and p.endswith("/state")}
    if seen != {c["name"] for c in cards}:
        raise Failed(f"the driver sees {len(seen)} devices, the system {len(cards)}")


def daemon(cards: list[Card]) -> None:
    try:
        client.ask("status")
    except MicemuError as e:
        raise Failed(f"the host process does not answer: {e}") from e


# --- one card ---------------------------------------------------------------------------------------


def state(card: Card) -> None:
    if card["state"] != "online":
        note = "" if card["shutdown_status"] == "nop" else f" ({card['shutdown_status']})"
        raise Failed(f"the device is in state {card['state']}{note}, not online")
    if card["post_code"] != "FF":
        raise Failed(f"POST code is {card['post_code']}, not FF")


def systoolsd(card: Card) -> None:
    got = systools(card["name"], P.INFO)
    if got is None or tuple(got) != P.SYSTOOLS_VERSION:
        raise Failed(f"systoolsd answers {got!r} instead of version 2.7")


def ras_daemon(card: Card) -> None:
    if ras(card["name"], P.RAS_HARDWARE) is None:
        raise Failed("the RAS service refuses to tell the hardware")


def devices(card: Card) -> None:
    """Those of programs are the programs' business: nobody promised a driver for them."""
    rows = [d for d in card["devices"] if not d.get("program")]
    down = [f"{d['type']} is {d['state']}" for d in rows if d["state"] != "running"]
    if down:
        raise Failed("; ".join(down))


def console(card: Card) -> None:
    for device in card["devices"]:
        if device["type"] == "console":
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.settimeout(3.0)
                    sock.connect(device["socket"])
                return
            except OSError as e:
                raise Failed(f"the console does not take a connection: {e}") from e
    raise Failed("the card has no console")


def ping(card: Card) -> None:
    if card["net"] == "none":
        raise Failed("the card has no network")
    if not from_the_card(card, card["addresses"]["host"], 1, WAIT_S):
        raise Failed("the host does not answer a ping from the card")


HOST_TESTS: list[tuple[str, Callable[[list[Card]], None]]] = [
    ("Check number of devices the OS sees in the system", pci_functions),
    ("Check required drivers are loaded", drivers),
    ("Check number of devices driver sees in the system", driver_cards),
    ("Check mpssd daemon is running", daemon),
]
CARD_TESTS: list[tuple[str, Callable[[Card], None]]] = [
    ("Check device state and POST code", state),
    ("Check systoolsd is running in device", systoolsd),
    ("Check RAS daemon is available in device", ras_daemon),
    ("Check virtio devices are running", devices),
    ("Check console takes connections", console),
]
PING = ("Check device can ping host", ping)


class Report:
    """Prints the lines of the tests and remembers whether one failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def run(self, number: int, line: str, where: str, test: Callable[[], None], quiet: bool) -> bool:
        """One test; False when it failed."""
        label = f"  Test {number}{f' ({where})' if where else ''}: {line} ... "
        why = ""
        try:
            test()
        except (Failed, MicemuError, OSError) as e:
            why = str(e)
            self.failures.append(f"{where or 'host'}: {line}: {why}")
        self.rows.append({"test": number, "card": where or None, "name": line, "pass": not why, "why": why})
        if not quiet:
            click.echo(label + ("fail" if why else "pass"))
            if why:
                click.echo(f"    {why}", err=True)
        return not why


@click.command()
@click.option(
    "-d", "--device", "device", default="all", metavar="LIST", help="mic0, mic0,mic2, mic0-mic3 or all."
)
@click.option("-p", "--ping", "with_ping", is_flag=True, help="Also let each card ping the host.")
@click.option("-v", "--verbose", is_flag=True, help="Accepted for miccheck's sake.")
@client.json_option
def command(device: str, with_ping: bool, verbose: bool, as_json: bool) -> None:
    """Check host and cards, in the manner of miccheck. Exit status 1 when a test fails.

    \b
    Examples:
      micemu check
      micemu check -d mic0-mic1 --ping
    """
    names = card_list(device)
    report = Report()
    try:
        cards = client.ask("status")["status"]["cards"]
    except NotRunning as e:
        why = str(e)
        cards, names = [], []
        report.run(0, HOST_TESTS[0][0], "", lambda: _not_running(why), as_json)
    else:
        client.select(cards, names)
        _run(report, cards, names, with_ping, as_json)
    if as_json:
        client.emit({"ok": not report.failures, "tests": report.rows})
    else:
        click.echo("\nStatus: " + ("FAIL" if report.failures else "OK"))
        for failure in report.failures:
            click.echo(f"Failure: {failure}", err=True)
    sys.stdout.flush()
    raise click.exceptions.Exit(1 if report.failures else 0)


def _not_running(why: str) -> None:
    raise Failed(why)


def _run(report: Report, cards: list[Card], names: list[str], with_ping: bool, quiet: bool) -> None:
    """Host tests up to the first failure, then each card's up to its first failure."""
    say = (lambda text: None) if quiet else click.echo
    say("Executing default tests for host")
    for number, (line, host_test) in enumerate(HOST_TESTS):
        if not report.run(number, line, "", lambda t=host_test: t(cards), quiet):  # type: ignore[misc]
            return
    tests = [*CARD_TESTS, PING] if with_ping else CARD_TESTS
    for card in [c for c in cards if not names or c["name"] in names]:
        say(f"Executing default tests for device: {card['name']}")
        for number, (line, test) in enumerate(tests, len(HOST_TESTS)):
            if not report.run(number, line, card["name"], lambda t=test, c=card: t(c), quiet):  # type: ignore[misc]
                break
