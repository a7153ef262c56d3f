"""micemu wait"""

from __future__ import annotations

import click

from mic_emu.cli import client
from mic_emu.cosm.states import State, Status
from mic_emu.errors import WaitTimeout

STATES = [s.word for s in State]
STATUSES = [s.word for s in Status if s is not Status.NOP]
HELP = f"""Wait until cards reach a state or a shutdown status. Exit status 5 on time-out.

\b
States: {", ".join(STATES)}.
Shutdown statuses: {", ".join(STATUSES)}.

\b
Examples:
  micemu wait online
  micemu wait crashed mic0 --timeout 5
"""


@click.command(help=HELP)
@click.argument("state", type=click.Choice(STATES + STATUSES), metavar="STATE")
@client.cards_argument
@click.option(
    "--timeout",
    type=client.Seconds(),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this long.",
)
def command(state: str, cards: tuple[str, ...], timeout: float) -> None:
    """``micemu wait``."""
    if timeout <= 0:
        raise WaitTimeout(f"--timeout {timeout:g}: use a positive number of seconds")
    client.ask("wait", states=[state], cards=list(cards), timeout=timeout)
