"""micemu console"""

from __future__ import annotations

import click

from mic_emu.cli import client, console_client
from mic_emu.errors import StateError
from mic_emu.wire import connect_unix


@click.command()
@click.argument("card", default="mic0", metavar="[CARD]", shell_complete=client.complete_cards)
@click.option(
    "--detach-key",
    default="^]",
    show_default=True,
    metavar="KEY",
    help="Leaves the console; 'none' for no key.",
)
def command(card: str, detach_key: str) -> None:
    """Attach to a card's console: an interactive shell on the card.

    Everything the card prints is also in the card's console.log.

    \b
    Examples:
      micemu console
      micemu console mic1 --detach-key ^A
    """
    key = console_client.parse_key(detach_key)
    devices = client.ask("vop", cards=[card])["cards"][card]
    console = next((d for d in devices if d["type"] == "console"), None)
    if console is None or console["state"] != "running":
        raise StateError(f"{card} has no running console: boot it first (micemu boot {card})")
    console_client.attach(connect_unix(console["socket"]), card, key)
