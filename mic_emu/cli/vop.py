"""micemu vop"""

from __future__ import annotations

import os
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """List, add and remove virtio devices while cards run."""


@command.command("list")
@client.cards_argument
@client.json_option
def list_devices(cards: tuple[str, ...], as_json: bool) -> None:
    """Devices of cards.

    \b
    Example:
      micemu vop list mic0
    """
    found = client.ask("vop", cards=list(cards))["cards"]
    if as_json:
        client.emit(found)
        return
    for name, devices in found.items():
        for d in devices:
            click.echo(f"{name}  {d['type']:<10} {d['state']:<10} pid {d['pid'] or '-'}")


@command.command("add")
@client.card_argument
@click.argument("kind", metavar="KIND")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@client.json_option
def add(card: str, kind: str, options: tuple[str, ...], as_json: bool) -> None:
    """Add a device to a running card and wait until the card drives it.

    \b
    Examples:
      micemu vop add mic0 block path=/tmp/second.img size=16M
      micemu vop add mic0 block path=/tmp/tools.img read_only=true
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, sep, value = option.partition("=")
        if not sep:
            raise UsageError(f"{option!r}: write KEY=VALUE")
        parsed[key] = value.lower() in ("1", "true", "yes") if key == "read_only" else value
    if "path" in parsed:
        parsed["path"] = os.path.abspath(parsed["path"])
    name = client.ask("vop_add", card=card, kind=kind, options=parsed)["device"]
    if as_json:
        client.emit({"device": name})
    else:
        click.echo(f"{card}: {name} is up")


@command.command("remove")
@client.card_argument
@click.argument("device", metavar="DEVICE")
def remove(card: str, device: str) -> None:
    """Remove a device from a running card.

    \b
    Example:
      micemu vop remove mic0 block1
    """
    client.ask("vop_remove", card=card, device=device)
