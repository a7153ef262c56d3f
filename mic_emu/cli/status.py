"""micemu status"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import NotRunning
from mic_emu.sizes import format_size
from mic_emu.version import VERSION

RESPONDER = "user-mode responder: ping, DHCP, TCP and UDP echo work; for all of TCP/IP it would take a TAP"


def failures(status: dict[str, Any], names: Iterable[str]) -> list[str]:
    """A sentence for each device of these cards that could not be brought up."""
    return [
        f"{card['name']}: device {device['type']}: {device['error']}; the rest of the card runs"
        + (
            ""
            if "micemu vop" in device["error"]
            else f" (micemu log {card['name']}, then micemu reboot {card['name']})"
        )
        for card in status["cards"]
        for device in card["devices"]
        if card["name"] in names and device["state"] == "failed" and device.get("error")
    ]


def render(status: dict[str, Any]) -> None:
    """The table that people read."""
    host = status["host"]
    click.echo(f"instance {status['instance']}: host process {host['pid']}, timing {host['timing']}")
    if host.get("version", VERSION) != VERSION:
        click.echo(f"it is micemu {host['version']}: micemu stop, then micemu boot takes {VERSION}")
    for card in status["cards"]:
        pids = card["pids"]
        note = "" if card["shutdown_status"] == "nop" else f" ({card['shutdown_status']})"
        click.echo(f"\n{card['name']}  {card['state']}{note}")
        click.echo(f"  processes  board {pids['board'] or '-'}, card OS {pids['os'] or '-'}")
        click.echo(f"  memory     {format_size(card['memory'])}, post code {card['post_code']}")
        if card["state"] in ("online", "booting"):
            spaces = card["contained"].get("namespaces") or ["none: plain processes"]
            click.echo(f"  namespaces {', '.join(spaces)}")
            addresses = card["addresses"]
            detail = "" if card["net"] == "none" else f", host {addresses['host']}, card {addresses['card']}"
            click.echo(f"  network    {card['net']}{detail}")
        if card.get("faults"):
            names = (f"{f['id']} {f['kind']} ({f['hits']})" for f in card["faults"])
            click.echo(f"  faults     {', '.join(names)}")
        for device in card["devices"]:
            extra = {k: v for k, v in device.items() if k in ("path", "size", "pty", "nbd", "error")}
            if device.get("restarts"):
                extra["restarts"] = device["restarts"]
            text = ", ".join(f"{k} {v}" for k, v in extra.items())
            if device.get("program"):
                text = "a program's own"
            if device.get("why"):
                text = f"{RESPONDER} ({device['why']})"
            click.echo(
                f"  {device['type']:<10} {device['state']:<10} pid {device['pid'] or '-'}  {text}".rstrip()
            )


def show(status: dict[str, Any], names: Sequence[str], as_json: bool) -> None:
    """Print the cards that are named; none: all."""
    status["cards"] = client.select(status["cards"], names)
    if as_json:
        client.emit(status)
    else:
        render(status)


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Show the cards, their devices and processes.

    Exit status 3 when no emulator runs. The JSON form is a contract (schema 1).

    \b
    Examples:
      micemu status
      micemu status mic1
      micemu status --json | python3 -m json.tool
    """
    try:
        status = client.ask("status")["status"]
    except NotRunning:
        if as_json:
            client.emit({"schema": 1, "host": {"pid": None}, "cards": []})
            raise click.exceptions.Exit(3) from None
        raise
    show(status, cards, as_json)
