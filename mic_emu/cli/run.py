"""micemu run"""

from __future__ import annotations

import click

from mic_emu.cli import client, run_client
from mic_emu.wire import connect_unix


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("card", metavar="CARD|host", shell_complete=client.complete_cards)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARG]...")
@click.option(
    "-t/-T", "--tty/--no-tty", default=None, help="With or without a terminal (default: when we have one)."
)
def command(card: str, program: tuple[str, ...], tty: bool | None) -> None:
    """Run a program on a card, or on the emulator's host side.

    It has our stdin, stdout, stderr, working directory and signals; its exit status is ours, and
    when a signal killed it, the same signal ends this command. 127: no such program, 126: it cannot
    be executed.

    \b
    Examples:
      micemu run mic0 -- hostname
      tar c src | micemu run mic0 -- sh -c 'cat >src.tar'
      micemu run host -- ping -c 3 172.31.1.1
    """
    if program[0] == "--":
        program = program[1:]
    if not program:
        raise click.UsageError("name a program behind --")
    if card == "host":
        with client.connect() as channel:
            for msg, fds in client.converse(channel, "host_ns"):
                pass
        names = ("user", "net")
        spaces = list(zip(names, fds, strict=False)) if fds else []
        run_client.run_on_host(
            list(program), namespaces=spaces, env={"MICEMU_SCIF_SOCKET": msg["socket"], "MICEMU_NODE": "0"}
        )
    where = client.ask("run", card=card)
    status = run_client.run(connect_unix(where["socket"]), list(program), where=card, tty=tty)
    run_client.leave(status)
