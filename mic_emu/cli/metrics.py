"""micemu metrics"""

from __future__ import annotations

import click

from mic_emu.cli import client


@click.command()
def command() -> None:
    """Print states, boots, crashes, devices, rings and SCIF counters as Prometheus text.

    The same text is served over HTTP on the socket metrics.sock in the run directory.

    \b
    Examples:
      micemu metrics
      curl --unix-socket $XDG_RUNTIME_DIR/micemu/default/metrics.sock http://micemu/metrics
    """
    click.echo(client.ask("metrics")["text"], nl=False)
