"""micemu stop"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError, NotRunning, WaitTimeout
from mic_emu.rundir import ProcessId, RunDir


def _watch(process: ProcessId | None) -> int:
    """A descriptor that becomes readable when the process ends; -1: there is none, or it has just ended."""
    try:
        return os.pidfd_open(process.pid) if process else -1
    except ProcessLookupError:
        return -1


def stop_instance(where: RunDir, orderly: bool, limit_s: float) -> None:
    """Ask the host process to end and wait until init has cleaned up. Raises WaitTimeout."""
    watch = _watch(where.read_pids().get("init"))
    try:
        with client.connect(where) as channel:
            for _ in client.converse(channel, "stop", orderly=orderly, timeout=limit_s):
                pass
        if watch >= 0 and not select.select([watch], [], [], limit_s)[0]:
            raise WaitTimeout(f"the emulator did not end within {limit_s:g} s: micemu stop --force")
    finally:
        if watch >= 0:
            os.close(watch)


def kill_instance(where: RunDir) -> bool:
    """Kill the host process, wait for init to clean up. False when nothing ran."""
    pids = where.read_pids()
    victim = pids.get("host") or pids.get("init")
    if victim is None:
        return False
    init = pids.get("init")
    watch = _watch(init)
    try:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(victim.pid, signal.SIGKILL)
        if watch >= 0:
            select.select([watch], [], [], 15.0)
    except PermissionError:
        raise MicemuError(
            f"the emulator belongs to another user: micemu stop without --force (instance {where.instance})"
        ) from None
    finally:
        if watch >= 0:
            os.close(watch)
    return True


def sweep_dead(where: RunDir) -> None:
    """Remove what an instance without processes left behind."""
    from mic_emu.cli.clean import sweep

    with where.locked():
        if not where.read_pids():
            sweep(where)


@click.command()
@click.option("--force", is_flag=True, help="Kill everything at once; always works.")
@click.option(
    "--timeout",
    type=client.Seconds(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait.",
)
@client.json_option
def command(force: bool, timeout: float, as_json: bool) -> None:
    """Shut every card down and end the emulator; nothing is left behind.

    \b
    Examples:
      micemu stop
      micemu stop --force
    """
    where = client.rundir()
    try:
        if force:
            kill_instance(where)
            sweep_dead(where)
        else:
            stop_instance(where, orderly=True, limit_s=timeout)
    except NotRunning:
        with suppress(MicemuError):  # another user's is not ours to sweep
            sweep_dead(where)  # init may have been killed
        raise
    if as_json:
        client.emit({"stopped": where.instance})
