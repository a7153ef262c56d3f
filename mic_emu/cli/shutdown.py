"""micemu shutdown"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import show


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Power cards off in order and wait until they are ready again.

    \b
    Examples:
      micemu shutdown
      micemu shutdown mic0
    """
    status = client.ask("shutdown", cards=list(cards))["status"]
    show(status, cards, as_json)
