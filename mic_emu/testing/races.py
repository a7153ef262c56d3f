"""What a hostile card can do to a backend beside malformed chains (VOP-47, 50..57), and how a backend is judged.

``CASES`` names every malformation and every race; ``try_on`` plays one of them on a backend::

    try_on(Echo, case("loop"), seed=1, request=lambda driver: driver.request(b"abc", room=8))
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mic_emu import layout as L
from mic_emu.testing.backend import BackendRig
from mic_emu.testing.hostile import BUFFERS, MALFORMATIONS, Malformation, scribble, storm
from mic_emu.testing.rings import INDIRECT_DESC, WRITE
from mic_emu.vop.backend import Backend

Request = Callable[[BackendRig], object]
Play = Callable[[BackendRig, random.Random], None]
GUARD = 4096


class NotPossible(Exception):
    """This backend's shape leaves no room for the case (no indirect descriptors, a ring too small)."""


@dataclass(frozen=True)
class Case:
    """One hostile act. ``play`` performs it and waits for its documented end; ``repairs``: the card resets
    the device afterwards. A case that ends the device has ``ends``."""

    name: str
    clause: str
    play: Play
    repairs: bool = True
    ends: bool = False
    accept: int = ~0  # feature bits that the card accepts
    guarded: bool = True  # False: the card may name any of its memory, so the device may write there


def _malformed(m: Malformation) -> Case:
    def play(rig: BackendRig, rng: random.Random) -> None:
        if not m.fits(rig.rig):
            raise NotPossible(f"{m.name} needs another ring, or other features, than this backend has")
        launch = m.make(rng, rig.rig, rig.rig.alloc(BUFFERS))
        before = rig.loop.processed
        launch(rig.driver)
        rig.rig.bus.ring_host(0)
        if m.error is None:
            rig.until(lambda: rig.broken or rig.loop.processed > before, f"an end of {m.name}")
        else:
            rig.until(lambda: rig.broken, f"NEEDS_RESET after {m.name}")
            assert rig.loop.processed == before, f"{m.name} came through to process()"

    return Case(m.name, m.clause, play, accept=~INDIRECT_DESC if m.indirect is False else ~0)


# --- hand-shakes ---------------------------------------------------------------------------------


def _used_ring(where: Callable[[BackendRig, random.Random], int]) -> Play:
    def play(rig: BackendRig, rng: random.Random) -> None:
        before = rig.loop.processed
        rig.offer_rings([where(rig, rng)] * rig.rig.num_vq)
        rig.driver.offer(0)
        rig.rig.bus.ring_host(0)
        # The device answers no request there; it answers the hand-shake that follows.
        assert rig.loop.processed == before, "a chain was taken from a ring without a used ring"

    return play


def _slot_rewritten(rig: BackendRig, rng: random.Random) -> None:
    """type, num_vq, lengths, and per ring address and num; status and the used addresses stay."""
    host, slot = rig.rig.bus.host, rig.rig.slot_off
    for name in ("type", "num_vq", "feature_len", "config_len"):
        L.DEVICE_DESC.put(host, slot, name, rng.randrange(1, 128))
    for i in range(rig.rig.num_vq):
        row = slot + L.DEVICE_DESC.size + L.VQCONFIG.size * i
        L.VQCONFIG.put(host, row, "address", rng.getrandbits(64))
        L.VQCONFIG.put(host, row, "num", rng.getrandbits(16))


def _doorbells(rig: BackendRig, rng: random.Random) -> None:
    """c2h_vdev_db is the host's own byte, h2c_vdev_db out of range must ring nothing (VOP-52)."""
    rig.rig.put_ctrl("c2h_vdev_db", rng.choice([-1, 4, 99, 127]))
    rig.rig.put_ctrl("h2c_vdev_db", rng.choice([-1, -128, 16, 100, 127]))
    lines = [rig.rig.bus.irq_fd(line) for line in range(1, L.CONSTANTS["CARD_DOORBELLS"])]
    for fd in lines:
        _drain(fd)
    rig.driver.add([(rig.rig.alloc(64), 16)], [(rig.rig.alloc(64), 64)], 1 << 40)
    before = rig.loop.processed
    rig.rig.bus.ring_host(0)
    rig.until(lambda: rig.loop.processed > before, "the request comes through")
    assert not any(_drain(fd) for fd in lines), "a doorbell rang that nobody gave the device"


def _drain(fd: int) -> int:
    try:
        return int.from_bytes(os.read(fd, 8), "little")
    except BlockingIOError:
        return 0


def _storm(rig: BackendRig, rng: random.Random) -> None:
    storm(rig.rig, rng.randrange(1000, 5000))


