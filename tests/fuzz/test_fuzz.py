"""The parsers of the host's bytes that are Python: the corpus, and a moment of mutations (long form: make fuzz)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from fuzzer import fuzz, minimise
from targets import TARGETS

MORE = 200
CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_corpus_and_a_moment_more(name: str) -> None:
    """Every input of the corpus, then some hundred others: nothing but the documented errors."""
    make, files = TARGETS[name]
    seeds = [p.read_bytes() for p in sorted((CORPUS / name).iterdir())]
    assert seeds
    with make() as target:
        result = fuzz(target, files, seeds, lambda runs: runs >= len(seeds) + MORE, rng_seed=1)
    if result.crash:
        raise AssertionError(f"{name} on {result.crash[0]!r}") from result.crash[1]
    assert len(result.corpus) > 5, "the target decides nothing"


def test_fuzzer_finds_a_planted_bug() -> None:
    """The fuzzer reaches a branch that no seed reaches, and cuts the input down to what matters."""

    def planted(case: bytes) -> None:
        for i, letter in enumerate(b"MIC"):
            if case[i : i + 1] != bytes([letter]):
                return
            if i == 0:
                continue
            if i == 1:
                continue
            raise IndexError("planted")

    result = fuzz(planted, [__file__], [b"Mxyz"], lambda runs: runs > 1_000_000, rng_seed=1)
    assert result.crash
    assert result.crash[0] == b"MIC"
    assert minimise(planted, b"MIC and more", IndexError) == b"MIC"
