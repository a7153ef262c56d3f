"""The DMA driver half over the engine: prepare, submit, complete (HW-22 to HW-30)."""

from __future__ import annotations

import errno
import os
import threading
from select import select

import pytest
from dmalab import SMPT, Lab, local, make_lab
from hwcard import MiB, rang, wait_for

from mic_emu import dma_dump, pciconfig
from mic_emu.dma import FENCE, INTERRUPT, RING_SIZE, DmaChannel, DmaError, Status
from mic_emu.host.irq import Interrupts, Kind, Mode
from mic_emu.layout import CONSTANTS as C


def test_hw_22_owner_and_enable_bits(lab: Lab) -> None:
    """HW-22: the drivers of both sides set exactly their own bits in DCR."""
    with lab.channel(1), lab.channel(6):
        assert lab.bus.read("dcr") == 0x55 | 2 << 2 | 2 << 12
    assert lab.bus.read("dcr") == 0x55


def test_hw_23_ring_registers(lab: Lab) -> None:
    """HW-23: the size field holds 131068; host rings are SYS with their SMPT index."""
    with lab.channel(0), lab.channel(5):
        assert lab.bus.read("drar_hi", 0) & 0x1FFFF0 == 0x1FFFC0
        assert lab.bus.read("drar_hi", 0) & C["DMA_DRAR_SYS"]
        assert lab.bus.read("drar_hi", 5) == 0x1FFFC0
        assert lab.bus.read("drar_lo", 5) % 64 == 0


def test_hw_23_driver_wraps_with_the_ring(lab: Lab) -> None:
    """HW-23: head and count go around at 131068; the data of every round is right."""
    with lab.channel(4) as ch:
        lab.bus.gddr.write(0, b"x" * 64)
        cookie = 0
        for _ in range(5):  # 5 x 32768 one-descriptor copies pass the end once
            for _ in range(32768):
                tx = ch.prep_memcpy(64, 0, 64)
                assert tx
                cookie = tx.submit()
            ch.sync_wait(cookie)
        total = 5 * 32768
        assert lab.bus.read("dstat", 4) & 0x1FFFF == total % RING_SIZE
        assert lab.engine.stats()[4].descriptors == total == ch.counters().completed


@pytest.mark.parametrize("extra", [0, 64])
def test_hw_24_long_copies_are_split(lab: Lab, chan: DmaChannel, extra: int) -> None:
    """HW-24: more than 512 KiB (host) or 1 MiB - 64 (card) takes several descriptors."""
    assert chan.max_bytes == (512 * 1024 if chan.index < 4 else 1024 * 1024 - 64)
    length = 3 * chan.max_bytes + extra
    data = os.urandom(length)
    lab.bus.gddr.write(8 * MiB, data)
    dst = local(chan) + 16 * MiB
    tx = chan.prep_memcpy(dst, 8 * MiB, length)
    assert tx
    chan.sync_wait(tx.submit())
    assert lab.bus.card_view(dst, length).read(0, length) == data
    assert chan.counters().descriptors == 3 + (extra > 0)


def test_hw_25_immediate_data(lab: Lab, chan: DmaChannel) -> None:
    """HW-25: prep_imm_data stores 64 bits at an address of 8-byte alignment."""
    addr = local(chan) + 8
    tx = chan.prep_imm_data(addr, 0x1122334455667788)
    assert tx
    chan.sync_wait(tx.submit())
    assert lab.bus.card_view(addr, 8).load(0, 8) == 0x1122334455667788


def irq_fd(lab: Lab, c: int) -> int:
    if c >= 4:
        return lab.bus.irq_fd(C["CARD_IRQ_DMA"] + c - 4)
    lab.bus.write("sice0", C["IRQ_ENABLE_MASK"])
    lab.bus.write("siac0", C["IRQ_ENABLE_MASK"])
    lab.bus.write("mxar", 1 << C["SRC_DMA"] + c, 0)
    return lab.bus.vector_fd(0)


def test_hw_26_interrupt_is_two_status_and_one_interrupt(lab: Lab, chan: DmaChannel) -> None:
    """HW-26: the INTERRUPT flag costs two descriptors and gives exactly one interrupt."""
    fd = irq_fd(lab, chan.index)
    tx = chan.prep_memcpy(local(chan), 0, 64, INTERRUPT | FENCE)
    assert tx
    cookie = tx.submit()
    assert chan.counters().descriptors == 1 + 1 + 2
    chan.sync_wait(cookie)
    wait_for("one interrupt", lambda: lab.engine.stats()[chan.index].interrupts == 1)
    assert select([fd], [], [], 20)[0]
    assert rang(fd) == 1


@pytest.mark.parametrize("c", [2, 7])
def test_hw_26_handler_runs_the_callback(lab: Lab, c: int) -> None:
    """HW-26: interrupt -> on_interrupt -> callback, and the next one fires again."""
    seen: list[int] = []
    with lab.channel(c, irq_fd=irq_fd(lab, c)) as ch:
        assert ch.irq_fd is not None
        for n in range(3):
            tx = ch.prep_memcpy(local(ch), 0, 64, INTERRUPT)
            assert tx
            tx.submit(lambda n=n: seen.append(n))  # type: ignore[misc]
            ch.issue_pending()
            assert select([ch.irq_fd], [], [], 20)[0], "no interrupt within 20 s"
            ch.on_interrupt()
            assert seen == list(range(n + 1))


