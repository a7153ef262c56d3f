"""``micemu dump``: registers in words, interrupt counts, chains of rings whatever the card wrote there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_emu import layout as L
from mic_emu.bar import Bus
from mic_emu.cli import dump as text
from mic_emu.fields import FIELDS, decode, device_type, feature_words, status_words, words
from mic_emu.host import inspection
from mic_emu.host.inspection import _chain
from mic_emu.layout import CONSTANTS as C

NEXT, WRITE, INDIRECT = (C[f"VRING_DESC_F_{n}"] for n in ("NEXT", "WRITE", "INDIRECT"))
REGISTERS = [name for _, name, _ in L.register_words()]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("postcode", 0x4646, "code FF"), ("smpt[3]", 0xC, "host_address 0xc00000000"),
        ("sicr0", 0x40000102, "sources db1 dma0 err"),
        ("mxar[4]", 0x8, "sources db3"), ("dcr", 0xAAFD, "channels 0h- 1h+ 2h+ 3h+ 4c+ 5c+ 6c+ 7c+"),
        ("dcar[1]", 1 << 25 | 1 << 24, "mask_card, mask_host"), ("dstat[0]", 1 << 29 | 1 << 31 | 12, "count 0xc, halted, error"),
        ("dcherr[7]", 0x12, "errors ring align"), ("drar_hi[2]", 0x41FFFC0, "address_high 0, size 0x1fffc, smpt 0, system"),
        ("apicicr[7]", 0x20E5, "vector 0xe5, send"), ("sdbic[0]", 1 << 31, "request"), ("msix_ctrl[2]", 1, "masked"),
        ("spad[2]", 0x04000009, "ready, apic_id 4, address 0x4000000"), ("spad[5]", 7, "image_bytes 7"), ("spad[0]", 7, ""),
        ("rgcr", 1, "reset"), ("drar_lo[0]", 5, ""),
    ],
)  # fmt: skip
def test_hw_54_register_in_words(name: str, value: int, line: str) -> None:
    """HW-54: what the bits of a register mean, by the names of the chapter."""
    assert words(decode(name, value)) == line


@given(st.sampled_from(REGISTERS), st.integers(0, (1 << 32) - 1))
def test_hw_54_any_value_of_any_register_has_words(name: str, value: int) -> None:
    """HW-54: whatever a register holds can be shown."""
    assert isinstance(words(decode(name, value)), str)


def test_hw_54_fields_belong_to_registers_and_do_not_overlap() -> None:
    """Every entry names a register of the table; parts lie side by side."""
    bases = {name.partition("[")[0] for name in REGISTERS}
    for name, parts in FIELDS.items():
        assert name in bases
        end = 0
        for part in parts:
            assert part.low >= end, (name, part.name)
            end = part.low + max(part.width, 1)
        assert end <= 32


def test_vop_10_status_features_and_types_in_words() -> None:
    """VOP-10, VOP 4.4: the device page in the specification's names."""
    assert status_words(0x4F) == ["acknowledge", "driver", "driver_ok", "features_ok", "needs_reset"]
    assert feature_words(2, 1 << 9 | 1 << 29 | 1 << 63) == ["flush", "event_idx", "bit 63"]
    assert [device_type(k) for k in (0, -1, 1, 99)] == ["end", "removed", "net", "type 99"]


def test_hw_12_interrupts_are_counted_when_they_are_sent(bar: Bus) -> None:
    """HW-12, HW-17: rings, messages to the host by vector, signals of card lines; a disabled source sends nothing,
    whatever rings."""
    bar.write("mxar", 1 << 2, 5)
    bar.ring_host(2)
    assert bar.counts() == ([0, 0, 1, 0], [0] * 16, [0] * 20)
    bar.write("sice0", 1 << 2)  # the pending cause goes out
    for _ in range(3):
        bar.ring_host(2)
    bar.ring_card(3)
    bar.ring_card(11)
    doorbells, vectors, lines = bar.counts()
    assert doorbells == [0, 0, 4, 0]
    assert {v: n for v, n in enumerate(vectors) if n} == {5: 4}
    assert {line: n for line, n in enumerate(lines) if n} == {3: 1, 11: 1}
    bar.hw_reset()
    assert bar.counts() == (doorbells, vectors, lines)


