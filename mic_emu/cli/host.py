"""micemu host"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.log import harmless
from mic_emu.cli.status import failures
from mic_emu.cli.stop import kill_instance, stop_instance
from mic_emu.config import FOR_LIFE, Config, NoCards, load
from mic_emu.errors import MicemuError, NotRunning, StateError, WaitTimeout
from mic_emu.rundir import RunDir
from mic_emu.wire import Channel, WireError

STOP_LIMIT_S = 60.0
# Journal priorities by level: systemd takes them off the line.
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3}


def notify(text: str) -> None:
    """sd_notify: tell the service manager, when there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(text.encode(), address)
        except OSError as e:
            print(f"micemu: cannot notify {address!r}: {e.strerror}", file=sys.stderr)


class Service:
    """An instance that lives as long as this command."""

    def __init__(self, where: RunDir, config_path: Path | None, group: str | None = None) -> None:
        self.where = where
        self.config_path = config_path
        self.group = group
        self.config = self._load()
        self.journal = "JOURNAL_STREAM" in os.environ
        self.watchdog_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6

    def _load(self) -> Config:
        config = load(self.config_path)
        if self.group is not None:
            config.group = self.group
        return config

    def start(self) -> list[str]:
        """Start the instance, plug its cards in, boot those that want it, each for itself (COSM-60). Returns a
        sentence for each that does not boot. Raises StateError when the instance runs already."""
        from mic_emu.cli.boot import connect_or_start

        if self.where.read_pids():
            raise StateError(f"the emulator runs already (instance {self.where.instance})", errno.EBUSY)
        connect_or_start(self.where, self.config).close()
        client.ask("plug", cards=self._cards())
        names = [f"mic{i}" for i, card in enumerate(self.config.cards) if card.autoboot]
        if not names:
            return []
        try:
            status = client.ask("boot", cards=self._cards(), names=names, cwd="/", apart=True)["status"]
        except MicemuError as e:
            return [str(e)]
        return failures(status, names)

    def _cards(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(c) for c in self.config.cards]

    def say(self, level: str, text: str) -> None:
        """A line for the journal or the terminal."""
        prefix = f"<{_PRIORITY.get(level, 6)}>" if self.journal else f"{time.strftime('%H:%M:%S')} {level} "
        print(prefix + harmless(text, "\t"), file=sys.stderr, flush=True)

    def serve(self) -> int:
        """Follow the instance until it ends or we are told to end it; the exit status."""
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        crash = self.where.crash_mark()
        with client.connect(self.where) as events:
            events.send({"op": "events", "recent": True})
            notify(f"READY=1\nSTATUS=instance {self.where.instance}, {len(self.config.cards)} cards")
            poller = select.poll()
            poller.register(events.fileno(), select.POLLIN)
            poller.register(wake_r, select.POLLIN)
            due = time.monotonic() + self.watchdog_s
            while True:
                left = max(due - time.monotonic(), 0) * 1000 if self.watchdog_s else None
                ready = {fd for fd, _ in poller.poll(left)}
                if self.watchdog_s and time.monotonic() >= due:  # however much there is to show
                    self._alive()
                    due = time.monotonic() + self.watchdog_s
                if wake_r in ready and self._signals(os.read(wake_r, 64)):
                    self._show(events)  # what happened on the way down
                    return 0
                if events.fileno() in ready and not self._show(events):
                    return self._ended(crash)

    def _ended(self, crash: tuple[int, int] | None) -> int:
        """The instance has ended without us: 0 when somebody stopped it."""
        why = client.ended(self.where, crash, "by itself")
        stopped = isinstance(why, NotRunning)
        self.say("info" if stopped else "error", str(why))
        return 0 if stopped else 1

    def _alive(self) -> None:
        """The service manager's watchdog: only while the host process answers."""
        try:
            client.ask("status")
            notify("WATCHDOG=1")
        except MicemuError as e:
            self.say("error", str(e))

    def _signals(self, numbers: bytes) -> bool:
        """True when the instance was ended."""
        for number in numbers:
            if number == signal.SIGHUP:
                self._reload()
            else:
                notify("STOPPING=1")
                self._stop()
                return True
        return False

    def _stop(self) -> None:
        try:
            stop_instance(self.where, orderly=True, limit_s=STOP_LIMIT_S)
        except WaitTimeout as e:
            self.say("error", str(e))
            kill_instance(self.where)

    def _reload(self) -> None:
        """SIGHUP: the file is read again; a mistake in it leaves everything as it is."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            fresh = self._load()
            answer = client.ask("reload", cards=[dataclasses.asdict(c) for c in fresh.cards])
            self.say("info", f"configuration read again: {', '.join(answer['changed']) or 'nothing changed'}")
            for text in self._not_taken(fresh, answer.get("kept", {})):
                self.say("warning", text)
            self.config.cards = fresh.cards
        except MicemuError as e:
            self.say("error", f"the configuration stays as it was: {e}")
        notify("READY=1")

    def _not_taken(self, fresh: Config, kept: dict[str, list[str]]) -> Iterator[str]:
        """What of the new file has to wait, a sentence each."""
        keys = [k for k in FOR_LIFE if getattr(self.config, k) != getattr(fresh, k)]
        if keys:
            yield f"{', '.join(keys)}: taken when the emulator starts again"
        for name, words in kept.items():
            yield f"{name} keeps its {', '.join(words)} while it is up: micemu shutdown {name}, then SIGHUP again"
        for index in range(len(fresh.cards), len(self.config.cards)):
            yield f"mic{index} is no longer in the file: it stays until the emulator ends"

    def _show(self, events: Channel) -> bool:
        """Print what happened; False when the stream has ended."""
        try:
            while got := events.try_recv():
                record = got[0]
                if "event" not in record:
                    return False
                where = record.get("card") or record.get("process", "host")
                self.say(record.get("level", "info"), f"{where}: {record['message']}")
        except (WireError, OSError):
            return False
        return True


@click.command()
@click.option("--foreground", is_flag=True, help="Stay; end the emulator with this command.")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="TOML file with [[card]] tables."
)
@click.option("--group", metavar="NAME", help="Share the emulator with this group; needs $MICEMU_RUNDIR.")
@click.option(
    "--unit", "unit_kind", type=click.Choice(["user", "system"]), help="Print a systemd unit file instead."
)
def command(foreground: bool, config_path: Path | None, group: str | None, unit_kind: str | None) -> None:
    """Run the emulator as a service: plug the configured cards in and boot those with autoboot.

    A card that does not boot is named, the others run on; without --foreground the exit status is then 1.

    With --foreground the command stays: it prints events (with journal priorities under systemd), speaks
    sd_notify, ends the emulator in order on SIGTERM and SIGINT, and reads the configuration again on SIGHUP:
    cards that are down take the new values at once, others at their next boot, a changed disk is swapped.

    \b
    Examples:
      micemu host --config lab.toml
      micemu host --foreground --config lab.toml
      micemu host --unit user > ~/.config/systemd/user/micemu.service
      MICEMU_RUNDIR=/run/micemu micemu host --foreground --group mic
    """
    if unit_kind:
        from mic_emu.cli.unit import unit

        click.echo(unit(unit_kind, client.rundir().instance, group), nl=False)
        return
    try:
        service = Service(client.rundir(), config_path, group)
    except NoCards as e:
        click.echo(f"micemu: {e}: nothing to do", err=True)
        raise click.exceptions.Exit(3) from None  # as the daemon of the real stack (COSM-63)
    trouble = service.start()
    if foreground:
        for text in trouble:
            service.say("error", text)
        raise click.exceptions.Exit(service.serve())
    for text in trouble:
        click.echo(f"micemu: {text}", err=True)
    if trouble:
        raise click.exceptions.Exit(MicemuError.code)
