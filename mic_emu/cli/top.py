"""micemu top"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mic_emu.cli import client, terminal
from mic_emu.cli.top_view import Look, Painter, add_rates, plain
from mic_emu.errors import NotRunning, WaitTimeout
from mic_emu.wire import PeerClosed

ANSWER_S = 5.0
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # alternate screen without cursor, and back
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ends:
    """What can end a wait: a key, a signal, a descriptor. ``quit`` and ``redraw`` say what somebody wanted."""

    def __init__(self, signal_fd: int, screen: Screen | None) -> None:
        self._signal_fd = signal_fd
        self._screen = screen
        self.quit = False
        self.redraw = False

    def wait(self, seconds: float, fd: int = -1) -> bool:
        """Until ``fd`` is readable (True), somebody wants something, or the time is over (False)."""
        deadline = time.monotonic() + seconds
        keys = self._screen.keys if self._screen else -1
        while not self.quit and not self.redraw:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([f for f in (self._signal_fd, keys, fd) if f >= 0], [], [], left)[0]
            if self._signal_fd in ready:
                self._signals()
            if keys in ready:
                typed = os.read(keys, 64)
                self.quit |= not typed or b"q" in typed.lower()
            if fd in ready:
                return True
            if not ready:
                return False
        return False

    def _signals(self) -> None:
        for number in terminal.read_signals(self._signal_fd):
            if number in STOP:
                self.quit = True
            elif number == signal.SIGTSTP and self._screen:
                self._screen.suspend()
                self.redraw = True
            elif number == signal.SIGWINCH:
                self.redraw = True


class Screen:
    """The terminal while top has it: keys come at once, alternate screen, no cursor. Always given back."""

    def __init__(self, keys: int, out: int) -> None:
        self.keys, self._out = keys, out
        self._painter = Painter()
        self._raw = terminal.Raw(keys, keys=True)

    def __enter__(self) -> Screen:
        self._raw.__enter__()
        terminal.write_all(self._out, ENTER.encode())
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            terminal.write_all(self._out, LEAVE.encode())
        except OSError:
            pass  # the terminal has gone
        self._raw.__exit__()

    def suspend(self) -> None:
        """Ctrl-Z: give the terminal to the shell, take it again afterwards."""
        self.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.__enter__()

    def show(self, look: Look, foot: str) -> None:
        """Paint over what is there: no flicker, and only what changed goes through a slow line's eyes."""
        rows, columns = terminal.window_size(self._out)
        lines = self._painter.lines(look, foot, max(rows or 24, 3), max(columns or 80, 20))
        text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J"
        terminal.write_all(self._out, text.encode())


def take(ends: Ends) -> Look | None:
    """One look; None when somebody wants something else first. Raises NotRunning when the emulator is gone."""
    with client.connect() as channel:
        channel.send({"op": "top"})
        end = time.monotonic() + ANSWER_S
        while not ends.wait(end - time.monotonic(), channel.fileno()):
            if ends.quit:
                return None
            if time.monotonic() >= end:
                raise WaitTimeout(
                    f"the host process does not answer within {ANSWER_S:g} s: is it stopped? See micemu log"
                )
            ends.redraw = False  # a resize is seen with the answer
        try:
            look: Look = client.check(channel.recv(ANSWER_S, "the host's figures")[0])["look"]
        except PeerClosed:
            raise NotRunning(f"the emulator has stopped (instance {client.rundir().instance})") from None
    return look


def looks(ends: Ends, interval: float, names: tuple[str, ...]) -> Iterator[Look]:
    """A look with its rates every ``interval`` seconds, until somebody wants to leave. The first has no rates."""
    before: Look | None = None
    due = time.monotonic()
    while not ends.quit:
        try:
            look = take(ends)
        except NotRunning:
            if before is None:
                raise
            raise NotRunning(f"the emulator has stopped (instance {before['instance']})") from None
        if look is None:
            return
        # A card may be unplugged while we watch.
        look["cards"] = client.select(look["cards"], names, strict=before is None)
        yield add_rates(look, before)
        before = look
        due = max(due + interval, time.monotonic())
        ends.wait(due - time.monotonic())
        ends.redraw = False


@contextmanager
def opened(screen: bool) -> Iterator[tuple[Ends, Screen | None]]:
    """Signals as bytes, and the screen if there is to be one."""
    painted = Screen(sys.stdin.fileno(), sys.stdout.fileno()) if screen else None
    numbers = [*STOP, *([signal.SIGWINCH, signal.SIGTSTP] if screen else [])]
    with terminal.caught(numbers) as fd:
        ends = Ends(fd, painted)
        if painted is None:
            yield ends, None
            return
        with painted:
            yield ends, painted


def emit(look: dict[str, Any], as_json: bool) -> None:
    """One look on standard output."""
    click.echo(json.dumps(look) if as_json else plain(look) + "\n")
    sys.stdout.flush()


@click.command()
@client.cards_argument
@click.option(
    "--interval",
    type=client.Seconds(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("--once", is_flag=True, help="Two looks, one table with the rates between them, then end.")
@click.option(
    "--plain",
    "as_text",
    is_flag=True,
    help="Tables one after the other instead of a screen; so it is without a terminal.",
)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each look (schema 1).")
def command(cards: tuple[str, ...], interval: float, once: bool, as_text: bool, as_json: bool) -> None:
    """Watch cards live: states, heartbeats, requests and bytes per second, rings, DMA channels.

    The screen needs rich (pip install 'micemu[top]'); q or Ctrl-C leaves it. RINGS shows chains that wait, of the
    ring's entries. Exit status 3 when the emulator stops meanwhile.

    \b
    Examples:
      micemu top
      micemu top mic0 --interval 0.5
      micemu top --once
      micemu top --json | jq -c '.cards[] | [.name, .state]'
    """
    screen = not (once or as_text or as_json) and terminal.is_terminal(0) and terminal.is_terminal(1)
    with opened(screen) as (ends, painted):
        foot = f" q quits, every {interval:g} s"
        for seen, look in enumerate(looks(ends, interval, cards)):
            if painted:
                painted.show(look, foot)
            elif seen or not once:
                emit(look, as_json)
            if once and seen:
                return
