"""Configuration: TOML with one ``[[card]]`` table per card, checked strictly.

An unknown key is an error that names the nearest known one. Command line options override the
file; ``micemu config show`` prints what is in force.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mic_emu.errors import UsageError
from mic_emu.faults import parse as parse_fault
from mic_emu.sizes import format_size, parse_size
from mic_emu.timing import PROFILES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CARDS = 256
MIN_MEMORY = 64 << 20
NET_MODES = ("auto", "ns", "tap", "responder", "none")
PERSONALITIES = ("modern", "compat")
ON_CRASH = ("keep", "reset", "reboot")
RESTART = ("always", "never")
INTERRUPTS = ("msix", "msi", "intx")
DEVICES = ("rng", "vsock")  # served in Python, on request
MSIX_DEVICES = 4  # what nine vectors leave when SCIF and four DMA channels have theirs (HW-47)
STEPPINGS = ("A0", "B0", "B1", "C0")


# What is in the slot: a card has it from when it was plugged in, and another one takes its place when it is down.
HARDWARE = ("memory", "device_id", "stepping", "interrupts", "namespaces")
# What an instance has from its start to its end.
FOR_LIFE = ("timing", "host_memory", "group", "metrics_port")


class NoCards(UsageError):
    """The file says explicitly that there are none."""


@dataclass
class CardConfig:
    """One card. Sizes in bytes, paths absolute."""

    memory: int = 8 << 30
    disk: str = ""  # image path, "" = scratch image in the run directory, "none" = no disk
    disk_size: int = 64 << 20  # of an image that is created
    read_only: bool = False
    net: str = "auto"
    image: str = ""  # "" = the built-in micos
    ramdisk: str = ""
    cmdline: str = ""
    stepping: str = "C0"
    device_id: int = 0x225C
    interrupts: str = "msix"  # the best that the card offers; the driver falls back to it
    personality: str = "modern"
    on_crash: str = "keep"
    max_reboots: int = 5  # after crashes and restarts in a row, until the card is left alone
    autoboot: bool = True  # boot when ``micemu host`` starts
    restart: str = "always"  # of a backend that died
    namespaces: bool = True
    heartbeat: bool = True
    devices: list[str] = field(default_factory=list)  # more devices: rng, vsock, MODULE:CLASS
    fault: list[dict[str, Any]] = field(default_factory=list)  # fault filters (docs/faults.md)


@dataclass
class Config:
    """An instance."""

    timing: str = "fast"
    host_memory: int = 16 << 30
    group: str = ""  # whose members may use the instance's sockets, by name or number
    metrics_port: int = 0  # of the loopback address, for a Prometheus server; 0: none
    cards: list[CardConfig] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``micemu config show --json`` prints it."""
        plain = dataclasses.asdict(self)
        plain["card"] = plain.pop("cards")
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Config:
        """The inverse of ``to_dict`` (trusted data from our own processes)."""
        plain = dict(plain)
        cards = [CardConfig(**c) for c in plain.pop("card")]
        return cls(cards=cards, **plain)


def _choice(value: Any, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{what}: {value!r} is not known; {hint}use one of {', '.join(allowed)}")
    return str(value)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    str: "a string: write it in quotes",
    list: "a list: write it in brackets",
}


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{what}: {value!r} is not {_KINDS.get(kind, f'a {kind.__name__}')}")
    return value


_CHOICES = {
    "net": NET_MODES,
    "personality": PERSONALITIES,
    "on_crash": ON_CRASH,
    "restart": RESTART,
    "stepping": STEPPINGS,
    "interrupts": INTERRUPTS,
    "timing": tuple(PROFILES),
}
_SIZES = {"memory", "disk_size", "host_memory"}
_PATHS = {"image", "ramdisk"}


def _set(target: Any, table: dict[str, Any], where: str, base: Path, also: tuple[str, ...] = ()) -> None:
    kinds = {f.name: type(getattr(target, f.name)) for f in dataclasses.fields(target)}
    for key, value in table.items():
        if key in also:
            continue
        if key not in kinds or key == "cards":
            known = sorted({*kinds, *also} - {"cards"})
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {key!r}{hint}")
        what = f"{where}: {key}"
        if key == "fault":
            value = _faults(value, what)
        elif key in _SIZES:
            value = parse_size(value, what)
        elif key in _CHOICES:
            value = _choice(value, _CHOICES[key], what)
        else:
            value = _typed(value, kinds[key], what)
        if key in _PATHS and value:
            value = str(base / os.path.expanduser(value))
        if key == "disk":
            set_disk(target, value, base)
        else:
            setattr(target, key, value)


