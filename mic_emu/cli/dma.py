"""micemu dma"""

from __future__ import annotations

from typing import Any

import click

from mic_emu.cli import client

ENGINE = ("descriptors", "bytes", "interrupts", "faults", "aborts")
DRIVER = ("transactions", "ring_full")  # of the host's channels; a card's driver counts for itself
HEAD = ("CH", "OWNER", "STATE", *ENGINE, *DRIVER)


@click.command()
@client.cards_argument
@client.json_option
def command(cards: tuple[str, ...], as_json: bool) -> None:
    """Show what each DMA channel has done since power-on.

    `micemu dump dma` looks into the rings, `micemu top` shows rates.

    \b
    Examples:
      micemu dma
      micemu dma mic0 --json
    """
    rows = {
        card["name"]: client.ask("dump", card=card["name"], what="dma", device=None)["dump"]
        for card in client.cards(cards)
    }
    if as_json:
        client.emit(rows)
        return
    for name, channels in rows.items():
        click.echo(f"{name}\n{table(channels)}")


def table(channels: list[dict[str, Any]]) -> str:
    """A line per channel, numbers to the right."""
    lines = [[h.replace("_", " ").upper() for h in HEAD], *map(line, channels)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    )


def line(channel: dict[str, Any]) -> list[str]:
    """Cells of one channel."""
    words = [w for w in ("halted", "active", "masked") if channel[w]] if channel["enabled"] else ["off"]
    driver = channel["driver"] or {}
    return [
        str(channel["channel"]), channel["owner"], " ".join([*(words or ["idle"]), *channel["error"]]),
        *(str(channel["engine"][k]) for k in ENGINE), *(str(driver.get(k, "-")) for k in DRIVER),
    ]  # fmt: skip