def test_hw_27_nothing_runs_before_issue(lab: Lab, chan: DmaChannel) -> None:
    """HW-27: five waiting descriptors stay where they are; issue_pending starts them."""
    cookies = []
    for n in range(5):
        tx = chan.prep_imm_data(local(chan) + 8 * n, n + 1)
        assert tx
        cookies.append(tx.submit())
    assert lab.bus.read("dhpr", chan.index) == 0
    assert chan.tx_status(cookies[0]) is Status.IN_PROGRESS
    chan.issue_pending()
    chan.sync_wait(cookies[-1])
    assert [chan.tx_status(c) for c in cookies] == [Status.COMPLETE] * 5


def test_hw_27_the_sixth_descriptor_starts_them(lab: Lab, chan: DmaChannel) -> None:
    """HW-27: with six waiting, submit issues by itself; six in one transaction count too."""
    for n in range(6):
        tx = chan.prep_imm_data(local(chan) + 8 * n, n + 1)
        assert tx
        cookie = tx.submit()
    assert lab.bus.read("dhpr", chan.index) == 6
    wait_for("completion without issue_pending", lambda: chan.tx_status(cookie) is Status.COMPLETE)
    tx = chan.prep_memcpy(local(chan), 0, 3 * chan.max_bytes, INTERRUPT | FENCE)
    assert tx
    cookie = tx.submit()
    wait_for("completion", lambda: chan.tx_status(cookie) is Status.COMPLETE)


def test_hw_28_cookies_start_at_two_and_complete_in_order(lab: Lab, chan: DmaChannel) -> None:
    """HW-28: cookies rise by one from 2; callbacks run once each, in order, by polling alone."""
    seen: list[int] = []
    cookies = []
    for n in range(500):
        tx = chan.prep_memcpy(local(chan), 64 * (n % 8), 64)
        assert tx
        cookies.append(tx.submit(lambda n=n: seen.append(n)))  # type: ignore[misc]
    chan.issue_pending()
    assert cookies == list(range(2, 502))
    wait_for("last cookie", lambda: chan.tx_status(cookies[-1]) is Status.COMPLETE)
    wait_for("all callbacks", lambda: len(seen) == 500)
    chan.poll()
    assert seen == list(range(500))


def test_hw_28_callbacks_of_many_threads_run_once(lab: Lab, chan: DmaChannel) -> None:
    """HW-28: with four threads submitting and polling each callback still runs exactly once."""
    lock = threading.Lock()
    seen: list[int] = []
    failures: list[BaseException] = []

    def note(key: int) -> None:
        with lock:
            seen.append(key)

    def client(base: int) -> None:
        try:
            for n in range(300):
                while (tx := chan.prep_memcpy(local(chan) + 4096 * base, 0, 64, INTERRUPT)) is None:
                    pass
                cookie = tx.submit(lambda key=1000 * base + n: note(key))  # type: ignore[misc]
                if n % 7 == 0:
                    chan.sync_wait(cookie)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert not failures
    chan.issue_pending()

    def all_seen() -> bool:
        chan.poll()
        return len(seen) == 1200

    wait_for("1200 callbacks", all_seen)
    assert sorted(seen) == [1000 * b + n for b in range(4) for n in range(300)]


def test_hw_28_callback_may_submit(lab: Lab, chan: DmaChannel) -> None:
    """HW-28: a callback prepares and submits the next transaction, as dmaengine clients do."""
    left = [20]
    done = threading.Event()

    def again() -> None:
        left[0] -= 1
        if not left[0]:
            done.set()
            return
        tx = chan.prep_imm_data(local(chan), left[0])
        assert tx
        tx.submit(again)
        chan.issue_pending()

    again()
    wait_for("twenty rounds", lambda: (chan.poll(), done.is_set())[1])


def test_hw_29_full_ring_returns_null(lab: Lab) -> None:
    """HW-29: no room: None and no partial transaction; after completions it works again."""
    with lab.channel(4, ring_size=64) as ch:
        raw = lab.bus.read("dcr")
        lab.bus.write("dcr", raw & ~(2 << 8))  # the engine stands still
        cookies = []
        while (tx := ch.prep_memcpy(128, 0, 64)) is not None:
            cookies.append(tx.submit())
        assert len(cookies) == 60  # 63 may be outstanding; a copy wants room for three flags too
        head = lab.bus.read("dhpr", 4)
        assert ch.prep_memcpy(128, 0, 64 * 1024, INTERRUPT) is None
        assert ch.prep_imm_data(128, 1) is None
        assert ch.counters().ring_full == 3
        lab.bus.write("dcr", raw)
        ch.sync_wait(cookies[-1])
        assert lab.bus.read("dhpr", 4) in (head, 60)
        for _ in range(100):
            tx = ch.prep_memcpy(128, 0, 64, INTERRUPT)
            assert tx
            ch.sync_wait(tx.submit())
        assert lab.engine.stats()[4].descriptors == 60 + 300


