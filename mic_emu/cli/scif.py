"""micemu scif"""

from __future__ import annotations

from pathlib import Path

import click

import mic_emu
from mic_emu.cli import client
from mic_emu.errors import MicemuError


def package_folder(name: str) -> Path:
    """``include`` or ``lib`` of the installed package. Raises MicemuError when it was not built."""
    path = Path(mic_emu.__file__).resolve().parent / name
    if not path.is_dir():
        raise MicemuError(f"{path} is missing: build the package (make build)")
    return path


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cflags", is_flag=True, help="Compiler flags for programs that include <scif.h>.")
@click.option("--libs", is_flag=True, help="Linker flags for libscif; the program finds it where it is now.")
@click.pass_context
def command(ctx: click.Context, cflags: bool, libs: bool) -> None:
    """SCIF: build programs, look at nodes.

    \b
    Examples:
      gcc $(micemu scif --cflags) prog.c -o prog $(micemu scif --libs)
      micemu scif nodes
    """
    words = []
    if cflags:
        words.append(f"-I{package_folder('include')}")
    if libs:
        folder = package_folder("lib")
        words += [f"-L{folder}", "-lscif", f"-Wl,-rpath,{folder}"]
    if words:
        click.echo(" ".join(words))
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command("nodes")
@client.json_option
def nodes(as_json: bool) -> None:
    """Nodes that are online now, and their cards.

    \b
    Example:
      micemu scif nodes
    """
    status = client.ask("status")["status"]
    rows = [{"node": 0, "name": "host"}]
    rows += [{"node": int(c["name"][3:]) + 1, "name": c["name"]} for c in status["cards"] if c["state"] == "online"]
    if as_json:
        client.emit(rows)
    else:
        for row in rows:
            click.echo(f"{row['node']:>3}  {row['name']}")
