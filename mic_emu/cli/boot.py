"""micemu boot"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.cli.log import harmless
from mic_emu.config import MAX_CARDS, NET_MODES, CardConfig, Config, check_card, load, set_disk
from mic_emu.errors import MicemuError, NotRunning, UsageError, WaitTimeout
from mic_emu.rundir import RunDir
from mic_emu.sizes import parse_size
from mic_emu.timing import PROFILES
from mic_emu.wire import Channel

START_LIMIT_S = 20.0
READY_LIMIT_S = 60.0  # a second where nothing else runs


def start_host(where: RunDir, config: Config) -> None:
    """Start init and the host process of an instance; the caller holds the lock. Raises MicemuError, WaitTimeout."""
    from mic_emu.host import launcher

    where.create(config.group)
    crash = where.crash_mark()
    fd = launcher.start(where, {"instance": where.instance, "config": config.to_dict()})
    with os.fdopen(fd, "rb") as pipe:
        if not select.select([pipe], [], [], READY_LIMIT_S)[0]:  # its line comes in one piece
            _end_host(where)
            raise WaitTimeout(
                f"the host process (instance {where.instance}) did not start within {READY_LIMIT_S:g} s, and was ended: "
                "is the machine overloaded?"
            )
        line = pipe.readline()
    answer = json.loads(line) if line else {}
    if "ready" not in answer:
        why = answer.get("error") or str(client.ended(where, crash, "at once"))
        raise MicemuError(f"the host process did not start: {why}")


def _end_host(where: RunDir) -> None:
    """Whoever started it removes it."""
    from mic_emu.cli.clean import sweep

    pids = list(where.read_pids().values())
    for process in pids:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for process in pids:
        process.await_end(client.END_LIMIT_S)
    sweep(where)


def connect_or_start(where: RunDir, config: Config) -> Channel:
    """The instance's control channel; the instance is started, or swept up first, as needed."""
    if where.read_pids():
        with suppress(NotRunning):
            return client.connect(where)  # also for those who may use it, but not start it
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with where.locked():
            where.check_owner()
            pids = where.read_pids()
            if not pids:
                from mic_emu.cli.clean import sweep

                sweep(where)
                start_host(where, config)
                return client.connect(where)
            try:
                return client.connect(where)
            except NotRunning:
                if time.monotonic() >= deadline:
                    raise
        # The host process was killed a moment ago. Its init cleans up, for which it needs the lock.
        (pids.get("init") or pids["host"]).await_end(deadline - time.monotonic())


def show_progress(msg: client.Message) -> None:
    """One line per card on a terminal."""
    if "progress" in msg and sys.stderr.isatty():
        click.echo(f"{msg['progress']}: {msg['state']}", err=True)


