"""PCI identity and configuration space: HW-1, HW-3 and what ``lspci`` makes of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from hwcard import new_card
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu import layout, pciconfig
from mic_emu.bar import Bus
from mic_emu.layout import CONSTANTS as C
from mic_emu.pciconfig import ConfigSpace, PciIdentity

BAR0, BAR4 = C["PCI_BAR0"], C["PCI_BAR4"]


@pytest.fixture
def card() -> Iterator[Bus]:
    with new_card(gddr=3 << 20, host=4096) as b:
        yield b


def lspci(text: str, tmp_path: Path) -> str:
    """What the real lspci says about a dump; it must not complain."""
    needs.programs("lspci")
    dump = tmp_path / "dump"
    dump.write_text(text)
    out = subprocess.run(["lspci", "-F", dump, "-vvv", "-nn"], capture_output=True, text=True, timeout=20)
    assert out.returncode == 0
    # -vvv also asks for kernel modules, which a container does not have; that is not about the dump.
    assert [x for x in out.stderr.splitlines() if "libkmod" not in x] == []
    for complaint in ("!!!", "<?>", "???", "access denied", "chain broken", "chain looped"):
        assert complaint not in out.stdout
    return out.stdout


def test_hw_01_lspci_decodes_the_card(card: Bus, tmp_path: Path) -> None:
    """HW-1: aperture in BAR 0, MMIO in BAR 4, and the capabilities a real X100 shows."""
    config = pciconfig.build(card)
    out = lspci(config.hexdump("06:00.0"), tmp_path)
    assert out.startswith(
        "06:00.0 Co-processor [0b40]: Intel Corporation Xeon Phi coprocessor SE10/7120 series [8086:225c]"
    )
    assert "(rev 20)" in out
    for wanted in (
        "Region 0: Memory at 3c0000000000 (64-bit, prefetchable)",
        "Region 4: Memory at f0000000 (64-bit, non-prefetchable)",
        "[44] Power Management version 3",
        "[4c] Express (v2) Endpoint, MSI 00",
        "[88] MSI: Enable- Count=1/1 Maskable- 64bit+",
        "[98] MSI-X: Enable- Count=16 Masked-",
        "Vector table: BAR=4 offset=00017000",
        "PBA: BAR=4 offset=00018000",
        "[100 v1] Advanced Error Reporting",
        "Speed 5GT/s",
        "Width x16",
        "pin A routed to IRQ 11",
    ):
        assert wanted in out, out


def test_hw_01_several_cards_in_one_dump(tmp_path: Path) -> None:
    """HW-1: dumps concatenate; each card keeps its slot and revision."""
    text = ""
    for slot, rev in (("06:00.0", 0x11), ("07:00.0", 0x20)):
        with new_card(gddr=1 << 20, host=4096) as bus:
            text += pciconfig.build(bus, PciIdentity(device=0x2250, revision=rev)).hexdump(slot, full=False)
    out = lspci(text, tmp_path)
    assert "06:00.0" in out
    assert "07:00.0" in out
    assert "(rev 11)" in out


def test_hw_01_cards_decode_addresses_of_their_own() -> None:
    """HW-1: no two cards of a bus answer at the same address, whatever their memory; each BAR is aligned to its size."""
    taken: list[range] = []
    for index, gddr in enumerate((1 << 20, 64 << 30, 8 << 30)):
        with new_card(gddr=gddr, host=4096) as bus:
            config = pciconfig.build(bus, pciconfig.placed(PciIdentity(), index))
            taken += [
                range(config.bar(0), config.bar(0) + bus.gddr.size),
                range(config.bar(4), config.bar(4) + layout.MMIO_SIZE),
            ]
    for i, one in enumerate(taken):
        assert one.start % len(one) == 0
        assert all(one.stop <= other.start or other.stop <= one.start for other in taken[i + 1 :])


@pytest.mark.parametrize(
    "identity",
    [
        PciIdentity(msix_vectors=0),
        PciIdentity(msi=False),
        PciIdentity(msix_vectors=0, msi=False),
        PciIdentity(intx=False),
    ],
)
def test_hw_15_capability_list_without_parts(card: Bus, tmp_path: Path, identity: PciIdentity) -> None:
    """HW-15: cards that offer less still have a well-formed list."""
    config = pciconfig.build(card, identity)
    assert (config.msix_vectors, config.has_msi, config.has_intx) == (
        identity.msix_vectors,
        identity.msi,
        identity.intx,
    )
    lspci(config.hexdump("01:00.0"), tmp_path)


def test_hw_03_steppings() -> None:
    """HW-3: four revision ids have names, every other one is ??."""
    names = {rev: pciconfig.stepping_name(rev) for rev in range(256)}
    assert {r: n for r, n in names.items() if n != "??"} == {0: "A0", 0x10: "B0", 0x11: "B1", 0x20: "C0"}
    assert pciconfig.revision_of("b1") == 0x11
    with pytest.raises(ValueError, match="unknown stepping"):
        pciconfig.revision_of("D0")


def test_hw_03_bound_device_ids() -> None:
    """HW-3: exactly 0x2250..0x225e of vendor 0x8086 are X100 cards."""
    bound = [d for d in range(0x10000) if pciconfig.family_name(0x8086, d)]
    assert bound == list(range(0x2250, 0x225F))
    assert pciconfig.family_name(0x10DE, 0x2250) is None


def test_hw_03_identity_is_in_the_page(card: Bus) -> None:
    """HW-3: device id and revision are read from configuration space."""
    config = pciconfig.build(card, PciIdentity(device=0x225E, revision=0x11))
    assert (config.family, config.stepping, config.device) == ("x100", "B1", 0x225E)
    other = pciconfig.build(card, PciIdentity(device=0x2260, revision=0x42))
    assert (other.family, other.stepping) == (None, "??")


@pytest.mark.parametrize(("bar", "size", "flags"), [(BAR0, 4 << 20, 0xC), (BAR4, layout.MMIO_SIZE, 0x4)])
def test_hw_01_bar_sizing(card: Bus, bar: int, size: int, flags: int) -> None:
    """HW-1: all ones written to a BAR read back as its size mask; the aperture is a power of two."""
    config = pciconfig.build(card)
    old = [config.read(bar, 4), config.read(bar + 4, 4)]
    for word in (bar, bar + 4):
        config.write(word, 4, 0xFFFFFFFF)
    got = config.read(bar, 4) | config.read(bar + 4, 4) << 32
    assert got & 0xF == flags
    assert (~(got & ~0xF) & (1 << 64) - 1) + 1 == size
    for word, value in zip((bar, bar + 4), old, strict=True):
        config.write(word, 4, value)
    assert config.bar((bar - BAR0) // 4) in (0x3C00_0000_0000, 0xF000_0000)


def test_hw_01_unimplemented_bars_read_zero(card: Bus) -> None:
    """HW-1: the other BARs and the ROM do not exist."""
    config = pciconfig.build(card)
    for off in (0x18, 0x1C, 0x30):
        config.write(off, 4, 0xFFFFFFFF)
        assert config.read(off, 4) == 0


def test_hw_01_command_bits(card: Bus) -> None:
    """HW-1: I/O, memory and bus-master enable and INTx disable are writable, reserved bits are not."""
    config = pciconfig.build(card)
    config.write(C["PCI_COMMAND"], 2, 0xFFFF)
    assert config.read(C["PCI_COMMAND"], 2) == 0x0547
    assert config.read(C["PCI_STATUS"], 2) == C["PCI_STATUS_CAPS"]


@pytest.mark.parametrize(("off", "size"), [(1, 2), (2, 4), (4096, 1), (0, 8), (-4, 4)])
def test_hw_01_bad_cycles(card: Bus, off: int, size: int) -> None:
    """HW-1: a cycle that cannot be on the bus is a caller's mistake."""
    config = pciconfig.build(card)
    with pytest.raises(ValueError, match="no configuration cycle"):
        config.write(off, size, 0)


def test_hw_01_addresses_must_be_aligned(card: Bus) -> None:
    """HW-1: a BAR is aligned to its size."""
    with pytest.raises(ValueError, match="aligned"):
        pciconfig.build(card, PciIdentity(mmio_base=0x1000))
    with pytest.raises(ValueError, match="MSI-X"):
        pciconfig.build(card, PciIdentity(msix_vectors=17))


@pytest.fixture(scope="module")
def shared() -> Iterator[Bus]:
    with new_card(gddr=1 << 20, host=4096) as b:
        yield b


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1023), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=30
    )
)
def test_hw_01_random_writes_never_change_identity(shared: Bus, writes: list[tuple[int, int, int]]) -> None:
    """HW-1: whatever is written, ids, class, capability list and BAR types stay."""
    config = pciconfig.build(shared)

    def fixed() -> list[object]:
        caps = [config.capability(c) for c in (1, 5, 0x10, 0x11)]
        return [
            config.raw()[0:4],
            config.raw()[8:12],
            config.raw()[0x2C:0x38],
            caps,
            config.read(BAR0, 4) & 0xF,
        ]

    before = fixed()
    for word, size, value in writes:
        config.write(word * 4, size, value)
    assert fixed() == before
    assert isinstance(config, ConfigSpace)
