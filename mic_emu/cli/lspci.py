"""micemu lspci"""

from __future__ import annotations

import click

from mic_emu.cli import client


@click.command()
@client.cards_argument
def command(cards: tuple[str, ...]) -> None:
    """Print the cards' PCI configuration space in the hex form that the real lspci decodes with -F.

    Works in every state of the card, like a slot that has power.

    \b
    Examples:
      micemu lspci
      micemu lspci mic0 > mic0.txt && lspci -F mic0.txt -vvv
    """
    for card in client.cards(cards):
        click.echo(client.ask("dump", card=card["name"], what="pci", device=None)["dump"])
