"""micemu fault"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import UsageError
from mic_emu.faults import KINDS, WORDS, parse

SHOWN = ("id", "kind", "count", "seed", "seen", "hits", "origin", "waits")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Make a card's hardware, OS, disk or network misbehave, on purpose and repeatably.

    A fault is a filter: it looks at events of one sort (doorbells, DMA descriptors, disk requests, frames,
    heartbeats) and acts on some. Filters act in the order in which they were added, and live until they are
    removed, have acted --count times, or the emulator stops: a reset or boot of the card does not touch them.

    \b
    Examples:
      micemu fault kinds
      micemu fault add mic0 packet-loss --rate 0.1
      micemu fault list
      micemu fault remove mic0 --all
    """


def complete_kinds(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Kinds, for shell completion."""
    return [name for name in KINDS if name.startswith(incomplete)]


def word_options(f: Callable[..., Any]) -> Callable[..., Any]:
    """One option per word of the table in mic_emu/faults.py."""
    for name, word in reversed(list(WORDS.items())):
        f = click.option(f"--{name}", metavar=word.metavar, help=word.help)(f)
    return f


@command.command("add")
@client.card_argument
@click.argument("kind", metavar="KIND", shell_complete=complete_kinds)
@word_options
@client.json_option
def add(card: str, kind: str, as_json: bool, **words: Any) -> None:
    """Add a fault to a card, running or not; prints its number.

    \b
    Examples:
      micemu fault add mic0 doorbell-drop --device net --rate 0.01 --count 100 --seed 7
      micemu fault add mic0 dma-corrupt --channel 5 --after 10 --count 1
      micemu fault add mic0 disk-error --device vda --op write --rate 0.001 --errno EIO
      micemu fault add mic0 os-kill --delay 2s
      micemu fault add mic0 link --preset x100
    """
    fault = parse({"kind": kind, **words}, f"fault add {card}")
    number = client.ask("fault_add", card=card, words=fault.words())["id"]
    if as_json:
        client.emit({"id": number})
    else:
        click.echo(f"{card}: fault {number}: {fault}")


@command.command("list")
@client.cards_argument
@client.json_option
def list_faults(cards: tuple[str, ...], as_json: bool) -> None:
    """The faults of cards, and how often they have acted.

    \b
    Examples:
      micemu fault list
      micemu fault list mic0 --json
    """
    found = client.ask("fault_list", cards=list(cards))["cards"]
    if as_json:
        client.emit(found)
        return
    for card, rows in found.items():
        for row in rows:
            words = " ".join(f"{k}={v}" for k, v in row.items() if k not in SHOWN)
            if row["seed"] != row["id"] or {"rate", "jitter"} & row.keys():
                words += f" seed={row['seed']}"
            limit = f" of {row['count']}" if row["count"] else ""
            state = "  waits for its device" if row["waits"] else ""
            acted = f"acted {row['hits']}{limit}, saw {row['seen']}"
            click.echo(f"{card}  {row['id']:>3}  {row['kind']:<18} {acted:<28} {words}{state}".rstrip())


@command.command("remove")
@client.card_argument
@click.argument("numbers", nargs=-1, type=int, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All faults of the card.")
@client.json_option
def remove(card: str, numbers: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Remove faults by number. A card OS that a fault has stopped goes on.

    \b
    Examples:
      micemu fault remove mic0 1
      micemu fault remove mic0 --all
    """
    if bool(numbers) == everything:
        raise UsageError("name the faults by number (micemu fault list), or write --all")
    removed = client.ask("fault_remove", card=card, ids=list(numbers), all=everything)["removed"]
    if as_json:
        client.emit({"removed": removed})
        return
    for number, hits in removed.items():
        click.echo(f"{card}: fault {number} is gone; it acted {hits} times")


@command.command("kinds")
@client.json_option
def kinds(as_json: bool) -> None:
    """The kinds of faults and their parameters.

    \b
    Example:
      micemu fault kinds
    """
    if as_json:
        rows = {k.name: {"does": k.does, "parameters": list(k.accepts)} for k in KINDS.values()}
        client.emit(rows)
        return
    for kind in KINDS.values():
        click.echo(f"{kind.name:<19} {kind.does}")
        own = " ".join(f"--{w}" for w in kind.words)
        if own:
            click.echo(f"{'':<19} {own}")
    click.echo(f"\nAll but link also take {' '.join(f'--{w}' for w in KINDS['packet-loss'].common)}.")
