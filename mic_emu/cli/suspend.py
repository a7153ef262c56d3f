"""micemu suspend"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cli.status import render


@click.command()
@click.option(
    "--timeout",
    type=client.Seconds(min=0),
    metavar="SECONDS",
    help="How long a card may take until it is reset.",
)
@client.json_option
def command(timeout: float | None, as_json: bool) -> None:
    """Take every card down before the host sleeps; never refused.

    Cards that are online are shut down in order, what still runs then is reset. `micemu resume` boots
    again what was online.

    \b
    Examples:
      micemu suspend
      micemu suspend --timeout 5
    """
    answer = client.ask("suspend", timeout=timeout)
    if as_json:
        client.emit({"suspended": answer["suspended"], **answer["status"]})
    else:
        render(answer["status"])
