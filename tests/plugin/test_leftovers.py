"""What counts as left behind, beside other emulators that come and go on the same machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import needs
import pytest

SCRIPT = """
import subprocess, sys
from pathlib import Path
from mic_emu.testing.leftovers import Leftovers
home = Path(sys.argv[1])
before = Leftovers.now(home)
subprocess.run(["mount", "-t", "tmpfs", sys.argv[2], sys.argv[3]], check=True)
print("\\n".join(before.stay(home, within_s=0.2)))
"""


@pytest.mark.parametrize(
    ("source", "below", "left"),
    [("card", "elsewhere", True), ("something", "home/a b", True), ("something", "elsewhere", False)],
)
def test_a_mount_is_left_when_it_is_ours(tmp_path: Path, source: str, below: str, left: bool) -> None:
    """One of a card's own tree anywhere, and any below the machine's folder; what others mount is theirs."""
    needs.contained_cards()
    at = tmp_path / below
    at.mkdir(parents=True)
    words = ["unshare", "-rm", sys.executable, "-c", SCRIPT, str(tmp_path / "home"), source, str(at)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip().startswith(f"mount {at} (tmpfs {source}") is left, done.stdout
    assert bool(done.stdout.strip()) is left


def test_a_name_that_another_emulator_uses_for_a_moment_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every look some name is new, but none of them stays."""
    from mic_emu.testing import leftovers

    looks = iter([{"micemu-1"}, {"micemu-1", "micemu-2"}, {"micemu-2"}, {"micemu-2", "micemu-3"}])
    monkeypatch.setattr(leftovers.os, "listdir", lambda at: next(looks) if "shm" in at else [])
    nothing = leftovers.Leftovers(frozenset(), frozenset(), frozenset())
    assert nothing.stay(within_s=5) == []


def test_a_name_that_stays_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it: its emulator has unlinked it long ago."""
    from mic_emu.testing import leftovers

    monkeypatch.setattr(
        leftovers.os, "listdir", lambda at: ["micemu-1", "other"] if "shm" in at else ["lo", "mic7"]
    )
    nothing = leftovers.Leftovers(frozenset(), frozenset(), frozenset())
    assert nothing.stay(within_s=0.05) == ["interface mic7", "shared memory micemu-1"]
