"""Places of windows: first fit, whatever was taken and given back before (SCIF 2.10)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError
from mic_emu.scif.ras import FIRST_AUTOMATIC, Space, Window

SPAN = 24  # pages around the first automatic offset that the model keeps
BELOW = 6  # of them are below it
steps = st.lists(
    st.one_of(
        st.tuples(st.just("any"), st.integers(1, 4)),
        st.tuples(st.just("fixed"), st.integers(0, SPAN - 1), st.integers(1, 6)),
        st.tuples(st.just("remove"), st.integers(0, 99)),
    ),
    max_size=60,
)


@given(steps)
def test_scif_82_an_automatic_offset_is_the_first_that_fits(todo: list[tuple[str, int, int]]) -> None:
    """The same as a search from 2^62 upwards through a list of taken pages."""
    space: Space[Window] = Space()
    windows: list[Window] = []
    base = FIRST_AUTOMATIC - BELOW * PAGE

    def taken() -> set[int]:
        return {p for w in windows for p in range(w.offset, w.end, PAGE)}

    for key, (what, *args) in enumerate(todo):
        if what == "remove":
            if windows:
                space.remove(windows.pop(args[0] % len(windows)))
            continue
        if what == "any":
            length = args[0] * PAGE
            at = space.free_offset(length)
            fits = (
                p
                for p in itertools.count(FIRST_AUTOMATIC, PAGE)
                if not taken() & set(range(p, p + length, PAGE))
            )
            assert at == next(fits)
            new = Window(key, at, length, 3)
        else:
            new = Window(key, base + args[0] * PAGE, args[1] * PAGE, 3)
        if taken() & set(range(new.offset, new.end, PAGE)):
            with pytest.raises(ScifError, match="overlaps"):
                space.add(new)
        else:
            space.add(new)
            windows.append(new)
