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


def key_values(options: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE words; paths are made absolute."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, sep, value = option.partition("=")
        if not sep:
            raise UsageError(f"{option!r}: write KEY=VALUE")
        parsed[key] = value.lower() in ("1", "true", "yes") if key == "read_only" else value
    if "path" in parsed:
        parsed["path"] = os.path.abspath(parsed["path"])
    return parsed


@command.command("add")
@client.card_argument
@click.argument("words", nargs=-1, metavar="[KIND] [KEY=VALUE]...")
@click.option(
    "--backend", metavar="MODULE:CLASS", help="Your own device: a subclass of mic_emu.vop.backend.Backend."
)
@client.json_option
def add(card: str, words: tuple[str, ...], backend: str | None, as_json: bool) -> None:
    """Add a device to a running card and wait until the card drives it.

    \b
    Examples:
      micemu vop add mic0 block path=/tmp/second.img size=16M
      micemu vop add mic0 block path=/tmp/tools.img read_only=true
      micemu vop add mic0 rng
      micemu vop add mic0 --backend echo:Echo name=echo
    """
    parsed: dict[str, Any] = {}
    if backend:
        kind, options = "python", words
        parsed.update(backend=backend, folder=os.getcwd())
    elif words and "=" not in words[0]:
        kind, options = words[0], words[1:]
    else:
        raise UsageError("name the kind of device (block, rng), or --backend MODULE:CLASS")
    parsed.update(key_values(options))
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


@command.command("swap")
@client.card_argument
@click.argument("device", metavar="DEVICE")
@click.argument("options", nargs=-1, metavar="path=FILE [KEY=VALUE]...")
def swap(card: str, device: str, options: tuple[str, ...]) -> None:
    """Put another image into a disk: the card sees the disk go and a new one come.

    \b
    Example:
      micemu vop swap mic0 block path=/tmp/other.img
    """
    client.ask("vop_swap", card=card, device=device, options=key_values(options))
    click.echo(f"{card}: {device} has a new image")
