"""A card that breaks the rules of its rings: every malformed chain, address and index of VOP-44..53, seeded.

Each attack writes into the ring of a ``FakeDriver`` and says which errno the device half must end in
(None: it must tolerate it). A backend under test is right when it flags the device (NEEDS_RESET), touches
nothing outside the chain's own buffers, and works again after a reset::

    for attack in attacks(rig, seed=1):
        attack.launch(driver)
        rig.bus.ring_host(0)
        eventually(lambda: rig.status & NEEDS_RESET, 5, attack.name)
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mic_emu.testing.rings import INDIRECT, INDIRECT_DESC, NEXT, SMPT_BASE, WRITE, FakeDriver, Rig

U64 = 1 << 64


@dataclass(frozen=True)
class Attack:
    """One way to break a ring. ``error``: what the device half answers, None when it must cope."""

    name: str
    clause: str
    error: int | None
    launch: Callable[[FakeDriver], None]


def _chain(*rows: tuple[int, int, int, int], head: int = 0) -> Callable[[FakeDriver], None]:
    """Raw descriptors 0.. and one available entry."""

    def launch(drv: FakeDriver) -> None:
        for k, row in enumerate(rows):
            drv.desc(k, *row)
        drv.offer(head)

    return launch


def _table(
    addr: int, rows: list[tuple[int, int, int, int]], length: int, flags: int = INDIRECT
) -> Callable[[FakeDriver], None]:
    """An indirect table at ``addr``, and the descriptor that names it."""

    def launch(drv: FakeDriver) -> None:
        drv.table(addr, rows)
        drv.desc(0, addr, length, flags, 0)
        drv.offer(0)

    return launch


def _loops(rng: random.Random, num: int, buf: int) -> Iterator[Attack]:
    cycle = rng.randrange(1, num + 1)

    def launch(drv: FakeDriver) -> None:
        for k in range(num):
            drv.desc(k, buf, 16, NEXT, (k + 1) % cycle if k < cycle else k)
        drv.offer(rng.randrange(cycle))

    yield Attack(f"loop of {cycle}", "VOP-44", errno.ELOOP, launch)
    yield Attack("loop of empty descriptors", "VOP-44", errno.ELOOP, _chain((0, 0, NEXT, 0)))


def _indices(rng: random.Random, num: int, buf: int) -> Iterator[Attack]:
    head = rng.choice([num, num + 1, 0x7FFF, 0xFFFF])
    yield Attack(f"head {head}", "VOP-45", errno.EINVAL, lambda drv: drv.offer(head))
    nxt = rng.choice([num, 0x8000, 0xFFFF])
    yield Attack(f"next {nxt}", "VOP-45", errno.EINVAL, _chain((buf, 16, NEXT, nxt)))
    jump = rng.choice([num + 1, 0x7FFF, 0xFFFF])

    def leap(drv: FakeDriver) -> None:
        avail = drv.rig.blocks[0] + 16 * num
        drv.set_avail_idx(drv.rig.bus.host.load(avail + 2, 2) + jump)

    yield Attack(f"avail.idx {jump} ahead", "VOP-49", errno.EPROTO, leap)


def _addresses(rng: random.Random, gddr: int) -> Iterator[Attack]:
    length = rng.randrange(2, 1 << 16)
    spots = {
        "at the end": gddr,
        "across the end": gddr - length + 1,
        "wrapping": U64 - rng.randrange(1, length),
        "in the window of host memory": SMPT_BASE + rng.randrange(1 << 30),
        "far outside": rng.randrange(gddr, U64 - length),
    }
    for name, addr in spots.items():
        for flags in (0, WRITE):
            what = "writable" if flags else "readable"
            yield Attack(f"{what} segment {name}", "VOP-46", errno.EFAULT, _chain((addr, length, flags, 0)))
    yield Attack("4 GiB segment", "VOP-46", errno.EFAULT, _chain((rng.randrange(gddr), 0xFFFFFFFF, WRITE, 0)))


def _order(buf: int) -> Iterator[Attack]:
    yield Attack(
        "readable after writable", "VOP-48", errno.EINVAL, _chain((buf, 16, NEXT | WRITE, 1), (buf, 16, 0, 0))
    )
    empty = _chain((U64 - 1, 0, NEXT, 1), (0, 0, NEXT, 2), (0, 0, 0, 0))
    yield Attack("only empty descriptors", "VOP-48", None, empty)
    yield Attack("no status byte", "VOP-61", None, _chain((buf, 16, 0, 0)))


def _tables(rng: random.Random, negotiated: bool, gddr: int, buf: int) -> Iterator[Attack]:
    one = [(buf, 16, 0, 0)]
    if not negotiated:
        yield Attack("INDIRECT without the feature", "VOP-48", errno.EINVAL, _table(buf + 4096, one, 16))
        return
    at = buf + 4096
    for name, rows, length, flags in (
        ("empty table", one, 0, INDIRECT),
        ("table of odd length", one, rng.choice([1, 15, 17, 31]), INDIRECT),
        ("table with NEXT", one, 16, INDIRECT | NEXT),
        ("writable table", one, 16, INDIRECT | WRITE),
        ("huge table", one, 16 << 20, INDIRECT),
        ("table in a table", [(at, 16, INDIRECT, 0)], 16, INDIRECT),
        ("next outside the table", [(buf, 16, NEXT, rng.randrange(1, 0xFFFF))], 16, INDIRECT),
    ):
        yield Attack(name, "VOP-48", errno.EINVAL, _table(at, rows, length, flags))
    yield Attack(
        "loop in a table", "VOP-44", errno.ELOOP, _table(at, [(buf, 16, NEXT, 1), (buf, 16, NEXT, 0)], 32)
    )
    outside = gddr - 16

    def across(drv: FakeDriver) -> None:
        drv.desc(0, outside, 32, INDIRECT, 0)
        drv.offer(0)

    yield Attack("table across the end", "VOP-46", errno.EFAULT, across)


def attacks(rig: Rig, seed: int) -> list[Attack]:
    """Every attack on ring 0 of a rig, in an order and with values that ``seed`` decides.

    Allocates 8 KiB of the rig's GDDR for buffers.
    """
    rng = random.Random(seed)
    buf, gddr = rig.alloc(8192), rig.bus.gddr.size
    found = [
        *_loops(rng, rig.num, buf),
        *_indices(rng, rig.num, buf),
        *_addresses(rng, gddr),
        *_order(buf),
        *_tables(rng, bool(rig.features & INDIRECT_DESC), gddr, buf),
    ]
    rng.shuffle(found)
    return found


def storm(rig: Rig, rings: int) -> None:
    """VOP-53: a doorbell storm towards the host."""
    for _ in range(rings):
        rig.bus.ring_host(0)


def scribble(rig: Rig, seed: int, rounds: int) -> None:
    """VOP-50, VOP-51: random stores all over ring 0's descriptors, available ring and used ring."""
    rng = random.Random(seed)
    block, used = rig.blocks[0], rig.used[0]
    for _ in range(rounds):
        if rng.random() < 0.8:
            rig.bus.host.store(block + 2 * rng.randrange((18 * rig.num + 6) // 2), 2, rng.getrandbits(16))
        else:
            rig.bus.gddr.store(used + 2 * rng.randrange((8 * rig.num + 6) // 2), 2, rng.getrandbits(16))
