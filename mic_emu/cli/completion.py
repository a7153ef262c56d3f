"""micemu completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell; it knows commands, options and card names.

    \b
    Examples:
      micemu completion bash > ~/.local/share/bash-completion/completions/micemu
      micemu completion fish > ~/.config/fish/completions/micemu.fish
    """
    from mic_emu.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "micemu", "_MICEMU_COMPLETE").source())
