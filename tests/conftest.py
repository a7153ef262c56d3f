"""Which tests can run here: peers, root, namespaces, long runs. Fixtures come from the plugin, mic_emu.testing.plugin."""

from __future__ import annotations

import os
from pathlib import Path

import needs
import pytest

# What hypothesis keeps between runs names files by their absolute path: it belongs to the build.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parents[1] / "build/hypothesis"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.peer("nbdinfo")``: skip when the program is missing, fail where CI promises it."""
    for mark in item.iter_markers("peer"):
        needs.programs(*mark.args)
    if item.get_closest_marker("root"):
        needs.root()
    if item.get_closest_marker("contained"):
        needs.contained_cards()
    if item.get_closest_marker("tap"):
        needs.tap()
    if item.get_closest_marker("soak") and os.environ.get("MICEMU_SOAK") != "1":
        pytest.skip("long run: make soak")
