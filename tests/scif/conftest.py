"""Fixtures of the SCIF tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scif_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Node 0 and two cards in a process of their own."""
    s = Server(tmp_path_factory.mktemp("fabric"), 2)
    yield s
    assert s.stop() == 0
