"""Fixtures of the hardware tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hwcard import make_bus

from mic_emu.bar import Bus


@pytest.fixture
def bus() -> Iterator[Bus]:
    """64 MiB of GDDR, 40 GiB of host memory, no configuration space."""
    with make_bus() as b:
        yield b
