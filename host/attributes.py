"""The attributes of ``/sys/class/mic/micN``: formats, checks and errnos (COSM 6).

A read gives the text plus one newline, an unset string zero bytes; a write loses one trailing newline.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError
from mic_emu.host.cosm import CosmDevice

PAGE = 4096
BOOTMODES = ("linux", "flash")
Show = Callable[[CosmDevice], str | None]
Store = Callable[[CosmDevice, str], Awaitable[None]]


class Refused(MicemuError):
    """What the kernel would answer; ``errno`` is what the writer's ``write`` returns."""


def invalid(text: str, expected: str) -> Refused:
    """EINVAL; ``expected`` says what would be accepted. Whoever knows the file puts its name in front."""
    return Refused(f"{text[:40]!r} is not accepted; write {expected}", errno.EINVAL)


def parse_int(text: str) -> int:
    """Decimal with an optional sign. Raises EINVAL, ERANGE (beyond 32 bits)."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise invalid(text, "a decimal number")
    value = int(text)
    if not -(1 << 31) <= value < 1 << 31:
        raise Refused(f"{value} does not fit in 32 bits", errno.ERANGE)
    return value


def parse_hex(text: str) -> int:
    """Hexadecimal with or without 0x. Raises EINVAL, ERANGE (beyond 64 bits)."""
    if not re.fullmatch(r"\+?(0[xX])?[0-9a-fA-F]+", text):
        raise invalid(text, "a hexadecimal number")
    value = int(text, 16)
    if value >= 1 << 64:
        raise Refused(f"{value:#x} does not fit in 64 bits", errno.ERANGE)
    return value


async def _store_state(cosm: CosmDevice, text: str) -> None:
    requests = {"boot": cosm.boot, "reset": cosm.reset, "shutdown": cosm.shutdown}
    if text not in requests:
        raise invalid(text, ", ".join(requests))
    await requests[text]()


async def _store_heartbeat(cosm: CosmDevice, text: str) -> None:
    cosm.set_heartbeat(parse_int(text) != 0)


async def _store_bootmode(cosm: CosmDevice, text: str) -> None:
    if text not in BOOTMODES:
        raise invalid(text, " or ".join(BOOTMODES))
    cosm.bootmode = text


def _string(name: str) -> tuple[Show, Store]:
    async def store(cosm: CosmDevice, text: str) -> None:
        setattr(cosm, name, text.partition("\0")[0])

    return lambda cosm: getattr(cosm, name), store


def _address(name: str) -> tuple[Show, Store]:
    async def store(cosm: CosmDevice, text: str) -> None:
        setattr(cosm, name, parse_hex(text))

    return lambda cosm: f"{getattr(cosm, name):016x}", store


@dataclass(frozen=True)
class Attribute:
    """One file. ``store`` None: read-only."""

    name: str
    show: Show
    store: Store | None = None

    @property
    def mode(self) -> int:
        """Permission bits (COSM-11)."""
        return 0o444 if self.store is None else 0o644

    def read(self, cosm: CosmDevice) -> bytes:
        """What a read returns. Never waits (COSM-27)."""
        text = self.show(cosm)
        return b"" if text is None else text.encode(errors="surrogateescape")[: PAGE - 1] + b"\n"

    async def write(self, cosm: CosmDevice, data: bytes) -> None:
        """What a write does. Raises MicemuError with the errno of COSM 2.3 and 6."""
        if self.store is None:
            raise Refused(f"{self.name} cannot be written", errno.EACCES)
        if not data:
            return  # a write of nothing never reaches the driver
        text = data[:PAGE].decode(errors="surrogateescape")
        await self.store(cosm, text[:-1] if text.endswith("\n") else text)


def _rows() -> list[Attribute]:
    return [
        Attribute("state", lambda c: c.state.word, _store_state),
        Attribute("shutdown_status", lambda c: c.shutdown_status.word),
        Attribute("heartbeat_enable", lambda c: str(int(c.heartbeat_enable)), _store_heartbeat),
        Attribute("bootmode", lambda c: c.bootmode, _store_bootmode),
        *(Attribute(name, *_string(name)) for name in ("cmdline", "firmware", "ramdisk")),
        *(Attribute(name, *_address(name)) for name in ("log_buf_addr", "log_buf_len")),
    ]


ATTRIBUTES: Mapping[str, Attribute] = {a.name: a for a in _rows()}
LOG_STATES = (State.BOOTING, State.ONLINE, State.SHUTTING_DOWN)
