"""micemu config"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mic_emu import config as configuration
from mic_emu.cli import client
from mic_emu.errors import NotRunning
from mic_emu.sizes import format_size

SIZES = ("memory", "disk_size", "host_memory")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Show the configuration in force.

    \b
    Examples:
      micemu config show
    """


def toml(plain: dict[str, Any]) -> str:
    """As a file that --config reads back."""

    def value(key: str, v: Any) -> str:
        if key in SIZES:
            return f'"{format_size(v)}"'
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, list):
            return json.dumps(v)
        return f"{v:#x}" if key == "device_id" else str(v) if isinstance(v, (int, float)) else f'"{v}"'

    lines = [f"{k} = {value(k, v)}" for k, v in plain.items() if k != "card"]
    for card in plain["card"]:
        lines += ["", "[[card]]", *(f"{k} = {value(k, v)}" for k, v in card.items() if k != "fault")]
        for fault in card["fault"]:
            lines += ["", "[[card.fault]]", *(f"{k} = {value(k, v)}" for k, v in fault.items())]
    return "\n".join(lines)


@command.command("show")
@click.option("--config", "path", type=click.Path(path_type=Path), help="Show what this file means instead.")
@client.json_option
def show(path: Path | None, as_json: bool) -> None:
    """The effective configuration: of the running emulator, of a file, or the defaults.

    \b
    Examples:
      micemu config show
      micemu config show --config lab.toml --json
    """
    if path is not None:
        plain = configuration.load(path).to_dict()
    else:
        try:
            plain = client.ask("config")["config"]
        except NotRunning:
            plain = configuration.load(None).to_dict()
    if as_json:
        client.emit(plain)
    else:
        click.echo(toml(plain))
