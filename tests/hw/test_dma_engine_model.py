"""Random programs of the DMA engine against a model: HW-23 to HW-25, HW-31."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hwcard import (
    NOP,
    RawChannel,
    general_desc,
    memcpy_desc,
    new_card,
    status_desc,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.layout import CONSTANTS as C

SMPT = C["SMPT_BASE"]
AREA = 16 * 64  # bytes of GDDR and of host memory that random programs work on

address = st.tuples(st.sampled_from(["gddr", "host"]), st.integers(0, AREA - 1))
aligned = st.tuples(st.sampled_from(["gddr", "host"]), st.integers(0, 15).map(lambda n: n * 64))
program = st.lists(
    st.one_of(
        st.tuples(st.just("copy"), aligned, aligned, st.integers(1, 4)),
        st.tuples(st.just("copy"), address, address, st.integers(0, 20)),
        st.tuples(st.just("status"), address.map(lambda a: (a[0], a[1] & ~7)), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("general"), address.map(lambda a: (a[0], a[1] & ~3)), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("nop")),
        st.tuples(st.just("junk"), st.integers(0, 2**64 - 1), st.integers(4, 15).map(lambda t: t << 60)),
    ),
    min_size=1,
    max_size=40,
)


class Model:
    """The engine of HW 5.7 in a few lines: two byte areas, a count, a halt."""

    def __init__(self) -> None:
        self.memory = {"gddr": bytearray(AREA), "host": bytearray(AREA)}
        self.count = 0
        self.halted = False

    def _inside(self, where: tuple[str, int], length: int) -> bool:
        return where[1] + length <= AREA

    def run(self, op: tuple[object, ...]) -> None:
        if self.halted or not self._execute(op):
            self.halted = True
        else:
            self.count += 1

    def _execute(self, op: tuple[object, ...]) -> bool:
        match op:
            case ("nop",):
                return True
            case ("copy", (str(), int()) as src, (str(), int()) as dst, int(units)):
                length = units * 64
                if not units or src[1] % 64 or dst[1] % 64 or (src[0] == dst[0] == "host"):
                    return False
                if not self._inside(src, length) or not self._inside(dst, length):
                    return False
                self.memory[dst[0]][dst[1] : dst[1] + length] = self.memory[src[0]][src[1] : src[1] + length]
                return True
            case ("status" | "general" as kind, (str(), int()) as dst, int(value)):
                size = 8 if kind == "status" else 4
                self.memory[dst[0]][dst[1] : dst[1] + size] = value.to_bytes(size, "little")
                return True
        return False


def encode(op: tuple[object, ...], base: dict[str, int]) -> bytes:
    match op:
        case ("copy", (str(a), int(b)), (str(x), int(y)), int(units)):
            return memcpy_desc(base[a] + b, base[x] + y, units * 64)
        case ("status", (str(x), int(y)), int(value)):
            return status_desc(base[x] + y, value)
        case ("general", (str(x), int(y)), int(value)):
            return general_desc(base[x] + y, value)
        case ("junk", int(qw0), int(qw1)):
            return struct.pack("<QQ", qw0, qw1)
    return NOP


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[Bus, DmaEngine]]:
    """GDDR and host memory that end right after the area, so that overruns fault."""
    with new_card(gddr=4096 + AREA, host=AREA) as bus, DmaEngine(bus) as engine:
        yield bus, engine


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program, st.integers(2, 9), st.sampled_from([0, 1, 4, 7]))
def test_hw_24_random_programs_match_the_model(
    lab: tuple[Bus, DmaEngine], ops: list[tuple[object, ...]], size: int, c: int
) -> None:
    """HW-23, 24, 25, 31: any program, any ring size, ends as the model does, byte for byte."""
    bus, engine = lab
    engine.reset()
    bus.gddr.zero(4096, AREA)
    bus.host.zero(0, AREA)
    ch = RawChannel(bus, c, 0, size, host=False)
    ch.setup()
    model = Model()
    base = {"gddr": 4096, "host": SMPT}
    for op in ops:
        if model.halted:
            break
        ch.go(encode(op, base))
        model.run(op)
        if model.halted:
            ch.halted()
        else:
            ch.done()
    assert ch.count == model.count % size
    assert bool(ch.error) == model.halted
    assert bus.gddr.read(4096, AREA) == bytes(model.memory["gddr"])
    assert bus.host.read(0, AREA) == bytes(model.memory["host"])
