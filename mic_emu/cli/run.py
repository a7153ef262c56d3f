"""micemu run"""

from __future__ import annotations

import os
from typing import NoReturn

import click

from mic_emu.cli import client, run_client
from mic_emu.errors import MicemuError, UsageError
from mic_emu.wire import connect_unix


def on_host(program: list[str], sysfs: bool) -> NoReturn:
    """Become ``program`` on the emulator's host side. Raises MicemuError."""
    with client.connect() as channel:
        for msg, fds in client.converse(channel, "host_ns"):
            pass
    spaces = list(zip(("user", "net"), fds, strict=False)) if fds else []
    if spaces and os.geteuid() not in (0, msg["user"]):
        # Only their owner may enter them; SCIF needs none.
        click.echo("micemu: the emulator is another user's: its network cannot be entered", err=True)
        spaces = []
    env = {"MICEMU_SCIF_SOCKET": msg["socket"], "MICEMU_NODE": "0"}
    if not sysfs:
        run_client.run_on_host(program, namespaces=spaces, env=env)
    from mic_emu.cosm import mount
    from mic_emu.namespaces import join

    control = client.rundir().control
    join(spaces)
    os.environ.update(env)
    try:
        mount.become(program, control)
    except OSError as e:
        if isinstance(e, FileNotFoundError) and e.filename is None:  # the exec's
            raise run_client.StartFailed(f"host: {program[0]}: not found", e.errno or 0) from None
        raise MicemuError(
            f"cannot run {program[0]} with the sysfs tree: {e.strerror or e}", e.errno or 0
        ) from e


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("card", metavar="CARD|host", shell_complete=client.complete_cards)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARG]...")
@click.option(
    "-t/-T", "--tty/--no-tty", default=None, help="With or without a terminal (default: when we have one)."
)
@click.option("--sysfs", is_flag=True, help="host only: with the cards' tree at /sys/class/mic.")
def command(card: str, program: tuple[str, ...], tty: bool | None, sysfs: bool) -> None:
    """Run a program on a card, or on the emulator's host side.

    It has our stdin, stdout, stderr, working directory and signals; its exit status is ours, and
    when a signal killed it, the same signal ends this command. 127: no such program, 126: it cannot
    be executed. With --sysfs a program on the host side finds the cards' files at their real places,
    /sys/class/mic and /sys/kernel/debug, in a mount namespace of its own.

    \b
    Examples:
      micemu run mic0 -- hostname
      tar c src | micemu run mic0 -- sh -c 'cat >src.tar'
      micemu run host -- ping -c 3 172.31.1.1
      micemu run host --sysfs -- cat /sys/class/mic/mic0/state
    """
    if program[0] == "--sysfs":  # behind CARD, where one thinks of it
        sysfs, program = True, program[1:]
    if program and program[0] == "--":
        program = program[1:]
    if not program:
        raise click.UsageError("name a program behind --")
    if card == "host":
        on_host(list(program), sysfs)
    if sysfs:
        raise UsageError("--sysfs is for the host side: a card has no /sys/class/mic")
    where = client.ask("run", card=card)
    status = run_client.run(connect_unix(where["socket"]), list(program), where=card, tty=tty)
    if status:
        tell_loss(card, program[0])
    run_client.leave(status)


def tell_loss(card: str, program: str) -> None:
    """A program that failed may have seen the end of its card before anybody else."""
    try:
        client.ask("run", card=card)
    except (MicemuError, OSError):
        click.echo(f"micemu: {card} went down while {program} was running", err=True)