# --- races ----------------------------------------------------------------------------------------


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run ``act`` again and again in a thread."""
    done = threading.Event()

    def body() -> None:
        while not done.is_set():
            act()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _flipping(rig: BackendRig, rng: random.Random) -> None:
    """VOP-51: descriptor 0 changes between two good versions and a bad one while the device walks it."""
    drv, gddr = rig.driver, rig.rig.bus.gddr.size
    good, other = rig.rig.alloc(GUARD), rig.rig.alloc(GUARD)
    versions = [(good, 64), (other, GUARD), (gddr - 8, 64), (good, 0xFFFFFFFF)]

    def flip() -> None:
        at, length = rng.choice(versions)
        drv.desc(0, at, length, WRITE)

    with _meanwhile(flip):
        for _ in range(200):
            if rig.broken:
                break
            drv.offer(0)
            rig.rig.bus.ring_host(0)


def _scribbling(rig: BackendRig, rng: random.Random) -> None:
    """VOP-50, VOP-51: random stores all over the ring, under doorbells."""
    for _ in range(20):
        scribble(rig.rig, rng.getrandbits(32), 100)
        storm(rig.rig, 20)


def _fill(rig: BackendRig) -> int:
    """Requests until the ring is full; nobody collects them. How many."""
    n = 0
    try:
        while True:
            rig.submit(b"hostile!", 16)
            n += 1
    except OSError:
        return n


def _card_dies(rig: BackendRig, rng: random.Random) -> None:
    """VOP-54: chains in flight, the card OS gone without a word; the host ends the device."""
    before = rig.loop.processed
    assert _fill(rig) > 0
    rig.until(lambda: rig.loop.processed > before, "the backend begins")
    rig.stop()


def _removed_while_working(rig: BackendRig, rng: random.Random) -> None:
    """VOP-55: the device is removed while requests are being served."""

    def work() -> None:
        rig.driver.offer(0)
        rig.rig.bus.ring_host(0)

    rig.driver.desc(0, rig.rig.alloc(64), 64, WRITE)
    with _meanwhile(work):
        rig.stop()


def _card_hangs(rig: BackendRig, rng: random.Random) -> None:
    """VOP-56: the ring is full, the card answers nothing; when the device is gone its memory is the card's."""
    _fill(rig)
    rig.stop()
    rig.forget()


def _reset_half_way(rig: BackendRig, rng: random.Random) -> None:
    """VOP-57: reset with chains in flight; ``check`` looks whether their memory is touched afterwards."""
    for _ in range(rng.randrange(1, 4)):
        _fill(rig)
        rig.reset()


RACES: tuple[Case, ...] = (
    Case("used_ring_at_0", "VOP-47", _used_ring(lambda rig, rng: 0)),
    Case("used_ring_misaligned", "VOP-47", _used_ring(lambda rig, rng: rig.rig.used[0] + rng.choice([1, 2, 3]))),
    Case("used_ring_outside", "VOP-47",
         _used_ring(lambda rig, rng: rng.choice([rig.rig.bus.gddr.size - 4, rig.rig.bus.gddr.size, (1 << 64) - 4]))),
    Case("slot_rewritten", "VOP-50", _slot_rewritten, repairs=False),
    Case("ring_scribbled", "VOP-50", _scribbling, guarded=False),
    Case("descriptors_change_while_read", "VOP-51", _flipping),
    Case("doorbells_out_of_range", "VOP-52", _doorbells),
    Case("doorbell_storm", "VOP-53", _storm, repairs=False),
    Case("card_dies", "VOP-54", _card_dies, ends=True),
    Case("removed_while_working", "VOP-55", _removed_while_working, ends=True),
    Case("removed_while_the_card_hangs", "VOP-56", _card_hangs, ends=True),
    Case("reset_half_way", "VOP-57", _reset_half_way),
)  # fmt: skip

CASES: dict[str, Case] = {c.name: c for c in (*map(_malformed, MALFORMATIONS), *RACES)}
"""Everything, by name; in the order of the clauses' groups."""


def strays(rig: BackendRig) -> list[int]:
    """Card addresses of pages that exist although nobody allocated them: the device touched them."""
    fd, size = rig.rig.gddr_pages.fd, rig.rig.bus.gddr.size
    owned = rig.rig.gddr_pages.used_areas()
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: nothing behind it
        at = os.lseek(fd, start, os.SEEK_HOLE)
        pages = range(start, at, GUARD)
        found += [p for p in pages if not any(off <= p < off + length for off, length in owned)]
    return found


def try_on(
    make: Callable[[], Backend], case: Case, seed: int, request: Request,
    watch: Callable[[BackendRig], object] = lambda rig: None,
) -> None:  # fmt: skip
    """Play ``case`` on a backend. ``request`` sends a good request and asserts its answer; it is called before
    and afterwards: the device must work again (after the card's reset, or as a new device when it ended).
    ``watch`` gets every rig that is made.

    Raises AssertionError: what the backend did wrong; NotPossible; what the backend raised.
    """
    rng = random.Random(f"{case.name} {seed}")
    with BackendRig(make(), accept=case.accept) as rig:
        watch(rig)
        request(rig)
        guards = [rig.rig.alloc(GUARD) for _ in range(2)]
        pattern = rng.randbytes(GUARD)
        for at in guards:
            rig.rig.bus.gddr.write(at, pattern)
        case.play(rig, rng)
        if not case.ends:
            if case.repairs:
                rig.reset()
            request(rig)
        rig.check()
        if case.guarded:
            for at in guards:
                assert rig.rig.bus.gddr.read(at, GUARD) == pattern, f"memory of nobody was written at {at:#x}"
            touched = strays(rig)
            assert not touched, f"the device touched card memory that nobody gave it: {touched[0]:#x}"
    if case.ends:
        with BackendRig(make(), accept=case.accept) as again:
            watch(again)
            request(again)
