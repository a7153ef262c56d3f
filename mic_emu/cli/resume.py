"""micemu resume"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import render


@click.command()
@client.json_option
def command(as_json: bool) -> None:
    """Boot the cards that were online when `micemu suspend` took them down.

    \b
    Examples:
      micemu resume
    """
    status = client.ask("resume")["status"]
    if as_json:
        client.emit(status)
    else:
        render(status)
