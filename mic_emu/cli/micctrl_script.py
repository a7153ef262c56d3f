"""The ``micctrl`` script of the mainline kernel (COSM 10.4), and the files that both kinds of it write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from mic_emu.cli import client
from mic_emu.errors import MicemuError, NoSuchCard, NotRunning, WaitTimeout

Card = dict[str, Any]
ENDED = ("ready", "online", "reset_failed")


def cards() -> list[Card]:
    """All cards in class order. Raises NotRunning."""
    rows: list[Card] = client.ask("status")["status"]["cards"]
    return rows


def write(card: str, name: str, text: str) -> None:
    """A write to a sysfs attribute. Raises MicemuError with the errno."""
    client.ask("sysfs_write", path=f"class/mic/{card}/{name}", data=text)


def read(card: str, name: str) -> str:
    """A sysfs attribute without its newline."""
    data: str = client.ask("sysfs_read", path=f"class/mic/{card}/{name}")["data"]
    return data.rstrip("\n")


def boot_strings(card: str) -> None:
    """What the mainline script stores before it boots; a boot image that was chosen with ``micemu boot``
    stays."""
    write(card, "bootmode", "linux")
    if not read(card, "firmware").startswith("/"):
        write(card, "firmware", "mic/uos.img")
        write(card, "ramdisk", f"mic/{card}.image")


def _echo(card: str, name: str, text: str) -> int:
    """``echo text > name``: 0, or 1 with the shell's message."""
    try:
        write(card, name, text)
    except NotRunning:
        raise
    except MicemuError as e:
        print(f"micctrl: /sys/class/mic/{card}/{name}: {os.strerror(e.errno)}", file=sys.stderr)
        return 1
    return 0


def _script_status(card: str) -> int:
    try:
        print(f"{card} state: {read(card, 'state')} shutdown_status: {read(card, 'shutdown_status')}")
    except NoSuchCard as e:  # as cat in the real script
        print(f"micctrl: {e}", file=sys.stderr)
        return 1
    return 0


def _script_boot(card: str) -> int:
    try:
        boot_strings(card)
    except NotRunning:
        raise
    except MicemuError as e:
        print(f"micctrl: /sys/class/mic/{card}: {os.strerror(e.errno)}", file=sys.stderr)
        return 1
    return _echo(card, "state", "boot")


def _script_wait(card: str) -> int:
    """Ends on ready, online and reset_failed, not on the vanished ``offline`` (COSM-69)."""
    while True:
        try:
            client.ask("wait", states=list(ENDED), cards=[card], timeout=1.0)
            return 0
        except WaitTimeout:
            print(f"Waiting for {card} to go offline", flush=True)


SCRIPT: dict[str, Callable[[str], int]] = {
    "-s": _script_status,
    "-b": _script_boot,
    "-r": lambda card: _echo(card, "state", "reset"),
    "-S": lambda card: _echo(card, "state", "shutdown"),
    "-w": _script_wait,
}


def script(option: str, names: list[str]) -> int:
    """One option for one card or all; the first failing card ends it."""
    try:
        for name in names or [c["name"] for c in cards()]:
            status = SCRIPT[option](name)
            if status:
                return status
    except NotRunning:
        print("Module unloaded ")
        return 3
    return 0
