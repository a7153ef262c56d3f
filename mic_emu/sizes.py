"""Sizes in bytes as people write them. Apart from the configuration: commands that only show sizes need none of it."""

from __future__ import annotations

import re

from mic_emu.errors import UsageError

MOST = 1 << 63  # bytes: what an offset of the system cannot say
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int, what: str) -> int:
    """Bytes from ``8G``, ``64MiB``, ``4096``. Raises UsageError naming ``what``."""
    m = re.fullmatch(r"([0-9]+)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.I)
    if not m:
        raise UsageError(f"{what}: {text!r} is not a size; write for example 512M or 8G")
    size = int(m[1]) * _UNITS[m[2].upper()] if len(m[1]) < 20 else MOST
    if size >= MOST:
        raise UsageError(f"{what}: {text!r:.40} is more than files and memories can have")
    return size


def format_size(n: int) -> str:
    """The shortest exact spelling of ``n`` bytes."""
    for unit in "TGMK":
        if n and n % _UNITS[unit] == 0:
            return f"{n // _UNITS[unit]}{unit}"
    return str(n)
