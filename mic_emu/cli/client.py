"""What commands share: finding the emulator, asking it, common options, output."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from mic_emu.errors import BY_NAME, MicemuError, NoSuchCard, NotRunning, WaitTimeout
from mic_emu.peers import group_of
from mic_emu.rundir import RunDir
from mic_emu.version import PROTOCOL, VERSION
from mic_emu.wire import Channel, WireTimeout, connect_unix

Message = dict[str, Any]
MOST_S = 1e9  # thirty years: more than any wait, and what every timer of the system takes
END_LIMIT_S = 10.0  # init ends what is left
QUIET_S = (
    10.0  # then we look whether the host process lives: many requests wait for a card as long as that takes
)
ALIVE_S = 20.0  # for its answer to that
NOT_YOURS = "the emulator in {} belongs to another user and is not shared with you"


def rundir() -> RunDir:
    """The run directory that the command line names."""
    ctx = click.get_current_context(silent=True)
    return RunDir(ctx.find_root().obj if ctx else None)


def connect(where: RunDir | None = None) -> Channel:
    """Connect to the host process. Raises NotRunning with the fix."""
    where = where or rundir()
    where.check_owner()
    try:
        return Channel(connect_unix(str(where.control), limit_s=ALIVE_S))
    except BlockingIOError:  # as many wait as there is room for
        raise hung(where) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(
            f"no emulator runs (instance {where.instance}): start one with micemu boot"
        ) from None
    except PermissionError as e:
        raise MicemuError(NOT_YOURS.format(where.path), e.errno or 0) from None


def converse(
    channel: Channel, op: str, fds: Sequence[int] = (), **fields: Any
) -> Iterator[tuple[Message, list[int]]]:
    """Send a request; yields every message up to the last one. Raises the MicemuError it ends with, WaitTimeout when
    the host process answers nobody any more."""
    where = rundir()
    crash = where.crash_mark()
    try:
        channel.send({"op": op, "protocol": PROTOCOL, "version": VERSION, **fields}, fds)
        while True:
            try:
                msg, got = channel.recv(QUIET_S, f"the host's answer to {op!r}")
            except WireTimeout:
                await_life(where)
                continue
            yield check(msg), got
            if msg.get("done"):
                return
    except WireTimeout:  # of the request
        raise hung(where) from None
    except ConnectionError:
        if stranger(where):
            raise MicemuError(NOT_YOURS.format(where.path), errno.EACCES) from None
        raise ended(where, crash, f"during {op!r}") from None


def await_life(where: RunDir) -> None:
    """Have the host process answer anybody. Raises WaitTimeout when it is stopped or hangs; none when it has ended: who
    waits for it finds that out."""
    try:
        with connect(where) as channel:
            channel.send({"op": "status"})
            channel.recv(ALIVE_S, "its answer")
    except WireTimeout:
        raise hung(where) from None
    except (NotRunning, ConnectionError):
        return


def hung(where: RunDir) -> WaitTimeout:
    """What to do about a host process that answers nobody."""
    host = where.read_pids().get("host")
    who, fix = (
        (f", host process {host.pid}", f"kill -CONT {host.pid} lets it go on")
        if host
        else ("", "wait for it")
    )
    return WaitTimeout(
        f"the emulator does not answer (instance {where.instance}{who}): if it was stopped, {fix}; "
        "micemu stop --force ends it"
    )


def stranger(where: RunDir) -> bool:
    """Are we neither its user nor root nor of its group? Then the host process hangs up on us (``mic_emu.peers``)."""
    try:
        group = group_of(where.control)
        return os.geteuid() not in (0, where.path.stat().st_uid) and group not in (
            os.getegid(),
            *os.getgroups(),
        )
    except OSError:  # it is gone
        return False


def ended(where: RunDir, crash: tuple[int, int] | None, when: str) -> MicemuError:
    """Why the host process has hung up; ``crash``: the mark of before. Waits until init has kept its logs."""
    if init := where.read_pids().get("init"):
        init.await_end(END_LIMIT_S)
    if where.crash_mark() not in (None, crash):
        return MicemuError(f"the host process ended {when}; its last words: {where.crash_log}")
    return NotRunning(f"the emulator has stopped (instance {where.instance})")


def check(msg: Message) -> Message:
    """The message, when it is no refusal. Raises the MicemuError that it carries."""
    if "error" not in msg:
        return msg
    error = BY_NAME.get(msg.get("kind", ""), MicemuError)
    exc = error.__new__(error)
    MicemuError.__init__(exc, msg["error"], msg.get("errno", 0))
    raise exc


def ask(op: str, fds: Sequence[int] = (), **fields: Any) -> Message:
    """One request, its last answer."""
    with connect() as channel:
        for msg, _ in converse(channel, op, fds, **fields):
            pass
    return msg


def select(cards: Sequence[Message], names: Sequence[str], strict: bool = True) -> list[Message]:
    """The rows of ``status`` that are named; no name or ``all``: every one. Raises NoSuchCard if ``strict``."""
    known = [card["name"] for card in cards]
    for name in names if strict else ():
        if name not in (*known, "all"):
            raise NoSuchCard(f"there is no card {name}; cards: {', '.join(known) or 'none is plugged in'}")
    return [card for card in cards if not names or "all" in names or card["name"] in names]


def cards(names: Sequence[str]) -> list[Message]:
    """The rows of the cards that are named, as ``select``. Raises MicemuError."""
    return select(ask("status")["status"]["cards"], names)


def ask_card(card: Message, op: str, limit_s: float = 60.0, **fields: Any) -> Message:
    """A request to a running card OS; its answer, ``error`` and ``errno`` included. Raises MicemuError."""
    try:
        with Channel(connect_unix(f"{card['run_dir']}/os.sock")) as channel:
            channel.send({"op": op, **fields})
            return channel.recv(limit_s, f"the card's answer to {op!r}")[0]
    except OSError as e:
        raise MicemuError(f"{card['name']} does not answer: {e}", e.errno or 0) from e


class Seconds(click.FloatRange):
    """A number of seconds: ``nan`` and ``inf`` are none, no timer takes them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not seconds < MOST_S:  # so that nan is refused, too
            self.fail(f"{value} is no number of seconds below {MOST_S:.0f}.", param, ctx)
        return seconds


def emit(plain: Any) -> None:
    """``--json`` output."""
    click.echo(json.dumps(plain, indent=2 if sys.stdout.isatty() else None))


def json_option(f: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(f)


def complete_cards(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the cards that exist now, for shell completion."""
    try:
        names = [c["name"] for c in ask("status")["status"]["cards"]]
    except (MicemuError, OSError):
        names = ["mic0"]
    return [n for n in [*names, "all"] if n.startswith(incomplete)]


def cards_argument(f: Callable[..., Any]) -> Callable[..., Any]:
    """Card names; none means all."""
    return click.argument("cards", nargs=-1, metavar="[CARD]...", shell_complete=complete_cards)(f)


def card_argument(f: Callable[..., Any]) -> Callable[..., Any]:
    """One card name."""
    return click.argument("card", metavar="CARD", shell_complete=complete_cards)(f)
