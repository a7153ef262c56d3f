"""Interrupts: HW-12 to HW-21, HW-47."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator

import pytest
from hwcard import new_card, rang

from mic_emu import pciconfig
from mic_emu.bar import Bus
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.host.irq import ENABLE_MASK, VECTORS, Interrupts, Kind, Mode
from mic_emu.layout import CONSTANTS as C
from mic_emu.pciconfig import ConfigSpace

MASTER = C["PCI_COMMAND_MASTER"]


@pytest.fixture
def card() -> Iterator[Bus]:
    """A card with configuration space."""
    with new_card(host=1 << 20) as b:
        pciconfig.build(b)
        yield b


def card_like(bus: Bus, **identity: object) -> Bus:
    pciconfig.build(bus, pciconfig.PciIdentity(**identity))  # type: ignore[arg-type]
    return bus


@pytest.fixture
def irqs(card: Bus) -> Iterator[Interrupts]:
    with Interrupts(card) as i:
        i.enable()
        yield i


def test_hw_12_doorbell_sets_cause_and_fires(card: Bus, irqs: Interrupts) -> None:
    """HW-12: 0x80000000 in SDBIC d rings doorbell d, each on its own vector."""
    lines = [irqs.request(Kind.DB, d, f"db{d}") for d in range(4)]
    for d, irq in enumerate(lines):
        card.write("sdbic", 0x80000000, d)
        assert [rang(x.fd) for x in lines] == [int(x is irq) for x in lines]


def test_hw_12_without_the_request_bit_nothing_happens(card: Bus, irqs: Interrupts) -> None:
    """HW-12: SDBIC without bit 31 is only a register."""
    irq = irqs.request(Kind.DB, 1, "db1")
    card.write("sdbic", 0x40000001, 1)
    assert rang(irq.fd) == 0
    assert card.read("sicr0") == 0


def test_hw_12_disabled_doorbell_stays_pending(card: Bus, irqs: Interrupts) -> None:
    """HW-12: without SICE0 the cause waits, and fires when it is enabled."""
    irq = irqs.request(Kind.DB, 2, "db2")
    irqs.disable()
    card.ring_host(2)
    assert card.read("sicr0") == 1 << 2
    assert rang(irq.fd) == 0
    irqs.enable()
    assert rang(irq.fd) == 1
    assert card.read("sicr0") == 0


def test_hw_13_cause_is_write_one_to_clear(card: Bus, irqs: Interrupts) -> None:
    """HW-13: writing SICR0 clears exactly the bits given."""
    irqs.disable()
    for d in range(4):
        card.ring_host(d)
    card.write("sicr0", 0b0101)
    assert card.read("sicr0") == 0b1010


def test_hw_13_enable_sets_and_clear_clears(card: Bus) -> None:
    """HW-13: SICE0 writes only set, SICC0 clears the named bits."""
    card.write("sice0", 0x0F)
    card.write("sice0", 0x100)
    assert card.read("sice0") == 0x10F
    card.write("sicc0", 0x105)
    assert card.read("sice0") == 0x0A


def test_hw_13_no_auto_clear_leaves_the_cause(card: Bus, irqs: Interrupts) -> None:
    """HW-13: with SIAC0 the cause goes on delivery, without it stays until SICR0 is written."""
    irq = irqs.request(Kind.DB, 0, "db0")
    card.ring_host(0)
    assert (rang(irq.fd), card.read("sicr0")) == (1, 0)
    card.write("siac0", 0)
    card.ring_host(0)
    assert (rang(irq.fd), card.read("sicr0")) == (1, 1)


def test_hw_14_one_ring_fires_every_vector(card: Bus, irqs: Interrupts) -> None:
    """HW-14: a doorbell in several MXARs fires each such vector exactly once, no other."""
    shared = [irqs.request(Kind.DB, 3, f"user{n}") for n in range(3)]
    other = irqs.request(Kind.DB, 0, "other")
    card.ring_host(3)
    assert [rang(i.fd) for i in shared] == [1, 1, 1]
    assert rang(other.fd) == 0
    shared[1].free()
    card.ring_host(3)
    assert [rang(i.fd) for i in shared] == [1, 0, 1]


def test_hw_14_masked_vector_is_pending_until_unmasked(card: Bus, irqs: Interrupts) -> None:
    """HW-14: a masked vector keeps one message in the pending array; rings merge."""
    irq = irqs.request(Kind.DB, 0, "db0")
    card.write("msix_ctrl", 1, irq.vector)
    card.ring_host(0)
    card.ring_host(0)
    assert rang(irq.fd) == 0
    assert card.read("msix_pba") == 1 << irq.vector
    card.write("msix_ctrl", 0, irq.vector)
    assert rang(irq.fd) == 1
    assert card.read("msix_pba") == 0


@pytest.mark.parametrize("how", ["maskall", "master"])
def test_hw_14_function_mask_and_bus_master(card: Bus, irqs: Interrupts, how: str) -> None:
    """HW-14: function mask, or bus mastering off, holds all messages back and loses none."""
    irq = irqs.request(Kind.DB, 0, "db0")
    config = pciconfig.ConfigSpace(card)
    off, bit = (C["PCI_CAP_MSIX"] + 2, C["PCI_MSIX_MASKALL"]) if how == "maskall" else (4, MASTER)
    masks = {"set_" if how == "maskall" else "clear": bit}
    config.update(off, 2, **masks)
    card.ring_host(0)
    assert rang(irq.fd) == 0
    config.update(off, 2, **{"clear" if how == "maskall" else "set_": bit})
    assert rang(irq.fd) == 1


def test_hw_15_mode_follows_configuration_space() -> None:
    """HW-15: nine vectors give MSI-X, eight MSI, then INTx, then the probe fails."""
    cases = [({}, Mode.MSIX), ({"msix_vectors": 9}, Mode.MSIX), ({"msix_vectors": 8}, Mode.MSI)]
    cases += [({"msix_vectors": 0, "msi": False}, Mode.INTX)]
    for identity, mode in cases:
        with new_card(host=1 << 20) as bus, Interrupts(card_like(bus, **identity)) as irqs:
            assert irqs.mode is mode
    with new_card(host=1 << 20) as bus:
        card_like(bus, msix_vectors=0, msi=False, intx=False)
        with pytest.raises(OSError, match="neither") as e:
            Interrupts(bus)
        assert e.value.errno == errno.EINVAL


@pytest.mark.parametrize("mode", [Mode.MSI, Mode.INTX])
def test_hw_15_single_line_dispatches_doorbells_only(card: Bus, mode: Mode) -> None:
    """HW-15: one line; doorbell callbacks fire, DMA callbacks do not, but DMA is acknowledged."""
    seen: list[str] = []
    with Interrupts(card, mode) as irqs:
        irqs.enable()
        a = irqs.request(Kind.DB, 1, "a", lambda: seen.append("a"))
        b = irqs.request(Kind.DB, 1, "b", lambda: seen.append("b"))
        dma = irqs.request(Kind.DMA, 0, "dma", lambda: seen.append("dma"))
        line = irqs.dispatch_fd
        assert line is not None
        card.ring_host(1)
        assert rang(line) == 1
        assert irqs.dispatch() == 1 << 1
        assert (seen, rang(a.fd), rang(b.fd)) == (["a", "b"], 1, 1)
        card.write("sicr0", 0xFFFFFFFF)
        seen.clear()
        raise_host(card, 1 << C["SRC_DMA"])
        assert irqs.dispatch() == 1 << C["SRC_DMA"]
        assert (seen, rang(dma.fd), card.read("sicr0")) == ([], 0, 0)
        assert irqs.dispatch() == 0  # not mine


def raise_host(bus: Bus, sources: int) -> None:
    from mic_emu._native import lib

    lib.mic_raise_host(bus.ptr, sources)


def test_hw_15_intx_disable_bit_holds_the_line(card: Bus) -> None:
    """HW-15: command bit 10 keeps INTx quiet; clearing it delivers what is pending."""
    config = pciconfig.ConfigSpace(card)
    with Interrupts(card, Mode.INTX) as irqs:
        irqs.enable()
        irqs.request(Kind.DB, 0, "db0")
        assert irqs.dispatch_fd is not None
        config.update(C["PCI_COMMAND"], 2, set_=C["PCI_COMMAND_INTX_OFF"])
        card.ring_host(0)
        assert rang(irqs.dispatch_fd) == 0
        config.update(C["PCI_COMMAND"], 2, clear=C["PCI_COMMAND_INTX_OFF"])
        assert rang(irqs.dispatch_fd) == 1


def test_hw_15_msi_needs_the_map_bit(card: Bus) -> None:
    """HW-15: with MSI a source that MXAR0 does not name sends nothing."""
    with Interrupts(card, Mode.MSI) as irqs:
        irqs.enable()
        irq = irqs.request(Kind.DB, 0, "db0")
        assert irqs.dispatch_fd is not None
        card.ring_host(1)
        assert rang(irqs.dispatch_fd) == 0
        irq2 = irqs.request(Kind.DB, 0, "again")
        irq.free()
        assert card.read("mxar", 0) == 1  # still needed
        irq2.free()
        assert card.read("mxar", 0) == 0


def test_hw_15_a_message_has_an_address(card: Bus) -> None:
    """HW-15: the MSI capability holds what the card would write where, as lspci shows it."""
    with Interrupts(card, Mode.MSI):
        config, at = ConfigSpace(card), C["PCI_CAP_MSI"]
        assert (config.read(at + 4, 4), config.read(at + 8, 4), config.read(at + 12, 2)) == (
            0xFEE00000,
            0,
            0x4000,
        )


@pytest.mark.parametrize("mode", list(Mode))
def test_hw_54_rows_name_the_sources_in_every_mode(card: Bus, mode: Mode) -> None:
    """What ``dump interrupts`` shows: INTx has no vector map, its requests are heard all the same."""
    with Interrupts(card, mode) as irqs:
        irqs.request(Kind.DB, 2, "db2")
        irqs.request(Kind.DMA, 1, "dma1")
        rows = [row for row in irqs.rows() if row[3]]
    if mode is Mode.MSIX:
        assert rows == [(0, 1 << 2, 1 << 2, ["db2"]), (1, 1 << 9, 1 << 9, ["dma1"])]
    else:
        assert rows == [(0, 0 if mode is Mode.INTX else 0x204, 0x204, ["db2", "dma1"])]


@pytest.mark.parametrize(("kind", "index"), [(3, 0), (-1, 0), (0, 4), (0, -1), (1, 8), (2, 1)])
def test_hw_16_unknown_source(irqs: Interrupts, kind: int, index: int) -> None:
    """HW-16: a type or index that does not exist is EINVAL."""
    with pytest.raises(OSError, match=r"exist|outside") as e:
        irqs.request(kind, index, "bad")
    assert e.value.errno == errno.EINVAL


def test_hw_16_tenth_vector_is_enospc_and_freed_ones_return(irqs: Interrupts) -> None:
    """HW-16: nine vectors; the tenth request is ENOSPC; a freed vector is taken again."""
    taken = [irqs.request(Kind.DMA, n % 8, f"r{n}") for n in range(VECTORS)]
    assert [i.vector for i in taken] == list(range(VECTORS))
    with pytest.raises(OSError, match="vectors are taken") as e:
        irqs.request(Kind.DB, 0, "tenth")
    assert e.value.errno == errno.ENOSPC
    taken[4].free()
    assert irqs.request(Kind.ERR, 0, "err").vector == 4


def test_hw_16_cookie_zero_is_legal(irqs: Interrupts, caplog: pytest.LogCaptureFixture) -> None:
    """HW 4.3: vector 0 with offset 0 has cookie 0; freeing twice only warns."""
    irq = irqs.request(Kind.DB, 0, "first")
    assert irq.cookie == 0
    irq.free()
    irq.free()
    assert "not requested" in caplog.text


def test_hw_16_cookie_holds_vector_and_offset(irqs: Interrupts) -> None:
    """HW 4.3: cookie = vector | offset << 16."""
    irqs.request(Kind.DB, 0, "x")
    assert irqs.request(Kind.DMA, 3, "dma3").cookie == 1 | 11 << 16


def test_hw_17_host_rings_every_card_doorbell(card: Bus) -> None:
    """HW-17: 0-7 through APICICR bit 13, 8-15 through any RDMASR write; one line each."""
    for db in range(16):
        card.ring_card(db)
        assert [rang(card.irq_fd(n)) for n in range(20)] == [int(n == db) for n in range(20)]
    card.write("apicicr", 0x40, 3)  # bit 13 clear: programming the vector
    assert rang(card.irq_fd(3)) == 0
    card.write("rdmasr", 0, 2)
    assert rang(card.irq_fd(10)) == 1


def test_hw_18_unknown_doorbells_are_ignored(card: Bus, irqs: Interrupts) -> None:
    """HW-18: numbers that do not exist change no register and ring nothing, in both directions."""
    before = card.mmio.read(0, card.mmio.size)
    for db in (-1, 4, 9, 255):
        card.ring_host(db)
    for db in (-1, 16, 255):
        card.ring_card(db)
    assert card.mmio.read(0, card.mmio.size) == before
    assert [rang(card.irq_fd(n)) for n in range(20)] == [0] * 20


def test_hw_19_next_db_wraps(irqs: Interrupts) -> None:
    """HW-19: host doorbells are handed out 0, 1, 2, 3, 0, ..."""
    assert [irqs.next_db() for _ in range(6)] == [0, 1, 2, 3, 0, 1]


def test_hw_19_card_gives_out_the_least_used(card: Bus) -> None:
    """HW-19, 4.4: the lowest doorbell nobody uses; a freed one is next; the seventeenth owner is EBUSY."""
    lines = CardInterrupts(card)
    taken = [lines.request(f"owner {n}") for n in range(16)]
    assert [line.doorbell for line in taken] == list(range(16))
    with pytest.raises(OSError, match="owner 17") as e:
        lines.request("owner 17")
    assert e.value.errno == errno.EBUSY
    for n in (9, 3):
        taken[n].free()
    assert [lines.request("again").doorbell for _ in range(2)] == [3, 9]


def test_hw_20_stores_are_visible_before_the_ring(card: Bus, irqs: Interrupts) -> None:
    """HW-20: what the card stored before it rang is there when the handler looks."""
    irq = irqs.request(Kind.DB, 0, "db0")
    rounds = 3000
    seen = threading.Event()
    go = threading.Semaphore(0)

    def card_side() -> None:
        for n in range(1, rounds + 1):
            assert go.acquire(timeout=10)
            card.host.store(0, 8, n)
            card.ring_host(0)
        seen.set()

    from select import select

    worker = threading.Thread(target=card_side)
    worker.start()
    for n in range(1, rounds + 1):
        go.release()
        assert select([irq.fd], [], [], 10)[0], "doorbell 0 did not ring within 10 s"
        rang(irq.fd)
        assert card.host.load(0, 8) == n
    worker.join(10)
    assert seen.is_set()


@pytest.mark.parametrize("revision", [0x10, 0x11, 0x20])
def test_hw_21_ack_enables_again(revision: int) -> None:
    """HW-21: from B0 on, a handler's ack sets SICE0 and SIAC0 again."""
    with new_card(host=1 << 20) as bus, Interrupts(card_like(bus, revision=revision)) as irqs:
        irq = irqs.request(Kind.DB, 0, "db0")
        bus.hw_store("sice0", 0)  # what such a stepping does on delivery
        bus.hw_store("siac0", 0)
        irq.ack()
        assert (bus.read("sice0"), bus.read("siac0")) == (ENABLE_MASK, ENABLE_MASK)


