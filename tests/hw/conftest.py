"""Fixtures of the hardware tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dmalab import Lab, make_lab

from mic_emu.bar import Bus
from mic_emu.dma import DmaChannel


@pytest.fixture
def bus(bar: Bus) -> Bus:
    """64 MiB of GDDR, 40 GiB of host memory, no configuration space."""
    return bar


@pytest.fixture
def lab() -> Iterator[Lab]:
    with make_lab() as made:
        yield made


@pytest.fixture(params=[0, 4], ids=["host", "card"])
def chan(lab: Lab, request: pytest.FixtureRequest) -> Iterator[DmaChannel]:
    """One channel of each side with the real ring."""
    with lab.channel(request.param) as ch:
        yield ch