def test_hw_29_request_longer_than_the_ring(lab: Lab) -> None:
    """HW-29: a copy that needs more descriptors than the ring has never succeeds, and harms nothing."""
    with lab.channel(5, ring_size=16) as ch:
        assert ch.prep_memcpy(0, 64 * MiB, 20 * ch.max_bytes) is None
        tx = ch.prep_memcpy(128, 0, 64)
        assert tx
        ch.sync_wait(tx.submit())


def test_hw_30_empty_requests(lab: Lab, chan: DmaChannel) -> None:
    """HW-30: length 0 without flags is null; with FENCE one status descriptor; no flags at all EINVAL."""
    assert chan.prep_memcpy(0, 0, 0) is None
    tx = chan.prep_memcpy(0, 0, 0, FENCE)
    assert tx
    chan.sync_wait(tx.submit())
    assert chan.counters().descriptors == 1
    with pytest.raises(DmaError) as e:
        chan.prep_interrupt(0)
    assert e.value.errno == errno.EINVAL
    tx = chan.prep_interrupt()
    assert tx
    chan.sync_wait(tx.submit())
    assert chan.counters().descriptors == 3


@pytest.mark.parametrize(("dst", "src", "length"), [(32, 0, 64), (0, 8, 64), (0, 0, 65), (1 << 40, 0, 64)])
def test_hw_30_what_cannot_be_encoded_is_refused(chan: DmaChannel, dst: int, src: int, length: int) -> None:
    """HW 5.3: the real driver drops low length bits; ours refuses (decision: no silent data loss)."""
    with pytest.raises(DmaError) as e:
        chan.prep_memcpy(dst, src, length)
    assert e.value.errno == errno.EINVAL


def test_hw_30_discard_gives_the_slots_back(chan: DmaChannel) -> None:
    """HW 5.5: a discarded transaction leaves nothing; one that is used twice is a mistake."""
    tx = chan.prep_memcpy(0, 64 * 1024, 64)
    assert tx
    tx.discard()
    with pytest.raises(RuntimeError):
        tx.submit()
    tx = chan.prep_imm_data(local(chan), 5)
    assert tx
    chan.sync_wait(tx.submit())
    assert chan.counters().descriptors == 1


def test_hw_15_dma_completes_by_polling_without_msix() -> None:
    """HW-15: in INTx mode no DMA callback is dispatched, but polling sees the completion."""
    with make_lab() as lab:
        pciconfig.build(lab.bus, pciconfig.PciIdentity(msix_vectors=0, msi=False))
        with Interrupts(lab.bus) as irqs:
            assert irqs.mode is Mode.INTX
            irqs.enable()
            irq = irqs.request(Kind.DMA, 0, "mic dma_channel")
            with lab.channel(0, irq_fd=irq.fd, ack=irq.ack) as ch:
                tx = ch.prep_memcpy(SMPT, 0, 64, INTERRUPT)
                assert tx
                cookie = tx.submit()
                ch.issue_pending()
                wait_for("polled completion", lambda: ch.tx_status(cookie) is Status.COMPLETE)
                assert irqs.dispatch_fd is not None
                assert select([irqs.dispatch_fd], [], [], 20)[0]
                assert irqs.dispatch() == 1 << 8
                assert rang(irq.fd) == 0


def test_hw_26_several_pieces_are_one_transaction(lab: Lab, chan: DmaChannel) -> None:
    """HW-26: a list of copies completes as a whole, its pieces in their order; one bad piece, and nothing of
    it is prepared."""
    data = os.urandom(3 * 4096)
    lab.bus.gddr.write(8 * MiB, data)
    dst = local(chan) + 16 * MiB
    pieces = [(dst, 8 * MiB + 8192, 4096), (dst + 4096, 8 * MiB + 4096, 4096), (dst + 4096, 8 * MiB, 64)]
    with pytest.raises(DmaError) as e:
        chan.prep_memcpy_sg([*pieces, (dst, 8 * MiB, 65)])
    assert e.value.errno == errno.EINVAL
    tx = chan.prep_memcpy_sg(pieces, INTERRUPT)
    assert tx
    chan.sync_wait(tx.submit())
    assert lab.bus.card_view(dst, 8192).read(0, 8192) == data[8192:] + data[:64] + data[4096 + 64 : 8192]
    counters = chan.counters()
    assert (counters.transactions, counters.bytes) == (1, 8256)
    assert dma_dump.counters(lab.bus, chan.index)["bytes"] == 8256


def test_hw_29_a_list_that_does_not_fit_leaves_nothing(lab: Lab) -> None:
    """HW-29: no room for all of it: no transaction, the next one is whole."""
    with lab.channel(4, ring_size=16) as ch:
        assert ch.prep_memcpy_sg([(MiB, 2 * MiB, 64)] * 14) is None
        tx = ch.prep_memcpy_sg([(MiB, 2 * MiB, 64)] * 12)
        assert tx
        ch.sync_wait(tx.submit())
