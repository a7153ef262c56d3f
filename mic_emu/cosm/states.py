"""COSM states, shutdown statuses and the table of transitions (COSM 2).

``crashed`` is a shutdown status, not a state. The table is the only place that knows which event
is allowed where; the documentation's picture and the test of forbidden pairs come from it.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping

from mic_emu.errors import StateError


class State(enum.IntEnum):
    """What sysfs ``state`` shows, by value (COSM 2.1)."""

    READY = 0
    BOOTING = 1
    ONLINE = 2
    SHUTTING_DOWN = 3
    RESETTING = 4
    RESET_FAILED = 5

    @property
    def word(self) -> str:
        return self.name.lower()


class Status(enum.IntEnum):
    """Shutdown status (COSM 2.2)."""

    NOP = 0
    CRASHED = 1
    HALTED = 2
    POWEROFF = 3
    RESTART = 4

    @property
    def word(self) -> str:
        return self.name.lower()


class Event(enum.Enum):
    """What moves a card from state to state."""

    BOOT = "boot"
    BOOT_BARE = "boot of something that is not Linux"
    CONNECTED = "connected"
    SHUTDOWN = "shutdown"
    STATUS = "shutdown status received"
    HEARTBEAT_LOST = "heartbeat lost"
    RESET = "reset"
    STOP = "stop"
    FIRMWARE_READY = "firmware ready"
    FIRMWARE_SILENT = "firmware silent"


S, E = State, Event
NEXT: Mapping[tuple[State, Event], State] = {
    (S.READY, E.BOOT): S.BOOTING,  # T1
    (S.READY, E.BOOT_BARE): S.ONLINE,  # T2; the X100 refuses such boot modes before (COSM-16)
    (S.BOOTING, E.CONNECTED): S.ONLINE,  # T7
    (S.ONLINE, E.CONNECTED): S.ONLINE,  # T8
    (S.ONLINE, E.SHUTDOWN): S.SHUTTING_DOWN,  # T10
    **{
        (s, E.STATUS): S.SHUTTING_DOWN for s in (S.ONLINE, S.SHUTTING_DOWN)
    },  # T14; a late one of an old connection is lost
    (S.ONLINE, E.HEARTBEAT_LOST): S.SHUTTING_DOWN,  # T16
    **{(s, E.RESET): S.RESETTING for s in S if s is not S.READY},  # T18, T19
    **{(s, E.STOP): S.RESETTING for s in S},  # T22, T23, T25
    (S.READY, E.FIRMWARE_READY): S.READY,  # T4
    (S.READY, E.FIRMWARE_SILENT): S.RESET_FAILED,
    (S.RESETTING, E.FIRMWARE_READY): S.READY,  # T21
    (S.RESETTING, E.FIRMWARE_SILENT): S.RESET_FAILED,
}


def step(state: State, event: Event) -> State:
    """The next state. Raises StateError (EINVAL) for a pair that the table does not have."""
    try:
        return NEXT[state, event]
    except KeyError:
        raise StateError(f"{event.value} is not allowed in state {state.word}", errno.EINVAL) from None
