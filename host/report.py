"""What people see of a card: its row in ``micemu status``, metrics and ``micemu top``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mic_emu.cosm.states import State
from mic_emu.host import debugfs
from mic_emu.host.network import addresses

if TYPE_CHECKING:
    from mic_emu.bar import Bus
    from mic_emu.host.card import Card


def post_code(bus: Bus) -> str:
    """The two characters; the card writes what it likes, and they go to terminals."""
    return re.sub("[^ -~]", ".", debugfs.post_code(bus))


def net_mode(card: Card) -> str:
    """How the card's network is connected now."""
    for b in card.backends:
        if b.kind == "net":
            return str(b.facts.get("mode", "starting"))
    return "none" if card.cosm.state in (State.ONLINE, State.BOOTING) else card.config.net


def devices(card: Card) -> list[dict[str, Any]]:
    """Rows of ``status --json``."""
    rows = []
    for b in card.backends:
        row = {"type": b.name, "pid": b.pid or None, "state": b.state, "restarts": b.restarts, **b.facts}
        if b.failed or b.trouble:
            row["error"] = b.failed or b.trouble
        rows.append(row)
    for dev, pid in card.running.files.programs() if card.running else ():
        state = "running" if dev.driver_ok else "added"
        rows.append({"type": dev.name, "pid": pid or None, "state": state, "restarts": 0, "program": True})
    return rows


def status(card: Card) -> dict[str, Any]:
    """One card of ``status --json`` (schema 1)."""
    return {
        "name": card.name,
        "state": card.cosm.state.word,
        "shutdown_status": card.cosm.shutdown_status.word,
        "pids": {"board": card.board.pid or None, "os": card.board.os_pid or None},
        "net": net_mode(card),
        "devices": devices(card),
        "faults": card.faults.rows(),
        "memory": card.config.memory,
        "contained": card.board.contained,
        "boots": card.boots,
        "crashes": card.crashes,
        "post_code": post_code(card.bus),
        "addresses": addresses(card.index),
        "run_dir": str(card.dir),
    }
