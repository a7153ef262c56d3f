"""SMPT: HW-5 to HW-11."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import pytest
from hwcard import GiB, new_card
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu.bar import Bus
from mic_emu.host.smpt import BASE, ENTRIES, PAGE_SHIFT, PAGE_SIZE, Smpt

LOG = logging.getLogger("test.smpt")


@pytest.fixture
def smpt(bus: Bus) -> Smpt:
    table = Smpt(bus, LOG)
    table.init()
    return table


def registers(bus: Bus) -> list[int]:
    return [bus.read("smpt", i) for i in range(ENTRIES)]


def snapshot(smpt: Smpt) -> tuple[object, ...]:
    return (*smpt.rows(), smpt.mapped_bytes, smpt.map_count, smpt.unmap_count)


def test_hw_05_identity_after_probe(bus: Bus, smpt: Smpt) -> None:
    """HW-5: register i reads i << 2 with bit 0 clear, all 32."""
    assert registers(bus) == [i << 2 for i in range(ENTRIES)]
    assert [(r.host_addr, r.refs) for r in smpt.rows()] == [(i << PAGE_SHIFT, 0) for i in range(ENTRIES)]


def test_hw_06_maps_below_512_gib_keep_their_address(smpt: Smpt) -> None:
    """HW-6: the chapter's two examples: card address = base + host address, references in bytes."""
    assert smpt.map(0x1_2345_6000, 0x1000) == 0x81_2345_6000
    assert smpt.map(0x3_FFFF_F000, 0x2000) == 0x83_FFFF_F000
    refs = [r.refs for r in smpt.rows()]
    assert refs[0] == 0x2000
    assert refs[1] == 0x1000
    assert smpt.mapped_bytes == 0x3000
    assert smpt.map_count == 2
    smpt.unmap(0x83_FFFF_F000, 0x2000)
    assert [r.refs for r in smpt.rows()][:2] == [0x1000, 0]
    assert smpt.unmap_count == 1


def test_hw_07_far_address_takes_the_first_free_entry(bus: Bus, smpt: Smpt) -> None:
    """HW-7: beyond 512 GiB the first entry without references is retargeted, and only that one."""
    smpt.map(0x1000, 0x1000)  # the device page sits in entry 0
    assert smpt.map(0x80_0000_1000, 0x1000) == 0x84_0000_1000
    assert registers(bus) == [0, 32 << 2, *(i << 2 for i in range(2, ENTRIES))]


def test_hw_07_referenced_entries_are_never_retargeted(bus: Bus, smpt: Smpt) -> None:
    """HW-7: with every entry in use a far map fails; with a hole it takes the hole."""
    for i in range(ENTRIES):
        assert smpt.map(i * PAGE_SIZE, 4096) == BASE + i * PAGE_SIZE
    before = snapshot(smpt)
    assert smpt.map(600 * GiB, 4096) == 0
    assert snapshot(smpt) == before
    smpt.unmap(BASE + 9 * PAGE_SIZE, 4096)
    assert smpt.map(608 * GiB, 4096) == BASE + 9 * PAGE_SIZE
    assert bus.read("smpt", 9) == 38 << 2


def test_hw_07_partial_match_falls_through_to_free_entries(smpt: Smpt) -> None:
    """HW-7: a run that matches only in part is not reused in part (decision of host/smpt.py)."""
    last = (ENTRIES - 1) * PAGE_SIZE
    card = smpt.map(last, 2 * PAGE_SIZE)  # entry 31 shows `last`, nothing shows the page after it
    assert card == BASE
    assert [r.host_addr for r in smpt.rows()][:2] == [last, last + PAGE_SIZE]


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0x1000, 0),
        (0, ENTRIES * PAGE_SIZE + 1),
        (4096, ENTRIES * PAGE_SIZE),  # unaligned 512 GiB: 33 pieces
        (0, -1),
        (-4096, 4096),
        ((1 << 64) - 4096, 8192),
    ],
)
def test_hw_08_impossible_maps_change_nothing(smpt: Smpt, addr: int, size: int) -> None:
    """HW-8: size 0, more than 512 GiB, more than 32 pieces, outside 64 bits: result 0."""
    before = snapshot(smpt)
    assert smpt.map(addr, size) == 0
    assert snapshot(smpt) == before


def test_hw_08_no_run_long_enough(smpt: Smpt) -> None:
    """HW-8: 31 free entries that are not in a row do not hold 17."""
    smpt.map(15 * PAGE_SIZE, 4096)
    assert smpt.map(1 << 45, 17 * PAGE_SIZE) == 0
    assert smpt.map(1 << 45, 16 * PAGE_SIZE) == BASE + 16 * PAGE_SIZE


def test_hw_08_whole_window_maps(smpt: Smpt) -> None:
    """HW-8: exactly 512 GiB, aligned, is possible."""
    assert smpt.map(0, ENTRIES * PAGE_SIZE) == BASE


def test_hw_09_unmap_outside_the_window_is_logged(smpt: Smpt, caplog: pytest.LogCaptureFixture) -> None:
    """HW-9: an address outside the window is logged and ignored, size 0 silently."""
    before = snapshot(smpt)
    smpt.unmap(0x1000, 0x1000)
    smpt.unmap(BASE + ENTRIES * PAGE_SIZE - 4096, 8192)
    assert len(caplog.records) == 2
    smpt.unmap(0x1000, 0)
    assert len(caplog.records) == 2
    assert snapshot(smpt) == before


