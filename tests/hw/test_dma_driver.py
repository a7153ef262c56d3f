"""The DMA driver half over the engine: HW-22 to HW-30, HW-33, HW-34."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from select import select

import pytest
from hwcard import GiB, MiB, RawChannel, memcpy_desc, new_card, rang, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mic_emu import dma_dump, pciconfig
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.card.board.dma import DmaEngine
from mic_emu.dma import FENCE, INTERRUPT, RING_SIZE, DmaChannel, DmaError, DmaMemory, Status
from mic_emu.faults import FaultTable, parse
from mic_emu.host.irq import Interrupts, Kind, Mode
from mic_emu.host.smpt import Smpt
from mic_emu.layout import CONSTANTS as C
from mic_emu.memory import PageAllocator

SMPT = C["SMPT_BASE"]


@dataclass
class Lab:
    """A card whose engine runs, with the memories that both drivers allocate from."""

    bus: Bus
    engine: DmaEngine
    host: DmaMemory
    card: DmaMemory

    def channel(self, c: int, **options: object) -> DmaChannel:
        memory = self.host if c < 4 else self.card
        return DmaChannel(self.bus, c, memory, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def make_lab() -> Iterator[Lab]:
    with new_card(gddr=128 * MiB, host=17 * GiB) as bus, DmaEngine(bus) as engine:
        smpt = Smpt(bus, logging.getLogger("t"))
        smpt.init()
        host = DmaMemory(PageAllocator(bus.fds[2], 64 * MiB, 96 * MiB), smpt.map, smpt.unmap)
        card = DmaMemory(PageAllocator(bus.fds[0], 64 * MiB, 96 * MiB))
        yield Lab(bus, engine, host, card)
        assert host.pages.used_bytes == card.pages.used_bytes == 0, "a channel kept memory"
        assert all(r.refs == 0 for r in smpt.rows()), "a channel kept a mapping"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with make_lab() as made:
        yield made


@pytest.fixture(params=[0, 4], ids=["host", "card"])
def chan(lab: Lab, request: pytest.FixtureRequest) -> Iterator[DmaChannel]:
    """One channel of each side with the real ring."""
    with lab.channel(request.param) as ch:
        yield ch


def local(ch: DmaChannel) -> int:
    """Card address of a scratch area in the memory of the channel's owner."""
    return SMPT + MiB if ch.index < 4 else MiB


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
    assert select([fd], [], [], 5)[0]
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
            assert select([ch.irq_fd], [], [], 5)[0], "no interrupt within 5 s"
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


@pytest.mark.parametrize("c", [3, 7])
def test_hw_33_broken_channel_is_busy(lab: Lab, c: int) -> None:
    """HW-33: DCHERR or the quiesced bit make allocation fail EBUSY, channel disabled and masked."""
    raw = RawChannel(lab.bus, c, 0, 8, host=False)
    raw.setup()
    raw.go(memcpy_desc(0, 0, 0))
    raw.halted()
    with pytest.raises(DmaError) as e:
        lab.channel(c)
    assert e.value.errno == errno.EBUSY
    assert not lab.bus.read("dcr") & 2 << 2 * c
    assert lab.bus.read("dcar", c) & C["DMA_DCAR_IM1" if c < 4 else "DMA_DCAR_IM0"]
    lab.engine.reset()
    lab.channel(c).free()


def test_hw_33_no_memory(lab: Lab) -> None:
    """HW-33: a ring that cannot be had is ENOMEM, one that cannot be mapped too; nothing is kept."""
    tiny = DmaMemory(PageAllocator(lab.bus.fds[0], 0, 4096))
    with pytest.raises(OSError, match="room") as e:
        DmaChannel(lab.bus, 4, tiny)
    assert e.value.errno == errno.ENOMEM
    unmappable = DmaMemory(lab.host.pages, lambda off, size: 0)
    with pytest.raises(DmaError) as e2:
        DmaChannel(lab.bus, 0, unmappable)
    assert e2.value.errno == errno.ENOMEM


