"""Errors of the SCIF API."""

from __future__ import annotations

import os


class ScifError(OSError):
    """A SCIF call failed; ``errno`` is the one of the real API (SCIF 2)."""

    def __init__(self, code: int, what: str = "") -> None:
        self._made_of = code, what
        text = os.strerror(code)
        super().__init__(code, f"{what}: {text}" if what else text)

    def __reduce__(self) -> tuple[type[ScifError], tuple[int, str]]:
        """Across processes with the same text; OSError would add the errno's once more."""
        return type(self), self._made_of


class Late(ScifError):
    """A message for something that is gone: it crossed the one that ended it. Nothing is wrong."""
