"""micemu vop"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.flags import compiler_flags
from mic_emu.errors import MicemuError, UsageError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cflags", is_flag=True, help="Compiler flags for programs that include <mic_vop.h>.")
@click.option(
    "--libs", is_flag=True, help="Linker flags for libmicvop; the program finds it where it is now."
)
@click.pass_context
def command(ctx: click.Context, cflags: bool, libs: bool) -> None:
    """List, add and remove virtio devices while cards run; flags for backends in C.

    \b
    Examples:
      micemu vop list
      cc upper.c $(micemu vop --cflags --libs) -o upper
    """
    words = compiler_flags("micvop", cflags, libs)
    if words:
        click.echo(" ".join(words))
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


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


def module_folder(name: str) -> str:
    """Where the module of MODULE:CLASS is for whoever called us: here, else a folder of $PYTHONPATH. The processes that
    import it have neither our working directory nor our environment. Here when it is in none: their own path is left."""
    top = name.partition(":")[0].partition(".")[0]
    here = os.getcwd()
    for folder in (here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
        if top and PathFinder.find_spec(top, [folder]):
            return os.path.abspath(folder)
    return here


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
@click.option("--driver", metavar="MODULE:CLASS", help="Your driver for it: the card OS loads it first.")
@client.json_option
def add(
    card: str, words: tuple[str, ...], backend: str | None, driver: str | None, as_json: bool
) -> None:  # fmt: skip
    """Add a device to a running card and wait until the card drives it.

    Your modules are looked for in this directory, in $PYTHONPATH, then in the emulator's Python path.

    \b
    Examples:
      micemu vop add mic0 block path=/tmp/second.img size=16M
      micemu vop add mic0 block path=/tmp/tools.img read_only=true
      micemu vop add mic0 rng
      micemu vop add mic0 vsock
      micemu vop add mic0 --backend echo:Echo name=echo
      micemu vop add mic0 --backend echo:Echo --driver echo_driver:EchoDriver
    """
    parsed: dict[str, Any] = {}
    if backend:
        kind, options = "python", words
        parsed.update(backend=backend, folder=module_folder(backend))
    elif words and "=" not in words[0]:
        kind, options = words[0], words[1:]
    else:
        raise UsageError("name the kind of device (block, rng, vsock), or --backend MODULE:CLASS")
    parsed.update(key_values(options))
    if driver:
        load_driver(card, driver)
    name = client.ask("vop_add", card=card, kind=kind, options=parsed)["device"]
    if as_json:
        client.emit({"device": name})
    else:
        click.echo(f"{card}: {name} is up")


def load_driver(card: str, driver: str) -> None:
    """Have the card OS load a driver; it serves devices that come from now on."""
    answer = client.ask_card(client.cards([card])[0], "driver", driver=driver, folder=module_folder(driver))
    if "error" in answer:
        raise MicemuError(f"{card}: {answer['error']}", answer["errno"] or 0)


@command.command("driver")
@client.card_argument
@click.argument("driver", metavar="MODULE:CLASS")
def load(card: str, driver: str) -> None:
    """Load your own driver into a running card: a subclass of mic_emu.vop.Driver.

    It serves devices of its type that are added from now on (of a backend in C, for example), until the
    card goes down. Loading it again takes the module's present text.

    \b
    Example:
      micemu vop driver mic0 echo_driver:EchoDriver
    """
    load_driver(card, driver)


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
