"""Fixtures of the hardware tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def image(tmp_path: Path) -> str:
    """Path of a file to download as a card image; its content does not matter."""
    path = tmp_path / "uos.img"
    path.write_bytes(b"image " * 1000)
    return str(path)


@pytest.fixture(params=[0, 4], ids=["host", "card"])
def chan(lab: Lab, request: pytest.FixtureRequest) -> Iterator[DmaChannel]:
    """One channel of each side with the real ring."""
    with lab.channel(request.param) as ch:
        yield ch
