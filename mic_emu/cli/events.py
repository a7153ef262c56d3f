"""micemu events"""

from __future__ import annotations

import json

import click

from mic_emu.cli import client
from mic_emu.errors import NotRunning, UsageError


@click.command()
@click.option("--recent", is_flag=True, help="First what happened up to now (the last 1000 events).")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N events; with --recent print the last N that happened, and end.",
)
@click.option(
    "--sample",
    type=client.Seconds(min=0.1),
    metavar="SECONDS",
    help="Also the metrics, so often, as sample events.",
)
def command(recent: bool, count: int | None, sample: float | None) -> None:
    """Follow events as JSON lines (each has "schema": 1) until the emulator ends.

    \b
    Examples:
      micemu events
      micemu events --sample 5
      micemu events --recent --count 8
      micemu events --recent | jq -c 'select(.event == "state")'
    """
    if recent and count and sample:
        raise UsageError("--recent --count N ends with what has happened: leave --sample or --recent away")
    seen = 0
    channel = client.connect()  # raises when nothing runs
    try:
        with channel:
            for msg, _ in client.converse(channel, "events", recent=recent, last=count, sample=sample):
                if msg.get("done"):
                    return
                click.echo(json.dumps(msg))
                seen += 1
                if count and seen >= count:
                    return
    except NotRunning:
        return  # the emulator was stopped, and so are its events
