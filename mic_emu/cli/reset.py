"""micemu reset"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import show


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Reset cards, whatever they do. One that hangs takes seconds: the host waits for its answers first.

    \b
    Examples:
      micemu reset
      micemu reset mic0
    """
    status = client.ask("reset", cards=list(cards))["status"]
    show(status, cards, as_json)
