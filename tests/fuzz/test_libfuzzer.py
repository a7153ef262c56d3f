"""The libFuzzer targets of native/fuzz: build, corpus, and a moment of mutations (long form: make fuzz)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = sorted(p.stem.removeprefix("fuzz_") for p in (ROOT / "native/fuzz").glob("fuzz_*.c"))


@pytest.mark.peer("clang")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_native_corpus_and_a_moment_more(name: str) -> None:
    """Every input of the corpus, then two seconds of others: no crash, no sanitizer report, no hang."""
    assert any((ROOT / "native/fuzz/corpus" / name).iterdir())
    done = subprocess.run(
        ["sh", ROOT / "native/fuzz/run.sh", "2", name],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "stat::number_of_executed_units" in done.stderr