def test_hw_21_ack_on_a0_clears_the_pending_array() -> None:
    """HW-21: A0 writes MSIXPBACR and leaves the enables alone."""
    with new_card(host=1 << 20) as bus, Interrupts(card_like(bus, revision=0)) as irqs:
        irqs.enable()
        irq = irqs.request(Kind.DB, 0, "db0")
        bus.write("msix_ctrl", 1, irq.vector)
        bus.ring_host(0)
        assert bus.read("msix_pba") == 1
        bus.hw_store("sice0", 0)
        irq.ack()
        assert (bus.read("msix_pba"), bus.read("sice0")) == (0, 0)


def test_hw_47_four_doorbells_remain_after_dma_and_scif(irqs: Interrupts) -> None:
    """HW-47: four DMA channels and SCIF leave four vectors for virtio devices."""
    for c in range(4):
        irqs.request(Kind.DMA, c, "mic dma_channel")
    irqs.request(Kind.DB, irqs.next_db(), "SCIF_INTR")
    for _ in range(4):
        irqs.request(Kind.DB, irqs.next_db(), "virtio")
    with pytest.raises(OSError, match="virtio5") as e:
        irqs.request(Kind.DB, irqs.next_db(), "virtio5")
    assert e.value.errno == errno.ENOSPC