def test_hw_09_over_unmap_goes_negative(smpt: Smpt, caplog: pytest.LogCaptureFixture) -> None:
    """HW-9: more than was mapped: a warning, and the negative count is kept."""
    card = smpt.map(0x1000, 0x1000)
    smpt.unmap(card, 0x3000)
    assert smpt.rows()[0].refs == -0x2000
    assert "below zero" in caplog.text


def test_hw_09_unmap_to_zero_keeps_the_register(bus: Bus, smpt: Smpt) -> None:
    """HW-9: an entry without references still translates, and the next map reuses it."""
    far = 600 * GiB
    card = smpt.map(far, 4096)
    value = bus.read("smpt", 0)
    smpt.unmap(card, 4096)
    assert bus.read("smpt", 0) == value
    smpt.map(PAGE_SIZE, 4096)
    assert smpt.map(far, 4096) == card


def test_hw_10_restore_rewrites_all_registers(bus: Bus, smpt: Smpt) -> None:
    """HW-10: whatever a reset left in the registers, restore makes them the software table."""
    smpt.map(600 * GiB, 4096)
    good = registers(bus)
    for i in range(ENTRIES):
        bus.hw_store("smpt", 0xDEAD0000 + i, i)
    smpt.restore()
    assert registers(bus) == good


def test_hw_11_entry_without_memory_is_an_error(bus: Bus, smpt: Smpt) -> None:
    """HW-11: a card access beyond host memory fails; it never lands in other memory."""
    bus.host.write(5 * 4096, b"here")
    assert bus.card_view(smpt.map(5 * 4096, 4096), 4).read(0, 4) == b"here"
    far = smpt.map(32 * GiB + 12 * GiB, 4096)  # host memory ends at 40 GiB
    assert far
    with pytest.raises(IndexError):
        bus.card_view(far, 4)
    with pytest.raises(IndexError):  # the last byte counts
        bus.card_view(smpt.map(40 * GiB - 4096, 4096), 4097)


def test_hw_11_second_entry_of_host_memory(bus: Bus, smpt: Smpt) -> None:
    """HW-11: host memory larger than one entry is reached through the entry that shows it."""
    bus.host.write(PAGE_SIZE + 64, b"second entry")
    card = smpt.map(PAGE_SIZE + 64, 64)
    assert bus.card_view(card, 12).read(0, 12) == b"second entry"


def test_hw_09_card_to_host_translation(smpt: Smpt) -> None:
    """HW 3: card to host is the inverse of map; outside the window EINVAL."""
    assert smpt.to_host(smpt.map(700 * GiB + 0x123000, 4096)) == 700 * GiB + 0x123000
    for outside in (0, BASE - 1, BASE + ENTRIES * PAGE_SIZE):
        with pytest.raises(OSError, match="outside") as e:
            smpt.to_host(outside)
        assert e.value.errno == errno.EINVAL


def test_hw_09_uninit_names_what_is_still_mapped(smpt: Smpt, caplog: pytest.LogCaptureFixture) -> None:
    """HW 3: leaving with references is reported per entry."""
    smpt.map(3 * PAGE_SIZE, 4096)
    smpt.uninit()
    assert "entry 3 still has 4096 bytes" in caplog.text


@pytest.fixture(scope="module")
def shared_bus() -> Iterator[Bus]:
    with new_card(host=4096) as b:
        yield b


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 80), st.integers(0, PAGE_SIZE - 1), st.integers(1, 5 * PAGE_SIZE)),
        min_size=1,
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_hw_07_random_maps_translate_back(
    shared_bus: Bus, asked: list[tuple[int, int, int]], rnd: object
) -> None:
    """HW-6..9: whatever is mapped, every live byte translates back, registers equal the table."""
    smpt = Smpt(shared_bus, LOG)
    smpt.init()
    live: list[tuple[int, int, int]] = []
    for page, inside, size in asked:
        host = page * PAGE_SIZE + inside
        card = smpt.map(host, size)
        if card:
            live.append((card, host, size))
        if live and rnd.random() < 0.4:  # type: ignore[attr-defined]
            card, _, size = live.pop(rnd.randrange(len(live)))  # type: ignore[attr-defined]
            smpt.unmap(card, size)
        for card, host, size in live:
            for delta in (0, size // 2, size - 1):
                assert smpt.to_host(card + delta) == host + delta
    assert [r.register for r in smpt.rows()] == [r.host_addr >> PAGE_SHIFT << 2 for r in smpt.rows()]
    assert sum(r.refs for r in smpt.rows()) == sum(size for _, _, size in live)


def test_hw_11_a_view_does_not_cross_entries(bus: Bus, smpt: Smpt) -> None:
    """HW-11: entries need not be neighbours in host memory, so one view ends at the boundary."""
    bus.write("smpt", 1 << 2, 0)
    bus.card_view(BASE + PAGE_SIZE - 64, 64)
    with pytest.raises(IndexError):
        bus.card_view(BASE + PAGE_SIZE - 64, 65)