@click.command()
@click.argument("cards", nargs=-1, metavar="[CARD]...", shell_complete=client.complete_cards)
@click.option("-n", "--cards", "count", type=int, metavar="N", help="How many cards to have (default 1).")
@click.option("--memory", metavar="SIZE", help="Card memory, for example 512M (default 8G, sparse).")
@click.option(
    "--disk",
    metavar="PATH[:ro]",
    help="Raw disk image, made if absent; {card} is the card's name; 'none' for no disk.",
)
@click.option("--disk-size", metavar="SIZE", help="Size of an image that is made (default 64M).")
@click.option("--net", type=click.Choice(NET_MODES), help="Network: probed best first by default.")
@click.option("--image", type=click.Path(), help="Card image (default: the built-in micos).")
@click.option(
    "--ramdisk", type=click.Path(), help="cpio archive (newc, may be gzipped) laid over the card's root."
)
@click.option("--cmdline", metavar="TEXT", help="Appended to the card's kernel command line.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="KIND",
    help="One more device: rng, vsock or MODULE:CLASS (may be repeated).",
)
@click.option(
    "--timing",
    type=click.Choice(list(PROFILES)),
    help="Emulated times: fast (default), x100 (the real ones), test (the shortest limits).",
)
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="TOML file with [[card]] tables."
)
@client.json_option
def command(
    cards: tuple[str, ...], count: int | None, memory: str | None, disk: str | None, disk_size: str | None,
    net: str | None, image: str | None, ramdisk: str | None, cmdline: str | None, timing: str | None,
    config_path: Path | None, devices: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Boot cards by the real protocol and wait until they are online.

    Starts the emulator when it does not run. CARD names (mic0, mic1, ...) boot only these;
    one beyond the present cards makes those below it, too, and leaves them ready. Without names
    all cards that are down boot.

    \b
    Examples:
      micemu boot
      micemu boot -n 4 --disk '/tmp/{card}.img'
      micemu boot --disk root.img:ro --net none
      micemu boot --device vsock
      micemu boot --device rng --device vsock --disk none
      micemu boot mic1 --config lab.toml
    """
    if count is not None and not 1 <= count <= MAX_CARDS:
        raise UsageError(f"{count} cards: use 1 to {MAX_CARDS}")
    where = client.rundir()
    names = [] if cards == ("all",) else list(cards)
    needed = max([card_index(n) + 1 for n in names], default=count or 0)
    running = current(where)
    if config_path is not None or running is None:
        config = load(config_path, max(needed, count or 0) or None)
    else:
        config = running  # options change the cards that boot now, and only them
        config.cards += [CardConfig() for _ in range(needed - len(config.cards))]
    if timing:
        config.timing = timing
    from mic_emu.cli.status import failures, show

    named = names
    names = named or [f"mic{i}" for i in range(count or len(config.cards))]
    for name in names:
        card = config.cards[card_index(name)]
        if devices:
            card.devices = list(devices)
        override(card, name, len(names), memory, disk, disk_size, net, image, ramdisk, cmdline)
    request: dict[str, Any] = {
        "cards": [dataclasses.asdict(c) for c in config.cards],
        "names": names,
        "every": not named,
        "cwd": os.getcwd(),
    }
    fresh = running is None
    with connect_or_start(where, config) as channel:
        try:
            for msg, _ in client.converse(channel, "boot", **request):
                show_progress(msg)
        except MicemuError:
            if fresh:
                _stop_empty()
            raise
    show(msg["status"], named, as_json)
    if not as_json:
        hint(msg["status"])
    failed = failures(msg["status"], names)
    for text in failed:
        click.echo(f"micemu: {harmless(text)}", err=True)
    if failed:
        raise click.exceptions.Exit(MicemuError.code)


def _stop_empty() -> None:
    """A failed first boot leaves nothing behind: state as before."""
    try:
        if not client.ask("status")["status"]["cards"]:
            from mic_emu.cli.stop import stop_instance

            stop_instance(client.rundir(), orderly=False, limit_s=10.0)
    except MicemuError:
        pass


def card_index(name: str) -> int:
    """The number of ``micN``. Raises UsageError."""
    if not re.fullmatch(r"mic[0-9]{1,9}", name):
        raise UsageError(f"{name!r} is not a card name: use mic0, mic1, ...")
    if int(name[3:]) >= MAX_CARDS:
        raise UsageError(f"{name}: cards are mic0 to mic{MAX_CARDS - 1}")
    return int(name[3:])


def current(where: RunDir) -> Config | None:
    """The configuration of the running instance, None when there is none."""
    try:
        return Config.from_dict(client.ask("config")["config"]) if where.read_pids() else None
    except NotRunning:
        return None


def override(
    card: CardConfig, name: str, count: int, memory: str | None, disk: str | None, disk_size: str | None,
    net: str | None, image: str | None, ramdisk: str | None, cmdline: str | None,
) -> None:  # fmt: skip
    """Command line options over the file's values."""
    if memory is not None:
        card.memory = parse_size(memory, "--memory")
    if disk_size is not None:
        card.disk_size = parse_size(disk_size, "--disk-size")
    if disk is not None:
        if count > 1 and "{card}" not in disk and disk != "none" and not disk.endswith(":ro"):
            raise UsageError(
                f"--disk {disk}: {count} cards cannot write to one image; put {{card}} into the path"
            )
        set_disk(card, disk.replace("{card}", name))
    if net is not None:
        card.net = net
    if image is not None:
        card.image = os.path.abspath(image) if image else ""
    if ramdisk is not None:
        card.ramdisk = os.path.abspath(ramdisk) if ramdisk else ""
    if cmdline is not None:
        card.cmdline = cmdline
    check_card(card, name)


def hint(status: client.Message) -> None:
    """The next commands to try."""
    name = status["cards"][0]["name"]
    own = os.path.relpath(sys.argv[0])
    # As it can be typed: make boot calls it from a virtual environment that is not in PATH.
    micemu = "micemu" if shutil.which("micemu") or not os.access(own, os.X_OK) else own
    click.echo(
        f"\nTry: {micemu} console {name}          a shell on the card (leave with Ctrl-])\n"
        f"     {micemu} run {name} -- uname -a   a program on the card\n"
        f"     {micemu} ping {name}              the card's network\n"
        f"     {micemu} shutdown && {micemu} stop"
    )
