"""micemu ping"""

from __future__ import annotations

import errno
import math
import re
import subprocess
import sys
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError, StateError

INTERVAL_S = 0.2
WAIT_S = 5  # for an answer: machines are busy
NO_PING = "there is no ping program here: install iputils-ping, or boot with --net responder"


@click.command()
@client.card_argument
@click.option("--from-card", is_flag=True, help="From the card to the host instead.")
@click.option(
    "-c", "--count", type=click.IntRange(1, 1000), default=3, show_default=True, help="How many requests."
)
@click.option(
    "-W",
    "--wait",
    type=click.IntRange(1, 60),
    default=WAIT_S,
    show_default=True,
    help="Seconds for an answer.",
)
@client.json_option
def command(card: str, from_card: bool, count: int, wait: int, as_json: bool) -> None:
    """Ping across a card's virtual network, whatever its mode. Exit status 1 when an answer is missing.

    With a TAP the system's own ping runs on that side; without one the user-space responder pings.

    \b
    Examples:
      micemu ping mic0
      micemu ping mic0 --from-card
    """
    (info,) = [c for c in client.ask("status")["status"]["cards"] if c["name"] == card] or [None]
    if info is None or info["state"] != "online":
        client.ask("run", card=card)  # raises with the names that exist, or with what to do
    if info is None:
        return
    if info["net"] == "none":
        raise StateError(f"{card} has no network: boot it without --net none")
    target = info["addresses"]["host" if from_card else "card"]
    if from_card:
        rtts = from_the_card(info, target, count, wait)
    elif info["net"] == "responder":
        request = {"op": "ping", "target": target, "count": count, "interval": INTERVAL_S, "timeout": wait}
        reply = client.ask(
            "backend", card=card, device="net", request=request, limit=count * INTERVAL_S + wait + 4
        )
        rtts = reply["rtts"]
    else:
        rtts = system_ping(target, count, wait)
    lost = count - len(rtts)
    if as_json:
        client.emit(
            {
                "target": target,
                "sent": count,
                "received": len(rtts),
                "rtt_ms": [round(r * 1e3, 3) for r in rtts],
            }
        )
    else:
        times = (
            ""
            if not rtts
            else f", rtt {min(rtts) * 1e3:.3f}/{sum(rtts) / len(rtts) * 1e3:.3f}/{max(rtts) * 1e3:.3f} ms min/avg/max"
        )
        click.echo(f"{target}: {count} sent, {len(rtts)} received{times}")
    if lost:
        raise click.exceptions.Exit(1)


def arguments(target: str, count: int, wait: int) -> list[str]:
    """ping(8) that ends with the last answer. Not by -W: once there was an answer, that leaves the last one no more
    than one interval, which a busy machine does not keep. By -w it asks on when one is lost."""
    return [
        "ping",
        "-n",
        "-i",
        str(INTERVAL_S),
        "-c",
        str(count),
        "-w",
        str(math.ceil(count * INTERVAL_S) + wait),
        target,
    ]


def parse(output: str, count: int) -> list[float]:
    """Round trips in seconds of the first ``count`` requests, from the output of ping(8)."""
    found = {int(n): float(ms) / 1e3 for n, ms in re.findall(r"seq=(\d+) .*time=([\d.]+)", output)}
    return [s for n, s in sorted(found.items()) if n <= count]


def system_ping(target: str, count: int, wait: int) -> list[float]:
    """ping(8) inside the emulator's own namespaces. Raises MicemuError when there is no such program."""
    with client.connect() as channel:
        for _, fds in client.converse(channel, "host_ns"):
            pass
    argv = arguments(target, count, wait)
    if fds:
        code = (
            "import sys, os\nfrom mic_emu.namespaces import join\n"
            f"join([('user', {fds[0]}), ('net', {fds[1]})])\nos.execvp(sys.argv[1], sys.argv[1:])"
        )
        argv = [sys.executable, "-c", code, *argv]
    try:
        done = subprocess.run(argv, pass_fds=fds, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MicemuError(NO_PING) from None
    if "No such file" in done.stderr:
        raise MicemuError(NO_PING)
    return parse(done.stdout, count)


def from_the_card(card: dict[str, Any], target: str, count: int, wait: int) -> list[float]:
    """From the card's side: the responder of its network driver, or the card's own ping program."""
    reply = client.ask_card(card, "ping", target=target, count=count, interval=INTERVAL_S, timeout=wait)
    if "rtts" in reply:
        return list(reply["rtts"])
    if reply["errno"] != errno.EOPNOTSUPP:
        raise MicemuError(f"{card['name']}: {reply['error']}", reply["errno"])
    argv = arguments(target, count, wait)
    micemu = [sys.executable, "-m", "mic_emu.cli", "--instance", client.rundir().instance]
    done = subprocess.run(
        [*micemu, "run", card["name"], "--", *argv], capture_output=True, text=True, check=False
    )
    if done.returncode == 127:
        raise MicemuError(
            "there is no ping program on the card: install iputils-ping, or boot with --net responder"
        )
    return parse(done.stdout, count)
