"""The fault filters of one card: who they are, which device they are about, what is told of them.

The filters themselves act in C, in whatever process does what they are about. They belong to the slot, not
to the card in it: they outlive resets, boots, a card OS, a board and a backend that dies.
"""

from __future__ import annotations

import asyncio
import os
import signal
import string
from collections.abc import Callable
from typing import Any

from mic_emu._native import lib
from mic_emu.bar import Bus, drain
from mic_emu.config import CardConfig
from mic_emu.errors import UsageError
from mic_emu.faults import ANY, NOWHERE, Counts, Fault, FaultTable, parse
from mic_emu.host.supervisor import Backend
from mic_emu.layout import CONSTANTS as C
from mic_emu.log import Log

QUIET_S = 0.25  # at most one event per filter in this time
SCIF = "scif"
SPENT = "has reached its count"  # what it did is final


def configured(config: CardConfig, name: str) -> list[Fault]:
    """The filters of a card's configuration. Raises UsageError, also for devices that it will not have."""
    found = [parse(words, f"{name}: fault {i + 1}") for i, words in enumerate(config.fault)]
    for fault in found:
        _check_device(fault, name, _planned(config))
    return found


def _planned(config: CardConfig) -> dict[str, str]:
    """Kinds by name of the devices that a boot brings (host/devices.py)."""
    names = {"console": "console"}
    if config.net != "none":
        names["net"] = "net"
    if config.disk != "none":
        names |= {"block": "block", "vda": "block"}
    return names


def _check_device(fault: Fault, card: str, kinds: dict[str, str]) -> None:
    name = fault.device
    if name is None or (name == SCIF and fault.kind.points == ("DOORBELL",)):
        return
    disk = fault.kind.points == ("DISK",)
    known = [n for n, kind in kinds.items() if kind == "block" or not disk]
    if name in kinds and name not in known:
        raise UsageError(f"{card}: {fault.kind.name} is for disks, and {name} is none: {', '.join(known)}")
    if name not in known:
        also = [] if disk else [SCIF]
        raise UsageError(f"{card} has no device {name!r}; devices: {', '.join([*known, *also]) or 'none'}")


