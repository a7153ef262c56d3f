"""micemu bench"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError

PARTS = ("boot", "block", "net", "dma", "scif", "vsock")


def run(part: str, scale: float) -> list[dict[str, Any]]:
    """Figures of one part."""
    rows: list[dict[str, Any]] = importlib.import_module(f"mic_emu.bench.{part}").rows(scale)
    return [{"part": part, **row} for row in rows]


def notes(part: str) -> list[str]:
    """What a part could not measure, and how to get it."""
    found: list[str] = getattr(importlib.import_module(f"mic_emu.bench.{part}"), "notes", list)()
    return found


def line(row: dict[str, Any]) -> str:
    """One figure as text."""
    bar = f"   bar {row['bar']}" if row.get("bar") else ""
    figures = f"{row['value']:>10.5g} {row['unit']:<10} limit {row['limit']:>10.5g}  ratio {row['ratio']:.3g}"
    return f"{row['name']:<52} {figures}{bar}"


def available() -> list[str]:
    """Parts that this version can measure."""
    return [p for p in PARTS if importlib.util.find_spec(f"mic_emu.bench.{p}")]


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Longer (2) or shorter (0.5) measurements."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also write the JSON here.")
@client.json_option
def command(parts: tuple[str, ...], scale: float, output: Path | None, as_json: bool) -> None:
    """Measure speed beside a limit of this machine, in one run: boot, block, net, dma, scif, vsock.

    Each row has our figure, the limit measured in the same run, and their ratio. Uses instances of its own.

    \b
    Examples:
      micemu bench boot
      micemu bench block net --output figures.json
    """
    known = available()
    for part in parts:
        if part not in known:
            raise click.UsageError(f"no part {part!r} to measure: use {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    for part in parts or known:
        if not as_json:
            click.echo(f"{part} ...", err=True)
        try:
            found = run(part, scale)
        except (OSError, AssertionError) as e:
            raise MicemuError(f"bench {part}: {e}") from e
        rows += found
        remarks += notes(part)
        for r in [] if as_json else found:
            click.echo(line(r))
    for remark in [] if as_json else remarks:
        click.echo(remark, err=True)
    result = {
        "schema": 1,
        "time": time.time(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rows": rows,
        "notes": remarks,
    }
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        client.emit(result)
