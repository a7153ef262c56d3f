"""micemu pcap"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError
from mic_emu.wire import PeerClosed


@click.command()
@client.card_argument
@click.option(
    "-w",
    "--write",
    "path",
    type=click.Path(),
    required=True,
    metavar="FILE",
    help="File to write (- for stdout).",
)
@click.option(
    "--seconds",
    type=client.Seconds(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Stop after this long (default: on Ctrl-C).",
)
@client.json_option
def command(card: str, path: str, seconds: float, as_json: bool) -> None:
    """Capture a card's network traffic at the backend, both directions, for tcpdump and Wireshark.

    \b
    Examples:
      micemu pcap mic0 -w traffic.pcap
      micemu pcap mic0 -w - | tshark -r -
    """
    try:
        fd = (
            os.dup(1)
            if path == "-"
            else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        )
    except OSError as e:
        raise MicemuError(f"cannot write the capture {path}: {e.strerror}", e.errno or 0) from e
    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda *_: None)
    signal.set_wakeup_fd(wake_w)
    with client.connect() as channel:  # the capture ends with it, however we end
        answers = client.converse(channel, "capture", [fd], card=card)
        next(answers)
        os.close(fd)
        select.select([wake_r, channel], [], [], seconds or None)
        with suppress(PeerClosed):  # the next answer tells why
            channel.send({"op": "end"})
        result, _ = next(answers)
    if as_json:
        client.emit({k: result[k] for k in ("captured", "written", "dropped") if k in result})
    else:
        click.echo(
            f"{card}: {result.get('written', 0)} frames written, {result.get('dropped', 0)} lost", err=True
        )