def test_hw_34_freeing_a_stalled_channel(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """HW-34: free waits its time, logs, and gives everything back although nothing completes."""
    ch = lab.channel(5)
    bad = ch.prep_memcpy(0, 127 * MiB, 2 * MiB)  # runs out of GDDR
    assert bad
    called: list[int] = []
    bad.submit(lambda: called.append(1))
    start = time.monotonic()
    assert ch.free(timeout_s=0.2) is False
    assert 0.19 < time.monotonic() - start < 3
    assert "not drained within 0.2 s" in caplog.text
    assert called == []
    assert ch.free() is True  # nothing left to do


def test_hw_34_sync_wait_tells_a_halted_channel_at_once(lab: Lab) -> None:
    """HW-31: our wait reports the halt with its DCHERR instead of sitting out five seconds."""
    ch = lab.channel(4)
    tx = ch.prep_memcpy(0, 127 * MiB, 2 * MiB)
    assert tx
    start = time.monotonic()
    with pytest.raises(DmaError, match="DCHERR 0x20") as e:
        ch.sync_wait(tx.submit())
    assert e.value.errno == errno.EIO
    assert time.monotonic() - start < 2
    assert ch.halted
    ch.free(timeout_s=0)


def test_hw_34_sync_wait_times_out(lab: Lab) -> None:
    """HW-34: a channel that does not run ends the wait with ETIMEDOUT."""
    with lab.channel(4) as ch:
        raw = lab.bus.read("dcr")
        lab.bus.write("dcr", raw & ~(2 << 8))
        tx = ch.prep_memcpy(0, 64, 64)
        assert tx
        cookie = tx.submit()
        with pytest.raises(DmaError) as e:
            ch.sync_wait(cookie, timeout_s=0.1)
        assert e.value.errno == errno.ETIMEDOUT
        lab.bus.write("dcr", raw)
        ch.sync_wait(cookie)


def test_hw_28_terminate_all(lab: Lab, chan: DmaChannel) -> None:
    """dmaengine: terminate_all drops what is not complete, without callbacks; the channel goes on."""
    seen: list[str] = []
    bit = 2 << 2 * chan.index
    tx = chan.prep_imm_data(local(chan), 1)
    assert tx
    first = tx.submit(lambda: seen.append("first"))
    chan.sync_wait(first)
    raw = lab.bus.read("dcr")
    lab.bus.write("dcr", raw & ~bit)
    cookies = []
    for _ in range(10):
        tx = chan.prep_imm_data(local(chan) + 64, 0xBAD)
        assert tx
        cookies.append(tx.submit(lambda: seen.append("dropped")))
    chan.issue_pending()
    chan.terminate_all()
    assert [chan.tx_status(c) for c in (first, *cookies)] == [Status.COMPLETE] + [Status.TERMINATED] * 10
    with pytest.raises(DmaError) as e:
        chan.sync_wait(cookies[0])
    assert e.value.errno == errno.ECANCELED
    tx = chan.prep_imm_data(local(chan) + 128, 7)
    assert tx
    chan.sync_wait(tx.submit(lambda: seen.append("after")))
    assert seen == ["first", "after"]
    assert lab.bus.card_view(local(chan), 256).load(64, 8) == 0
    assert lab.bus.card_view(local(chan), 256).load(128, 8) == 7


def test_hw_28_terminate_under_load(lab: Lab, chan: DmaChannel) -> None:
    """dmaengine: after terminate_all returns, no byte of a dropped copy moves."""
    lab.bus.gddr.write(0, b"\x01" * MiB)
    dst = local(chan) + 4 * MiB
    view = lab.bus.card_view(dst, MiB)
    for _ in range(10):
        for _ in range(50):
            tx = chan.prep_memcpy(dst, 0, MiB)
            assert tx
            tx.submit()
        chan.issue_pending()
        chan.terminate_all()
        view.zero(0, MiB)
        assert view.read(0, MiB) == bytes(MiB)
    tx = chan.prep_memcpy(dst, 0, MiB)
    assert tx
    chan.sync_wait(tx.submit())
    assert view.read(0, MiB) == b"\x01" * MiB


def test_hw_28_second_owner_continues_where_the_first_stood(lab: Lab) -> None:
    """HW 5.4: count and tail survive a change of owner; the next one works without a head rewrite."""
    for n in range(4):
        with lab.channel(6) as ch:
            tx = ch.prep_imm_data(8 * n, n + 1)
            assert tx
            ch.sync_wait(tx.submit())
        assert lab.bus.read("dcherr", 6) == 0
    assert [lab.bus.gddr.load(8 * n, 8) for n in range(4)] == [1, 2, 3, 4]


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
                assert select([irqs.dispatch_fd], [], [], 5)[0]
                assert irqs.dispatch() == 1 << 8
                assert rang(irq.fd) == 0


def test_hw_28_hostile_status_is_not_believed(lab: Lab) -> None:
    """HW-28: a count that was never issued retires nothing."""
    with lab.channel(4) as ch:
        tx = ch.prep_imm_data(0, 1)
        assert tx
        cookie = tx.submit()
        for lie in (5, 131068, 0x1FFFF):
            lab.bus.hw_store("dstat", lie, 4)
            assert ch.tx_status(cookie) is Status.IN_PROGRESS
        assert ch.counters().bad_status >= 3
        lab.bus.hw_store("dstat", 0, 4)
        ch.sync_wait(cookie)


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


def test_hw_22_pause_and_resume(lab: Lab, chan: DmaChannel) -> None:
    """HW-22: a paused channel stands still between descriptors and loses nothing."""
    chan.pause()
    cookies = []
    for n in range(8):
        tx = chan.prep_imm_data(local(chan) + 8 * n, n + 1)
        assert tx
        cookies.append(tx.submit())
    with pytest.raises(DmaError) as e:
        chan.sync_wait(cookies[-1], timeout_s=0.05)
    assert e.value.errno == errno.ETIMEDOUT
    assert lab.bus.card_view(local(chan), 64).read(0, 64) == bytes(64)
    chan.resume()
    chan.sync_wait(cookies[-1])
    assert lab.bus.card_view(local(chan) + 56, 8).load(0, 8) == 8


def test_hw_10_channel_set_up_before_the_smpt_is_restored(lab: Lab) -> None:
    """HW-10: after a reset the channels are set up (step 5) before the SMPT is (step 10)."""
    far = DmaMemory(PageAllocator(lab.bus.fds[2], 16 * GiB, 16 * GiB + 8 * MiB), lab.host.map, lab.host.unmap)
    registers = [lab.bus.read("smpt", i) for i in range(32)]
    lab.engine.reset()
    lab.bus.hw_reset()
    with DmaChannel(lab.bus, 0, far) as ch:
        for i, value in enumerate(registers):
            lab.bus.write("smpt", value, i)
        tx = ch.prep_imm_data(0x40, 0x1234)
        assert tx
        ch.sync_wait(tx.submit())
    assert lab.bus.gddr.load(0x40, 8) == 0x1234


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


def test_hw_34_channels_of_a_lost_owner_stand_still(lab: Lab) -> None:
    """HW-34: after quiesce nothing moves, though descriptors wait; ETIMEDOUT while one is in progress."""
    with lab.channel(4) as ch, lab.channel(5) as other:
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 1000) == 0
        lab.bus.gddr.write(0, b"x" * 64)
        tx = ch.prep_memcpy(MiB, 0, 64)
        assert tx
        tx.submit()
        ch.issue_pending()
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 0) == 0
        assert lab.bus.gddr.read(MiB, 64) == bytes(64)
        ch.resume()
        wait_for("copied", lambda: lab.bus.gddr.read(MiB, 64) == b"x" * 64)
        FaultTable(lab.bus.faults).install(parse({"kind": "dma-delay", "delay": "300ms", "count": 1}))
        other.resume()
        tx = other.prep_interrupt()
        assert tx
        tx.submit()
        other.issue_pending()
        wait_for("at work", lambda: bool(lab.bus.read("dstat", 5) & C["DMA_DSTAT_ACTIVE"]))
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 10) == -errno.ETIMEDOUT
        assert lib.mic_dma_quiesce(lab.bus.ptr, 4, 4, 5000) == 0
        ch.resume()
        other.resume()
