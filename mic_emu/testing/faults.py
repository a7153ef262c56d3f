"""Faults for tests: ``with fault(machine, "packet-loss", rate=0.1, seed=7) as f: ...`` (docs/faults.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Commands(Protocol):
    """What is needed of a ``Machine``: its commands and its log."""

    run_dir: Path

    def micemu(self, *args: str, check: bool = True) -> Any: ...
    def json(self, *args: str) -> Any: ...


class ActiveFault:
    """A filter in a running machine. ``hits`` and ``seen`` are read when they are asked for, also after
    the filter has reached its count or was removed."""

    def __init__(self, machine: Commands, card: str, number: int) -> None:
        self.machine = machine
        self.card = card
        self.id = number

    def row(self) -> dict[str, Any] | None:
        """Its row of ``micemu fault list --json``; None when it is gone."""
        rows = self.machine.json("fault", "list", self.card)[self.card]
        return next((r for r in rows if r["id"] == self.id), None)

    def _count(self, name: str) -> int:
        row = self.row()
        if row is None:
            gone = [
                e for e in fault_events(self.machine, self.card, self.id) if e["event"] == "fault-removed"
            ]
            row = gone[-1]
        return int(row[name])

    @property
    def hits(self) -> int:
        """How often it acted."""
        return self._count("hits")

    @property
    def seen(self) -> int:
        """How many events it looked at."""
        return self._count("seen")

    def remove(self) -> None:
        """Take it out, if it is still there."""
        if self.row() is not None:
            self.machine.micemu("fault", "remove", self.card, str(self.id))


def fault_events(machine: Commands, card: str = "mic0", number: int | None = None) -> list[dict[str, Any]]:
    """The events of a card's faults so far: fault-added, fault-triggered, fault-removed."""
    found = []
    for line in (machine.run_dir / "log.jsonl").read_text(errors="replace").splitlines():
        record = json.loads(line)
        ours = record.get("event", "").startswith("fault-") and record.get("card") == card
        if ours and number in (None, record["fault"]):
            found.append(record)
    return found


def add_fault(machine: Commands, kind: str, card: str = "mic0", **words: object) -> ActiveFault:
    """``micemu fault add``: ``words`` are its options. AssertionError with the message when it is refused."""
    options = [text for word, value in words.items() for text in (f"--{word}", str(value))]
    return ActiveFault(machine, card, machine.json("fault", "add", card, kind, *options)["id"])


@contextmanager
def fault(machine: Commands, kind: str, card: str = "mic0", **words: object) -> Iterator[ActiveFault]:
    """A fault for as long as the block lasts."""
    active = add_fault(machine, kind, card, **words)
    try:
        yield active
    finally:
        active.remove()
