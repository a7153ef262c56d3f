"""micemu reboot"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import show


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Shut cards down and boot them again with the same image.

    \b
    Examples:
      micemu reboot
      micemu reboot mic0
    """
    status = client.ask("reboot", cards=list(cards))["status"]
    show(status, cards, as_json)