def _faults(tables: Any, what: str) -> list[dict[str, Any]]:
    """``[[card.fault]]`` tables, each checked. Raises UsageError."""
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise UsageError(f"{what}: write fault filters as [[card.fault]] tables")
    return [parse_fault(t, f"{what} number {i + 1}").words() for i, t in enumerate(tables)]


def set_disk(card: CardConfig, text: str, base: Path | None = None) -> None:
    """``PATH``, ``PATH:ro`` or ``none``; relative paths count from ``base`` (default: here)."""
    path = text
    if path.endswith((":ro", ":rw")):
        card.read_only = path.endswith(":ro")
        path = path[:-3]
    if path not in ("", "none"):
        path = str((base or Path.cwd()) / os.path.expanduser(path))
    card.disk = path


def check_card(card: CardConfig, name: str) -> None:
    """Raise UsageError for values that contradict each other or the machine."""
    for device in card.devices:
        if device not in DEVICES and not re.fullmatch(r"[\w.]+:\w+", str(device)):
            raise UsageError(f"{name}: devices: {device!r}: use {', '.join(DEVICES)} or MODULE:CLASS")
        if card.devices.count(device) > 1:
            raise UsageError(f"{name}: devices: {device!r} is there twice")
    wanted = ["console"] + ["net"] * (card.net != "none") + ["block"] * (card.disk != "none") + card.devices
    if card.interrupts == "msix" and len(wanted) > MSIX_DEVICES:
        raise UsageError(
            f"{name}: {len(wanted)} devices ({', '.join(wanted)}), and a card with MSI-X has interrupt vectors for "
            f'{MSIX_DEVICES}: leave some away (disk = "none", net = "none"), or take interrupts = "msi"'
        )
    if card.memory < MIN_MEMORY or card.memory % (1 << 20):
        raise UsageError(f"{name}: memory: {format_size(card.memory)}: use whole MiB, at least 64M")
    if not 0x2250 <= card.device_id <= 0x225E:
        raise UsageError(f"{name}: device_id: {card.device_id:#x} is no MIC X100: use 0x2250 to 0x225e")
    if card.max_reboots < 0:
        raise UsageError(f"{name}: max_reboots: {card.max_reboots}: use 0 or more")
    if card.disk_size < 512 or card.disk_size % 512:
        raise UsageError(f"{name}: disk_size: {card.disk_size}: use a multiple of 512 bytes")


def load(path: Path | None, cards: int | None = None) -> Config:
    """Read a configuration file (None: the built-in defaults) for ``cards`` cards.

    Raises UsageError with the file, the table and the key.
    """
    config = Config()
    tables: list[dict[str, Any]] = []
    if path is not None:
        try:
            plain = tomllib.loads(path.read_text())
        except OSError as e:
            raise UsageError(f"cannot read the configuration {path}: {e.strerror}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise UsageError(f"{path} is not valid TOML: {e}") from e
        except RecursionError as e:
            raise UsageError(f"{path} is nested too deeply") from e
        base = path.resolve().parent
        _set(config, plain, str(path), base, also=("card",))
        if not 0 <= config.metrics_port <= 65535:
            raise UsageError(f"{path}: metrics_port: {config.metrics_port}: use 1 to 65535, or 0 for none")
        tables = plain.get("card", [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            below = (
                "" if isinstance(tables, list) else ", and [[card.fault]] below the [[card]] that it is about"
            )
            raise UsageError(f"{path}: write cards as [[card]] tables{below}")
        for i, table in enumerate(tables):
            card = CardConfig()
            where = f"{path}: [[card]] number {i + 1} (mic{i})"
            _set(card, table, where, base)
            check_card(card, where)
            config.cards.append(card)
        if plain.get("card") == [] and cards is None:
            raise NoCards(f"{path}: the list of cards is empty")
    count = cards if cards is not None else max(1, len(config.cards))
    if not 1 <= count <= MAX_CARDS:
        raise UsageError(f"{count} cards: use 1 to {MAX_CARDS}")
    while len(config.cards) < count:
        config.cards.append(CardConfig())
    del config.cards[count:]
    return config
