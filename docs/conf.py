"""Sphinx configuration of the documentation site (``make docs``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import mdoc  # noqa: E402 - beside this file

from mic_emu.cli import cli  # noqa: E402

project = "micemu"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "micemu"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository beside docs/
autodoc_typehints = "signature"
autodoc_member_order = "bysource"


def _commands(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(
        command, parent, info_name=path.rsplit(" ", 1)[-1], max_content_width=100, terminal_width=100
    )
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child:
                yield from _commands(child, f"{path} {name}", context)


def _generate() -> None:
    """Pages that are made of what the program and the manual pages say."""
    sections = [f"## {path}\n\n```text\n{text}\n```\n" for path, text in _commands(cli, "micemu", None)]
    (HERE / "cli-help.md").write_text("# Help of every command\n\n" + "\n".join(sections))
    pages = [HERE / "man/man7/scif.7", *sorted(HERE.glob("man/man3/*.3"))]
    texts = [mdoc.to_markdown(p.read_text()) for p in pages if not p.read_text().startswith(".so ")]
    (HERE / "man.md").write_text("# Manual pages of libscif\n\n" + "\n".join(texts))


_generate()
