"""Limits of one length with one alarm (SCIF 3.5)."""

from __future__ import annotations

import asyncio

from mic_emu.clock import ManualClock
from mic_emu.scif.deadlines import Deadlines


def test_scif_3_5_each_deadline_is_reached_in_its_time_or_never() -> None:
    """In order, to the moment; not when it was cancelled, also by one that is due with it."""

    async def main() -> None:
        clock, reached = ManualClock(), []
        limits = Deadlines(clock, 30)
        limits.start(lambda: reached.append("a"))
        await clock.advance(10)
        gone = limits.start(lambda: reached.append("b"))
        limits.start(lambda: reached.append("c"))
        await clock.advance(10)
        limits.start(lambda: (reached.append("d"), twin.cancel()))
        twin = limits.start(lambda: reached.append("twin"))
        gone.cancel()
        gone.cancel()
        await clock.advance(9)
        assert reached == []
        await clock.advance(2)
        assert reached == ["a"]
        await clock.advance(10)
        assert reached == ["a", "c"]
        await clock.advance(10)
        assert reached == ["a", "c", "d"]
        assert len(limits) == 0
        limits.start(lambda: reached.append("e"))
        await clock.advance(31)
        assert reached[3:] == ["e"]
        limits.start(lambda: reached.append("f"))
        limits.close()
        await clock.advance(31)
        assert reached[4:] == []

    asyncio.run(main())


def test_scif_3_5_a_deadline_that_fails_does_not_take_the_others_along() -> None:
    """What its call raises goes to the loop."""

    async def main() -> None:
        clock, reached, errors = ManualClock(), [], []
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: errors.append(context["exception"])
        )
        limits = Deadlines(clock, 30)
        limits.start(lambda: 1 / 0)  # type: ignore[func-returns-value]
        limits.start(lambda: reached.append(1))
        await clock.advance(31)
        assert reached == [1]
        assert len(errors) == 1

    asyncio.run(main())
