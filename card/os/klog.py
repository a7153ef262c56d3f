"""The card's kernel log: text in GDDR, readable after the card OS has died (COSM 9)."""

from __future__ import annotations

import threading
from typing import Any

from mic_emu import layout as L
from mic_emu.memory import View

C = L.CONSTANTS


class KernelLog:
    """Length word, then text. When it is full, the older half goes. For any thread: a driver's loop has its own."""

    def __init__(self, gddr: View) -> None:
        self._gddr = gddr
        self._at = C["CARD_LOG"]
        self._room = C["CARD_LOG_SIZE"] - 4
        self._len = 0
        self._turn = threading.Lock()
        gddr.store(self._at, 4, 0)

    def record(self, record: dict[str, Any]) -> None:
        """One line for a log record (the hook of ``Log``)."""
        extra = " ".join(
            f"{k}={v}" for k, v in record.items() if k not in ("time", "level", "message", "process", "card")
        )
        self.write(f"[{record['time']:.6f}] {record['level']}: {record['message']} {extra}".rstrip() + "\n")

    def write(self, text: str) -> None:
        """Append text; the length is stored last, so a reader never sees half a line."""
        data = text.encode(errors="replace")[: self._room // 2]
        with self._turn:
            if self._len + len(data) > self._room:
                kept = self._gddr.read(self._at + 4 + self._len - self._room // 2, self._room // 2)
                self._gddr.write(self._at + 4, kept)
                self._len = len(kept)
            self._gddr.write(self._at + 4 + self._len, data)
            self._len += len(data)
            self._gddr.store(self._at, 4, self._len)
