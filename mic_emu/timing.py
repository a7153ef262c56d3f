"""Timing profiles: how fast emulated time runs (see ``clock``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Factors applied to the specification's times."""

    name: str
    delay: float
    limit: float


PROFILES = {
    "x100": Profile("x100", 1.0, 1.0),
    "fast": Profile("fast", 0.02, 0.25),
    "test": Profile("test", 0.02, 0.1),  # for tests that wait for a limit: a busy machine may look broken
}
