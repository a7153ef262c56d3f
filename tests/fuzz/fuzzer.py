"""A small coverage-guided byte fuzzer for parsers that are Python: the idea of libFuzzer, in one file.

``python tests/fuzz/fuzzer.py SECONDS [TARGET ...]`` runs targets of ``targets.py`` (``make fuzz`` does).
Inputs that reach a new pair of lines of the watched files are kept under ``build/fuzz/TARGET/corpus``;
an input on which the target raises is written beside it, the exception is printed, and the run fails.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

MAX_LEN = 8192
INTERESTING = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    24,
    127,
    128,
    255,
    256,
    4095,
    4096,
    0x7FFF,
    0xFFFF,
    1 << 31,
    (1 << 32) - 1,
)


class Coverage:
    """Pairs of lines that ran one after the other in the watched files."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = frozenset(files)
        self._seen: dict[CodeType, bool] = {}
        self.pairs: set[tuple[CodeType, int, int]] = set()

    def __enter__(self) -> set[tuple[CodeType, int, int]]:
        self.pairs = set()
        sys.settrace(self._call)
        return self.pairs

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code not in self._seen:
            # Code of one line takes no decision: following it costs more than it tells.
            self._seen[code] = code.co_filename in self._files and len({n for _, _, n in code.co_lines()}) > 2
        if not self._seen[code]:
            return None
        last = 0

        def line(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            nonlocal last
            self.pairs.add((code, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line


def mutate(rng: random.Random, seed: bytes, other: bytes) -> bytes:
    """One to eight random changes; ``other`` is a second input to borrow from."""
    out = bytearray(seed)
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.randrange(256)
            case 2:
                word = rng.choice(INTERESTING).to_bytes(4, "little")[: rng.choice((1, 2, 4))]
                out[at : at + len(word)] = word
            case 3:
                del out[at : at + rng.randrange(1, 32)]
            case 4:
                out[at:at] = rng.randbytes(rng.randrange(1, 16))
            case 5 if other:
                start = rng.randrange(len(other))
                piece = other[start : start + rng.randrange(1, 64)]
                out[at : at + len(piece)] = piece
            case _:
                piece = out[at : at + rng.randrange(1, 48)]
                out[at:at] = piece
    return bytes(out[:MAX_LEN])


@dataclass
class Result:
    """What a run did. ``crash``: the input on which the target raised, and the exception."""

    execs: int = 0
    pairs: int = 0
    corpus: list[bytes] = field(default_factory=list)
    crash: tuple[bytes, Exception] | None = None


def fuzz(
    target: Callable[[bytes], None],
    files: Iterable[str],
    seeds: Iterable[bytes],
    enough: Callable[[int], bool],
    rng_seed: int,
) -> Result:
    """Run ``target`` on the seeds, then on mutations of what was useful, until ``enough(runs)``."""
    rng = random.Random(rng_seed)
    coverage, known, result = Coverage(files), set[Any](), Result()
    todo = list(seeds) or [b""]
    while todo or not enough(result.execs):
        case = todo.pop() if todo else mutate(rng, rng.choice(result.corpus), rng.choice(result.corpus))
        result.execs += 1
        try:
            with coverage as pairs:
                target(case)
        except Exception as e:
            result.crash = (minimise(target, case, type(e)), e)
            break
        if not pairs <= known or not result.corpus:
            known |= pairs
            result.corpus.append(case)
    result.pairs = len(known)
    return result


def minimise(target: Callable[[bytes], None], case: bytes, kind: type[Exception]) -> bytes:
    """Cut pieces out of ``case`` while it still raises ``kind``."""

    def fails(candidate: bytes) -> bool:
        try:
            target(candidate)
        except Exception as e:
            return type(e) is kind
        return False

    piece = max(1, len(case) // 2)
    while piece:
        at = 0
        while at < len(case):
            shorter = case[:at] + case[at + piece :]
            if fails(shorter):
                case = shorter
            else:
                at += piece
        piece //= 2
    return case


def main(argv: list[str]) -> int:
    """Command line of ``make fuzz``."""
    import targets

    seconds, names = float(argv[0]) if argv else 60.0, argv[1:] or list(targets.TARGETS)
    here = Path(__file__).parent
    failed = 0
    for name in names:
        make, files = targets.TARGETS[name]
        out = here.parents[1] / "build" / "fuzz" / name / "corpus"
        out.mkdir(parents=True, exist_ok=True)
        seeds = [p.read_bytes() for folder in (here / "corpus" / name, out) for p in sorted(folder.glob("*"))]
        print(f"== fuzz {name}, {seconds:g} s, {len(seeds)} seeds", flush=True)
        end = time.monotonic() + seconds
        with make() as target:
            result = fuzz(
                target, files, seeds, lambda _, end=end: time.monotonic() > end, random.randrange(1 << 30)
            )
        for i, case in enumerate(result.corpus):
            (out / f"{i:04d}").write_bytes(case)
        print(
            f"{result.execs} runs, {result.pairs} pairs of lines, {len(result.corpus)} inputs kept",
            flush=True,
        )
        if result.crash:
            failed = 1
            path = out.parent / "crash"
            path.write_bytes(result.crash[0])
            traceback.print_exception(result.crash[1])
            print(f"== the input is {path}: {result.crash[0]!r}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