def put(bus: Bus, at: int, addr: int, length: int, flags: int = 0, nxt: int = 0, host: bool = True) -> None:
    (bus.host if host else bus.gddr).write(
        at, L.VRING_DESC.pack(addr=addr, len=length, flags=flags, next=nxt)
    )


def test_vop_44_dump_of_chains_and_tables(bar: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    """Direct chains and indirect tables as they are linked; a loop, a table outside memory and a wild index end."""
    block, num = 0x10000, 8
    put(bar, block, 0x1000, 16, NEXT, 3)
    put(bar, block + 16 * 3, 0x2000, 64, WRITE)
    assert [d["index"] for d in _chain(bar, block, num, 0)] == [0, 3]
    put(bar, block + 16, 0x3000, 32, INDIRECT)
    put(bar, 0x3000, 0x5000, 8, NEXT, 1, host=False)
    put(bar, 0x3010, 0x6000, 9, WRITE, 0, host=False)
    (chain,) = _chain(bar, block, num, 1)
    assert [(d["addr"], d["len"]) for d in chain["table"]] == [(0x5000, 8), (0x6000, 9)]
    row = {"name": "block", "device": "virtio2@24", "ring": 0, "num": 8, "avail_idx": 2, "used_idx": 0,
           "pending": [_chain(bar, block, num, head) for head in (0, 1)]}  # fmt: skip
    text.vrings([row] * 1, False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "    [0] 0x1000+16 -> [3] 0x2000+64 w",
        "    [1] 0x3000+32 {[0] 0x5000+8 -> [1] 0x6000+9 w}",
    ]
    put(bar, block + 32, 0x1000, 16, NEXT, 2)
    assert len(_chain(bar, block, num, 2)) == num
    put(bar, block + 64, bar.gddr.size - 16, 1 << 20, INDIRECT)
    assert len(_chain(bar, block, num, 4)[0]["table"]) == 1
    put(bar, block + 80, (1 << 64) - 16, 0xFFFFFFF0, INDIRECT)
    assert _chain(bar, block, num, 5)[0]["table"] == []
    put(bar, block + 96, 0x1000, 16, NEXT, 9999)
    assert len(_chain(bar, block, num, 6)) == 1
    assert _chain(bar, block, num, 8) == []


def test_vop_44_dump_of_rings_that_link_everything_is_bounded(bar: Bus) -> None:
    """Each head through all descriptors, each of those through a table: a card must not keep the host process busy, or
    fill its memory, whenever somebody looks. Metrics look at the indices alone."""
    block, num, table, used = 0x10000, 128, 0x100000, 0x200000
    for i in range(num):
        put(bar, block + 16 * i, table, 16 * num, NEXT | INDIRECT, (i + 1) % num)
        put(bar, table + 16 * i, 0x1000, 1, NEXT, (i + 1) % num, host=False)
    bar.host.store(block + 16 * num + 2, 2, num)  # all of them are available
    device = SimpleNamespace(
        name="virtio2@24", slot=SimpleNamespace(num=num, off=24, blocks=[block]),
        bottom=SimpleNamespace(used_addresses=lambda: [used]),
    )  # fmt: skip
    card: Any = SimpleNamespace(bus=bar, vop_devices=[device], backends=[])
    (ring,) = inspection.rings(card)
    assert (ring.ready, ring.pending, ring.avail_idx) == (True, num, num)
    (row,) = inspection.vrings(card)
    shown = sum(1 + len(d["table"]) for chain in row["pending"] for d in chain)
    assert 0 < shown <= 2 * inspection.MOST_SHOWN
