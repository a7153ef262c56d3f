"""Which tests can run here: peers, root, namespaces, long runs. Fixtures come from the plugin, mic_emu.testing.plugin."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


LIMIT = pytest.StashKey[tuple[float, float]]()  # start and seconds of a test's time limit


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """pytest-timeout starts its clock."""
    item.stash[LIMIT] = time.monotonic(), settings.timeout


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A time limit that strikes inside an asyncio task ends that task, which keeps the failure for itself, and the test may
    go on and pass. It has failed."""
    outcome: Any = yield
    began, seconds = item.stash.get(LIMIT, (0.0, 0.0))
    if seconds and not outcome.excinfo and time.monotonic() - began > seconds:
        outcome.force_exception(pytest.fail.Exception(f"Timeout (>{seconds}s) in a background task"))
