"""Structured log: one JSON object a line, all processes of an instance into one file.

A line is written with a single ``write`` to a file opened for appending, so lines of several
processes never mix. The same records feed ``micemu log`` and ``micemu events``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

LEVELS = ("debug", "info", "warning", "error")


class Logger(Protocol):
    """What the hardware layer needs of a log: ours, or ``logging.Logger``."""

    def warning(self, message: str, /) -> object: ...


class Log:
    """Writes records; ``bind`` gives a child with more fixed fields (process, card, device)."""

    def __init__(self, fd: int, hook: Callable[[dict[str, Any]], None] | None = None, **fields: Any) -> None:
        self._fd = fd
        self._hook = hook
        self._fields = fields

    @classmethod
    def open(cls, path: os.PathLike[str] | str, **fields: Any) -> Log:
        """Append to ``path``."""
        return cls(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), **fields)

    @property
    def fd(self) -> int:
        return self._fd

    def bind(self, **fields: Any) -> Log:
        return Log(self._fd, self._hook, **{**self._fields, **fields})

    def set_hook(self, hook: Callable[[dict[str, Any]], None] | None) -> None:
        """Also hand every record to ``hook`` (the event stream)."""
        self._hook = hook

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        record = {"time": round(time.time(), 6), "level": level, **self._fields, **fields, "message": message}
        try:
            os.write(self._fd, json.dumps(record, default=str).encode() + b"\n")
        except OSError:
            pass  # a full disk must not stop a card; the event stream still has it
        if self._hook:
            self._hook(record)

    def debug(self, message: str, *args: Any, **fields: Any) -> None:
        self._write("debug", message % args if args else message, fields)

    def info(self, message: str, *args: Any, **fields: Any) -> None:
        self._write("info", message % args if args else message, fields)

    def warning(self, message: str, *args: Any, **fields: Any) -> None:
        self._write("warning", message % args if args else message, fields)

    def error(self, message: str, *args: Any, **fields: Any) -> None:
        self._write("error", message % args if args else message, fields)
