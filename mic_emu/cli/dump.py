"""micemu dump"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.log import clock, harmless
from mic_emu.fields import words
from mic_emu.layout import CONSTANTS as C

SHOWN = 4  # waiting chains of a ring, without --all
WHAT = ("registers", "page", "vring", "smpt", "interrupts", "lines", "dma", "debugfs", "log")


@click.command()
@click.argument("what", type=click.Choice(WHAT))
@click.argument("card", default="mic0", metavar="[CARD]", shell_complete=client.complete_cards)
@click.option("--device", metavar="NAME", help="Only this device (vring): block, net, virtio2@128, ...")
@click.option("--all", "everything", is_flag=True, help="Also what is 0 or unused, and every waiting chain.")
@client.json_option
def command(what: str, card: str, device: str | None, everything: bool, as_json: bool) -> None:
    """Look into a card: registers, device page, vrings, address map, interrupt vectors to the host and lines to
    the card, DMA channels, the real drivers' debug files, kernel log.

    Works in every state; the log of a dead card stays readable until its reset. Its times are local time; --json and
    the file log_buf have it as it lies in card memory, with seconds since 1970.

    \b
    Examples:
      micemu dump registers
      micemu dump page mic1 --json
      micemu dump log mic0
    """
    data = client.ask("dump", card=card, what=what, device=device)["dump"]
    if as_json:
        client.emit(data)
    elif isinstance(data, str):
        click.echo(kernel_log(data) if what == "log" else data, nl=False)
    else:
        views: dict[str, Callable[[Any, bool], None]] = {
            "registers": registers, "page": page, "vring": vrings, "smpt": smpt,
            "interrupts": interrupts, "lines": lines, "dma": channels,
        }  # fmt: skip
        views[what](data, everything)


def kernel_log(data: str) -> str:
    """The card's kernel log with times as ``micemu log`` shows them."""
    return re.sub(r"^\[(\d+\.\d{6})\]", lambda m: clock(float(m[1])), harmless(data, "\n\t"), flags=re.M)


def registers(rows: list[dict[str, Any]], everything: bool) -> None:
    """One register a line."""
    for r in rows:
        if r["value"] or everything:
            meaning = words(r["fields"]) or r["doc"]
            click.echo(f"{r['offset']:#07x}  {r['name']:<14} {r['value']:#010x}  {meaning}")


def page(data: dict[str, Any], everything: bool) -> None:
    """Boot parameters, then a block per slot."""
    for name, value in data["bootparam"].items():
        click.echo(f"{name:<20} {value:#x}" if value >= 0 else f"{name:<20} {value}")
    for slot in data["slots"]:
        status = " ".join(slot["status_words"])
        click.echo(
            f"\nslot at {slot['offset']}: {slot['device']} (type {slot['type']}), status {slot['status']:#x} {status}".rstrip()
        )
        for side in ("host", "guest"):
            click.echo(
                f"  {side:<10} {slot[side + '_features']} {' '.join(slot[side + '_feature_words'])}".rstrip()
            )
        click.echo(f"  config     {slot['config']}")
        for i, ring in enumerate(slot["rings"]):
            click.echo(
                f"  ring {i}     address {ring['address']:#x} used {ring['used_address']:#x} num {ring['num']}"
            )
        click.echo("  control    " + " ".join(f"{k}={v}" for k, v in slot["control"].items()))


def vrings(rows: list[dict[str, Any]], everything: bool) -> None:
    """Indices and pending chains."""
    for r in rows:
        name = f"{r['name']} ({r['device']})" if r["name"] else r["device"]
        click.echo(
            f"{name} ring {r['ring']}: num {r['num']}, avail {r['avail_idx']}, used {r['used_idx']}, "
            f"{len(r['pending'])} pending"
        )
        for chain in r["pending"] if everything else r["pending"][:SHOWN]:
            click.echo("    " + " -> ".join(descriptor(d) for d in chain))
        if not everything and len(r["pending"]) > SHOWN:
            click.echo(f"    and {len(r['pending']) - SHOWN} more (--all)")


def descriptor(d: dict[str, Any]) -> str:
    """``[index] address+length``, ``w`` for writable; an indirect table in braces."""
    text = f"[{d['index']}] {d['addr']:#x}+{d['len']}{' w' if d['flags'] & C['VRING_DESC_F_WRITE'] else ''}"
    return text + (" {" + " -> ".join(descriptor(e) for e in d["table"]) + "}" if "table" in d else "")


def lines(rows: list[dict[str, Any]], everything: bool) -> None:
    """A line of the card a line."""
    for r in rows:
        if r["count"] or everything:
            click.echo(f"{r['name']:<12} {r['count']:>10}")


def interrupts(rows: list[dict[str, Any]], everything: bool) -> None:
    """One vector a line."""
    for r in rows:
        if r["users"] or r["mxar"] or everything:
            masked = ", masked" if r["masked"] and r["mode"] == "msix" else ""
            click.echo(
                f"{r['mode']} {r['vector']}: {r['count']} sent, sources {r['sources'] or '-'}{masked}  {', '.join(r['users'])}"
            )


def channels(rows: list[dict[str, Any]], everything: bool) -> None:
    """A DMA channel a line, its waiting descriptors below."""
    for r in rows:
        if not (r["enabled"] or r["error"] or everything):
            continue
        flags = [w for w in ("enabled", "masked", "active", "halted") if r[w]] + r["error"]
        click.echo(
            f"channel {r['channel']} ({r['owner']}): head {r['head']}, tail {r['tail']}, count {r['count']} of "
            f"{r['size']} at {r['ring']:#x}  {' '.join(flags)}"
        )
        for who in ("engine", "driver"):
            if r[who]:
                click.echo(f"    {who}: " + "  ".join(f"{k} {v}" for k, v in r[who].items()))
        for d in r["waiting"]:
            click.echo(
                "    "
                + " ".join(f"{k} {v:#x}" if k in ("src", "dst", "value") else f"{v}" for k, v in d.items())
            )


def smpt(rows: list[dict[str, Any]], everything: bool) -> None:
    """One entry of the address map a line."""
    for r in rows:
        if everything or r["refs"]:
            click.echo(
                f"entry {r['index']:>2}: host address {r['host_addr']:#x}, {r['refs']} bytes mapped, register {r['register']:#x}"
            )
