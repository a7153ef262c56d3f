"""States of an endpoint."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Endpoint states (SCIF 2.1); Zombie is not kept: what is released is gone."""

    UNBOUND = 0
    BOUND = 1
    LISTENING = 2
    CONNECTED = 3
    CONNECTING = 4
    MAPPING = 5
    CLOSING = 6
    CLOSE_LISTENING = 7
    DISCONNECTED = 8
