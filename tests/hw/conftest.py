"""Fixtures of the hardware tests."""

from __future__ import annotations

import pytest

from mic_emu.bar import Bus


@pytest.fixture
def bus(bar: Bus) -> Bus:
    """64 MiB of GDDR, 40 GiB of host memory, no configuration space."""
    return bar
