"""Which devices a card gets: backends and what each needs from the host process."""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from mic_emu.config import CardConfig
from mic_emu.errors import MicemuError, UsageError
from mic_emu.host.disk import open_image
from mic_emu.host.supervisor import Backend
from mic_emu.peers import group_of
from mic_emu.sizes import format_size, parse_size
from mic_emu.wire import PeerClosed, WireTimeout, listen_unix
from mic_emu.wire_aio import AsyncChannel

# Devices of our own that are served as users' are.
PYTHON = {"rng": "mic_emu.virtio.rng:Rng", "vsock": "mic_emu.virtio.vsock:Vsock"}

IMPORT_LIMIT_S = 20.0

if TYPE_CHECKING:
    from mic_emu.host.card import Card


def plan(card: Card) -> list[Backend]:
    """Backends of a boot, in the order in which the real daemon adds them: console, net, block."""
    made: list[Backend] = []
    try:
        made.append(console(card))
        if card.config.net != "none":
            made.append(network(card))
        if card.config.disk != "none":
            made.append(block(card, "block", card.config))
        for device in card.config.devices:
            options = {} if device in PYTHON else {"backend": device, "folder": card.cwd}
            made.append(extra_device(card, device if device in PYTHON else "python", options))
    except BaseException:
        for backend in made:
            for fd in backend.fds:
                os.close(fd)
        raise
    return made


def check(card: Card) -> None:
    """Would ``plan`` work? Raises MicemuError with the fix; nothing stays open."""
    if card.config.net != "none" and card.network:
        card.network.check(card.index, card.config.net)
    if card.config.disk != "none":
        os.close(open_image(card.config, disk_path(card), card.name))


async def check_classes(card: Card) -> None:
    """Can the classes of the card's own devices be had? Raises UsageError naming the device and the fix."""
    for device in card.config.devices:
        if device not in PYTHON and (why := await _import_fails(card, device)):
            raise UsageError(
                f"{card.name}: device {device!r}: {why}; mend devices in the configuration (--device), or the module: "
                "it is looked for in the Python path and where micemu boot is called"
            )


async def _import_fails(card: Card, device: str) -> str:
    """Why ``device`` (MODULE:CLASS) cannot be imported, "". By a process of its own, as its backend will be: it is
    the user's code that runs."""
    ours, theirs = socket.socketpair()
    args = {"check": device, "folder": card.cwd}
    async with AsyncChannel(ours) as channel:
        try:
            pid = await card.spawner.start(
                "python", f"{card.name}-import", args, [theirs.fileno()], lambda status: None
            )
        finally:
            theirs.close()
        try:
            answer = await channel.recv_words(IMPORT_LIMIT_S, "the import")
        except WireTimeout:
            os.kill(pid, signal.SIGKILL)
            return f"importing it takes longer than {IMPORT_LIMIT_S:g} s"
        except PeerClosed:
            return "importing it ends the process"
    return str(answer.get("error", ""))


def console(card: Card) -> Backend:
    """The console: a listening socket for ``micemu console`` and the log file."""
    path = card.dir / "console.sock"
    listener = listen_unix(str(path))
    listener.setblocking(False)
    log = os.open(card.dir / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    backend = Backend(
        "console", "console", {"personality": card.config.personality, "group": group_of(path)},
        [listener.detach(), log],
    )  # fmt: skip
    backend.facts["socket"] = str(path)
    backend.facts["log"] = str(card.dir / "console.log")
    return backend


def disk_path(card: Card) -> str:
    """The card's image: the configured one, or a scratch image that goes with the run directory."""
    return card.config.disk or str(card.dir / "disk.img")


def block(card: Card, name: str, config: CardConfig) -> Backend:
    """A disk on a raw image."""
    path = config.disk or disk_path(card)
    fd = open_image(config, path, card.name)
    size = os.lseek(fd, 0, os.SEEK_END)
    args = {
        "read_only": config.read_only,
        "personality": card.config.personality,
        "serial": f"{card.name}-{name}",
    }
    backend = Backend("block", name, args, [fd])
    backend.facts.update(path=path, size=format_size(size), read_only=config.read_only)
    return backend


def network(card: Card) -> Backend:
    """The network in the best mode that this machine offers."""
    if card.network is None:
        raise MicemuError(f"{card.name}: no network is prepared", errno.EINVAL)
    args, fds, facts = card.network.prepare(card.index, card.config.net)
    args["personality"] = card.config.personality
    backend = Backend("net", "net", args, fds)
    backend.facts.update(facts)
    return backend


def python_device(card: Card, options: dict[str, Any]) -> Backend:
    """A device of the user's own: ``backend`` MODULE:CLASS in ``folder``; other options go to the class."""
    rest = dict(options)
    target, folder = rest.pop("backend", ""), rest.pop("folder", "")
    module, _, cls = target.partition(":")
    if not module or not cls:
        raise UsageError(f"--backend {target!r}: write MODULE:CLASS")
    name = rest.pop("name", "") or free_name(card, cls.lower())
    if name in device_names(card):
        raise UsageError(f"{card.name} has a device {name} already")
    args = {
        "personality": card.config.personality, "backend": target, "folder": folder, "options": rest,
        "index": card.index, "place": str(card.dir),
    }  # fmt: skip
    return Backend("python", name, args, [])


def device_names(card: Card) -> set[str]:
    """Names of the card's devices."""
    return {b.name for b in card.backends}


def free_name(card: Card, prefix: str) -> str:
    """``prefix``, or the first of prefix1, prefix2, ... that no device has."""
    taken = device_names(card)
    return (
        prefix
        if prefix not in taken
        else next(n for n in (f"{prefix}{i}" for i in range(1, 256)) if n not in taken)
    )


def extra_device(card: Card, kind: str, options: dict[str, Any]) -> Backend:
    """A device for ``micemu vop add``. Raises UsageError naming what is wrong."""
    if kind in PYTHON:
        return python_device(card, {"backend": PYTHON[kind], "name": kind, **options})
    if kind == "python":
        return python_device(card, options)
    if kind != "block":
        known = ", ".join(["block", *PYTHON])
        raise UsageError(
            f"cannot add a device of kind {kind!r} at run time; known kinds: {known}, --backend MODULE:CLASS"
        )
    if "name" in options and options["name"] in device_names(card):
        raise UsageError(f"{card.name} has a device {options['name']} already")
    name = options.get("name") or next(
        n for n in (f"block{i}" for i in range(1, 256)) if n not in device_names(card)
    )
    return block(card, name, disk_options(options))


def swapped_block(card: Card, old: Backend, options: dict[str, Any]) -> Backend:
    """The successor of disk ``old`` with another image, under its name."""
    if old.kind != "block":
        raise UsageError(f"{old.name} is no disk: only disks can be swapped")
    if "name" in options:
        raise UsageError("a swapped disk keeps its name")
    return block(card, old.name, disk_options(options))


def disk_options(options: dict[str, Any]) -> CardConfig:
    """What ``vop add`` and ``vop swap`` say about a disk. Raises UsageError naming what is wrong."""
    unknown = set(options) - {"path", "read_only", "size", "name"}
    if unknown or "path" not in options:
        raise UsageError(
            f"a block device needs path=FILE, and may have size=, read_only=, name=; not {sorted(unknown)}"
        )
    config = CardConfig(disk=options["path"], read_only=bool(options.get("read_only")))
    if "size" in options:
        config.disk_size = parse_size(options["size"], "size")
    return config
