"""Which tests can run here: peers, root, long runs. Fixtures come from the plugin, mic_emu.testing.plugin."""

from __future__ import annotations

import os
import shutil

import pytest

# What hypothesis keeps between runs names files by their absolute path: it belongs to the build.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "build/hypothesis")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.peer("nbdinfo")``: skip when the program is missing, fail where CI promises it."""
    for mark in item.iter_markers("peer"):
        missing = [
            p for p in mark.args if shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None
        ]
        if missing and os.environ.get("MICEMU_REQUIRE_PEERS") == "1":
            pytest.fail(f"peer programs are missing and MICEMU_REQUIRE_PEERS=1: {', '.join(missing)}")
        if missing:
            pytest.skip(f"peer programs are missing: {', '.join(missing)}")
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    if item.get_closest_marker("soak") and os.environ.get("MICEMU_SOAK") != "1":
        pytest.skip("long run: make soak")