def test_hw_10_restore_writes_the_vector_map(card: Bus, irqs: Interrupts) -> None:
    """HW 4.3: after a reset the map comes back from the software copy."""
    irqs.request(Kind.DB, 0, "a")
    irqs.request(Kind.DMA, 2, "b")
    want = [card.read("mxar", v) for v in range(16)]
    card.hw_reset()
    assert card.read("mxar", 0) == 0
    irqs.restore()
    assert [card.read("mxar", v) for v in range(16)] == want


def test_hw_12_close_switches_the_function_off(card: Bus) -> None:
    """HW 4.3: after close nothing is mapped, enabled or unmasked."""
    irqs = Interrupts(card)
    irqs.enable()
    irqs.request(Kind.DB, 0, "a")
    irqs.close()
    assert (card.read("sice0"), card.read("siac0"), card.read("mxar", 0)) == (0, 0, 0)
    assert not pciconfig.ConfigSpace(card).read(C["PCI_CAP_MSIX"] + 2, 2) & C["PCI_MSIX_ENABLE"]


def test_hw_12_bare_bus_delivers_without_configuration_space(bus: Bus) -> None:
    """HW-12: a bus without a PCI function behaves as unmasked MSI-X."""
    with Interrupts(bus, log=logging.getLogger("t")) as irqs:
        irqs.enable()
        irq = irqs.request(Kind.DB, 0, "db0")
        bus.ring_host(0)
        assert rang(irq.fd) == 1
