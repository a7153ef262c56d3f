"""micemu shell"""

from __future__ import annotations

import os

import click

from mic_emu.cli import client, run_client
from mic_emu.wire import connect_unix

# A login shell's profile sets PATH anew; the card's own poweroff and reboot come first nevertheless.
_LOGIN = 'first=${PATH%%:*}; [ -r /etc/profile ] && . /etc/profile; PATH="$first:$PATH"; exec "$SHELL" -i'


@click.command()
@client.card_argument
@click.option("-c", "script", metavar="COMMAND", help="Run this and leave.")
def command(card: str, script: str | None) -> None:
    """Log in to a card: an interactive shell with a terminal of its own.

    The exit status is the shell's.

    \b
    Examples:
      micemu shell mic0
      micemu shell mic0 -c 'uname -a; uptime'
    """
    where = client.ask("run", card=card)
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    argv = [shell, "-c", script] if script is not None else ["/bin/sh", "-c", _LOGIN]
    env = {**os.environ, "SHELL": shell}
    status = run_client.run(connect_unix(where["socket"]), argv, where=card, env=env)
    run_client.leave(status)
