"""The card's sixteen doorbells: the least used one goes to the next owner (HW 4.4, HW-19)."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from mic_emu import layout as L
from mic_emu.bar import Bus, drain

C = L.CONSTANTS
BOOT_LINE = 7  # its register still holds the bootstrap's vector (HW 4.1)


@dataclass
class Line:
    """One requested doorbell; ``fd`` is readable when the host rang it."""

    owner: CardInterrupts
    doorbell: int
    fd: int
    name: str

    def free(self) -> None:
        """Give it back; may be repeated."""
        self.owner.free(self)


class CardInterrupts:
    """Owner of the card's interrupt lines."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._users: list[Line | None] = [None] * C["CARD_DOORBELLS"]

    def request(self, name: str) -> Line:
        """The lowest free doorbell. Raises OSError EBUSY when all are taken: lines are not shared."""
        for db, user in enumerate(self._users):
            if user is None:
                fd = self._bus.irq_fd(db)
                if db == BOOT_LINE:
                    self._bus.write("apicicr", 0, db)  # ours, or each ring would be a boot interrupt, too
                drain(fd)  # a ring for the last owner is not ours
                line = self._users[db] = Line(self, db, fd, name)
                return line
        raise OSError(errno.EBUSY, f"{name}: all {len(self._users)} doorbells of the card are taken")

    def free(self, line: Line) -> None:
        if self._users[line.doorbell] is line:
            self._users[line.doorbell] = None