class CardFaults:
    """Filters by number. ``backends``, ``os_pid`` and ``is_online`` show the card as it is now."""

    def __init__(
        self, card: str, bus: Bus, log: Log, backends: Callable[[], list[Backend]], os_pid: Callable[[], int],
        is_online: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._card = card
        self._bus = bus
        self._table = FaultTable(bus.faults)
        self._log = log
        self._backends = backends
        self._os_pid = os_pid
        self._is_online = is_online
        self._from_file: set[int] = set()
        self._told: dict[int, int] = {}  # hits that events have told
        self._quiet: dict[int, asyncio.TimerHandle] = {}
        self._alarms: dict[int, tuple[int, asyncio.TimerHandle]] = {}  # by time: for which card OS
        self._hung: dict[int, int] = {}  # filter -> the card OS that it stopped
        self._letters: dict[Backend, str] = {}
        self._line = int(bus.fds[lib.MIC_FD_FAULT_HIT])
        asyncio.get_running_loop().add_reader(self._line, self._rung)

    def close(self) -> None:
        """The slot goes: nothing is told any more."""
        asyncio.get_running_loop().remove_reader(self._line)
        for handle in [*self._quiet.values(), *(h for _, h in self._alarms.values())]:
            handle.cancel()

    # --- add, remove, list ----------------------------------------------------------------------------

    def add(self, fault: Fault, config: CardConfig, from_file: bool = False) -> int:
        """Put a filter in; returns its number. Raises UsageError (device), OSError ENOSPC."""
        self._name_disks()
        up = self._is_online()
        _check_device(fault, self._card, self._present() if up else _planned(config))
        number = self._table.install(fault, self._target(fault))
        self._told[number] = 0
        if from_file:
            self._from_file.add(number)
        text = f"fault {number} added: {fault}"
        seed = fault.given.get("seed", number)
        self._log.info(text, event="fault-added", fault=number, seed=seed, **self._fields(fault))
        self.follow()
        return number

    def configure(self, faults: list[Fault], config: CardConfig) -> None:
        """The configuration's filters are now these; those of the command line stay."""
        for number in sorted(self._from_file):
            self.remove(number, "the configuration has changed")
        for fault in faults:
            self.add(fault, config, from_file=True)

    def remove(self, number: int, why: str = "removed") -> Counts:
        """Take a filter out; a card OS that it stopped goes on. Raises UsageError."""
        fault = self.get(number)
        self._tell(number, fault)
        counts = self._table.remove(number)
        if fault.kind.name == "doorbell-drop" and why != SPENT:
            lib.mic_fault_ring_lost(self._bus.ptr)
        self._from_file.discard(number)
        self._told.pop(number)
        for handle in (self._quiet.pop(number, None), self._alarms.pop(number, (0, None))[1]):
            if handle:
                handle.cancel()
        hung = self._hung.pop(number, 0)
        if hung and hung == self._os_pid() and hung not in self._hung.values():
            _signal(hung, signal.SIGCONT)
        self._log.info(
            f"fault {number} {why}: {fault}, {counts.hits} times", event="fault-removed", fault=number, why=why,
            seen=counts.seen, hits=counts.hits, **self._fields(fault),
        )  # fmt: skip
        return counts

    def get(self, number: int) -> Fault:
        """A filter by number. Raises UsageError."""
        fault = self._table.faults.get(number)
        if fault is None:
            known = ", ".join(str(n) for n in self._table.faults) or "none"
            raise UsageError(f"{self._card} has no fault {number}; faults: {known}")
        return fault

    def from_command(self) -> list[Fault]:
        """Those that a person added, in their order."""
        return [f for n, f in self._table.faults.items() if n not in self._from_file]

    def numbers(self) -> list[int]:
        """All filters."""
        return list(self._table.faults)

    def rows(self) -> list[dict[str, Any]]:
        """What ``micemu fault list --json`` prints."""
        rows = []
        for number, fault in self._table.faults.items():
            counts = self._table.counts(number)
            rows.append({
                "id": number, **fault.words(), "seed": fault.given.get("seed", number), "count": fault.count,
                "seen": counts.seen, "hits": counts.hits,
                "origin": "configuration" if number in self._from_file else "command",
                "waits": fault.device is not None and self._target(fault) == NOWHERE,
            })  # fmt: skip
        return rows

    @staticmethod
    def _fields(fault: Fault) -> dict[str, Any]:
        return {"kind": fault.kind.name, "words": {k: v for k, v in fault.words().items() if k != "kind"}}

    # --- devices --------------------------------------------------------------------------------------

    def _name_disks(self) -> None:
        """vda, vdb, ... as the card's driver gives them: the first free letter when it starts."""
        running = [b for b in self._backends() if b.kind == "block" and b.device is not None]
        self._letters = {b: letter for b, letter in self._letters.items() if b in running}
        for backend in running:
            if backend not in self._letters:
                taken = self._letters.values()
                self._letters[backend] = next(c for c in string.ascii_letters if c not in taken)

    def _present(self) -> dict[str, str]:
        names = {b.name: b.kind for b in self._backends()}
        return names | {f"vd{letter}": "block" for letter in self._letters.values()}

    def _target(self, fault: Fault) -> int:
        """What C knows the filter's device by."""
        if fault.device is None:
            return ANY
        if fault.device == SCIF:
            return int(C["FAULT_TARGET_SCIF"])
        for backend in self._backends():
            names = (backend.name, f"vd{self._letters.get(backend, '')}")
            if fault.device in names and backend.device is not None:
                return backend.device.slot.off
        return NOWHERE

    def follow(self) -> None:
        """Devices, card OS or state have changed: filters go with them."""
        self._name_disks()
        for number, fault in self._table.faults.items():
            if fault.device is not None:
                self._table.aim(number, self._target(fault))
            if fault.by_time:
                self._set_alarm(number, fault)
            hung = self._hung.get(number)
            if hung and hung != self._os_pid():
                del self._hung[number]
                self._finish_spent(number, fault)

    # --- what the host does itself ------------------------------------------------------------------------

    def _set_alarm(self, number: int, fault: Fault) -> None:
        """Hang or kill this card OS when its time has come: from now, or from its coming online."""
        pid = self._os_pid()
        old = self._alarms.get(number)
        if old and old[0] != pid:
            self._alarms.pop(number)[1].cancel()
            old = None
        if old or not pid or not self._is_online() or self._spent(number, fault):
            return
        delay_s = (fault["delay"] or 0) / 1e9
        handle = asyncio.get_running_loop().call_later(delay_s, self._strike, number, fault, pid)
        self._alarms[number] = (pid, handle)

    def _strike(self, number: int, fault: Fault, pid: int) -> None:
        if pid != self._os_pid():
            return
        self._table.count_hit(number)
        if fault.kind.effect == "KILL":
            _signal(pid, signal.SIGKILL)
        self._report(number)

    # --- events -----------------------------------------------------------------------------------------

    def _rung(self) -> None:
        drain(self._line)
        for number in list(self._table.faults):
            if number not in self._quiet:
                self._report(number)

    def _report(self, number: int) -> None:
        """Tell of the hits since the last time, then be quiet for a while."""
        fault = self._table.faults[number]
        if not self._tell(number, fault):
            return
        if fault.kind.effect == "HANG" and number not in self._hung and self._os_pid():
            self._hung[number] = self._os_pid()
            _signal(self._os_pid(), signal.SIGSTOP)  # at a doorbell it has only begun to
        if not self._finish_spent(number, fault):
            loop = asyncio.get_running_loop()
            self._quiet[number] = loop.call_later(QUIET_S, self._listen, number)

    def _tell(self, number: int, fault: Fault) -> bool:
        """One event for the hits that were not told yet; False: there are none."""
        hits = self._table.counts(number).hits
        times = hits - self._told[number]
        if fault.kind.effect == "LINK" or times <= 0:
            return False
        self._told[number] = hits
        self._log.info(
            f"fault {number} triggered: {fault.kind.name}, {times} times", event="fault-triggered", fault=number,
            times=times, hits=hits, **self._fields(fault),
        )  # fmt: skip
        return True

    def _listen(self, number: int) -> None:
        del self._quiet[number]
        self._table.listen_again(number)
        self._report(number)  # what happened meanwhile rang nobody

    def _spent(self, number: int, fault: Fault) -> bool:
        return 0 < fault.count <= self._table.counts(number).hits

    def _finish_spent(self, number: int, fault: Fault) -> bool:
        """Remove a filter that has reached its count; one that holds a card OS stays until that ends."""
        if not self._spent(number, fault) or number in self._hung:
            return False
        self.remove(number, SPENT)
        return True


def _signal(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass
