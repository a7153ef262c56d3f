"""micemu reset"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import render


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Reset cards at once, whatever they do.

    \b
    Examples:
      micemu reset
      micemu reset mic0
    """
    status = client.ask("reset", cards=list(cards))["status"]
    if as_json:
        client.emit(status)
    else:
        render(status)
