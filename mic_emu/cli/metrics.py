"""micemu metrics"""

from __future__ import annotations

import click

from mic_emu.cli import client


@click.command()
def command() -> None:
    """Print states, boots, crashes, devices, rings and SCIF counters as Prometheus text.

    The same text is served over HTTP on the socket metrics.sock in the run directory, and on port
    metrics_port of 127.0.0.1 when the configuration has one.

    \b
    Examples:
      micemu metrics
      curl --unix-socket $XDG_RUNTIME_DIR/micemu/default/metrics.sock http://micemu/metrics
      curl http://127.0.0.1:9464/metrics      with metrics_port = 9464
    """
    click.echo(client.ask("metrics")["text"], nl=False)
