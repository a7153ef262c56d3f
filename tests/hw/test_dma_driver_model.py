"""Random clients of the DMA driver half against a model: HW-24 to HW-30."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dmalab import Lab, make_lab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mic_emu.dma import FENCE, INTERRUPT


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    with make_lab() as made:
        yield made


AREA = 4096
offsets = st.integers(0, AREA // 64 - 1).map(lambda n: n * 64)
copies = st.lists(
    st.one_of(
        st.tuples(
            st.just("copy"), offsets, offsets, st.integers(1, 12), st.sampled_from([0, INTERRUPT, FENCE, 33])
        ),
        st.tuples(st.just("imm"), offsets, st.integers(0, 2**64 - 1)),
        st.tuples(st.just("wait")),
        st.tuples(st.just("issue")),
        st.tuples(st.just("status")),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(copies, st.sampled_from([0, 2, 4, 7]), st.integers(16, 40))
def test_hw_28_random_clients_match_a_model(
    shared: Lab, ops: list[tuple[object, ...]], c: int, size: int
) -> None:
    """HW-24..30: any mix of operations leaves memory as if executed in order; callbacks once, in order."""
    bus = shared.bus
    shared.engine.reset()
    bus.gddr.write(0, bytes(range(256)) * 32)
    model = bytearray(bus.gddr.read(0, 2 * AREA))
    ran: list[int] = []
    submitted: list[int] = []
    cookie = 0
    with shared.channel(c, ring_size=size) as ch:
        for op in ops:
            tx = None
            match op:
                case ("copy", int(dst), int(src), int(units), int(flags)):
                    tx = ch.prep_memcpy(dst, src, units * 64, flags)
                    if tx:
                        model[dst : dst + units * 64] = model[src : src + units * 64]
                case ("imm", int(dst), int(value)):
                    tx = ch.prep_imm_data(dst, value)
                    if tx:
                        model[dst : dst + 8] = value.to_bytes(8, "little")
                case ("wait",) if cookie:
                    ch.sync_wait(cookie)
                    assert ran == submitted
                case ("issue",):
                    ch.issue_pending()
                case ("status",) if cookie:
                    ch.tx_status(cookie)
            if tx:
                key = len(submitted)
                submitted.append(key)
                cookie = tx.submit(lambda key=key: ran.append(key))  # type: ignore[misc]
        if cookie:
            ch.sync_wait(cookie)
    assert ran == submitted
    assert bus.gddr.read(0, 2 * AREA) == bytes(model)
