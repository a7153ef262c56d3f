"""A card that breaks the rules of its rings: every malformed chain, address and index of VOP-44..49, seeded.

Each attack writes into ring 0 of a ``FakeDriver`` and says which errno the device half must end in
(None: it must tolerate it). A backend under test is right when it flags the device (NEEDS_RESET), touches
nothing outside the chain's own buffers, and works again after a reset::

    for attack in attacks(rig, seed=1):
        attack.launch(driver)
        rig.bus.ring_host(0)
        eventually(lambda: rig.status & NEEDS_RESET, 5, attack.name)

What a card can do beside its chains (VOP-47, 50..57) is in ``races.py``; the fixture ``hostile_driver`` has both.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mic_emu.testing.rings import INDIRECT, INDIRECT_DESC, NEXT, SMPT_BASE, WRITE, FakeDriver, Rig

U64 = 1 << 64
BUFFERS = 8192  # bytes of GDDR that an attack gets for buffers and tables

Launch = Callable[[FakeDriver], None]
Row = tuple[int, int, int, int]
"""A raw descriptor: address, length, flags, next."""


@dataclass(frozen=True)
class Malformation:
    """One way to break a ring, before its random values are drawn.

    error: what the device half answers, None when it must cope. indirect: only when INDIRECT_DESC is, or is
    not, negotiated (None: either). make: draws the values; gets the rig and the address of BUFFERS bytes.
    """

    name: str
    clause: str
    error: int | None
    make: Callable[[random.Random, Rig, int], Launch]
    indirect: bool | None = None
    entries: int = 1  # of the ring, at least

    def fits(self, rig: Rig) -> bool:
        """Can the driver of this rig do it?"""
        return rig.num >= self.entries and self.indirect in (None, bool(rig.features & INDIRECT_DESC))


@dataclass(frozen=True)
class Attack:
    """A malformation with its values: ``launch`` does it."""

    name: str
    clause: str
    error: int | None
    launch: Launch


def _chain(*rows: Row, head: int = 0) -> Launch:
    """Raw descriptors 0.. and one available entry."""

    def launch(drv: FakeDriver) -> None:
        for k, row in enumerate(rows):
            drv.desc(k, *row)
        drv.offer(head)

    return launch


def _table(addr: int, rows: list[Row], length: int, flags: int = INDIRECT) -> Launch:
    """An indirect table at ``addr``, and the descriptor that names it."""

    def launch(drv: FakeDriver) -> None:
        drv.table(addr, rows)
        drv.desc(0, addr, length, flags, 0)
        drv.offer(0)

    return launch


def _loop(rng: random.Random, rig: Rig, buf: int) -> Launch:
    cycle = rng.randrange(1, rig.num + 1)
    head = rng.randrange(cycle)

    def launch(drv: FakeDriver) -> None:
        for k in range(rig.num):
            drv.desc(k, buf, 16, NEXT, (k + 1) % cycle if k < cycle else k)
        drv.offer(head)

    return launch


def _head(rng: random.Random, rig: Rig, buf: int) -> Launch:
    head = rng.choice([rig.num, rig.num + 1, 0x7FFF, 0xFFFF])
    return lambda drv: drv.offer(head)


def _next(rng: random.Random, rig: Rig, buf: int) -> Launch:
    return _chain((buf, 16, NEXT, rng.choice([rig.num, 0x8000, 0xFFFF])))


def _leap(rng: random.Random, rig: Rig, buf: int) -> Launch:
    jump = rng.choice([rig.num + 1, 0x7FFF, 0xFFFF])

    def launch(drv: FakeDriver) -> None:
        avail = rig.blocks[0] + 16 * rig.num
        drv.set_avail_idx(rig.bus.host.load(avail + 2, 2) + jump)

    return launch


SPOTS: dict[str, Callable[[random.Random, int, int], int]] = {
    "at_the_end": lambda rng, gddr, n: gddr,
    "across_the_end": lambda rng, gddr, n: gddr - n + 1,
    "wrapping": lambda rng, gddr, n: U64 - rng.randrange(1, n),
    "in_host_memory": lambda rng, gddr, n: SMPT_BASE + rng.randrange(1 << 30),
    "far_outside": lambda rng, gddr, n: rng.randrange(gddr, U64 - n),
}
"""Addresses that are not card memory, by name; for ``n`` bytes and a GDDR of so many bytes."""


def _segments() -> Iterator[Malformation]:
    for spot, place in SPOTS.items():
        for word, flags in (("readable", 0), ("writable", WRITE)):

            def make(
                rng: random.Random, rig: Rig, buf: int, place: Callable[..., int] = place, flags: int = flags
            ) -> Launch:
                n = rng.randrange(2, 1 << 16)
                return _chain((place(rng, rig.bus.gddr.size, n), n, flags, 0))

            yield Malformation(f"{word}_segment_{spot}", "VOP-46", errno.EFAULT, make)


def _large(rng: random.Random, rig: Rig, buf: int) -> Launch:
    return _chain((rng.randrange(rig.bus.gddr.size), 0xFFFFFFFF, WRITE, 0))


def _tables() -> Iterator[Malformation]:
    """Indirect tables that are wrong in themselves (VOP-48)."""
    shapes: dict[str, Callable[[random.Random, int, int], tuple[list[Row], int, int]]] = {
        "empty_table": lambda rng, at, buf: ([(buf, 16, 0, 0)], 0, INDIRECT),
        "table_of_odd_length": lambda rng, at, buf: ([(buf, 16, 0, 0)], rng.choice([1, 15, 17, 31]), INDIRECT),
        "table_with_next": lambda rng, at, buf: ([(buf, 16, 0, 0)], 16, INDIRECT | NEXT),
        "writable_table": lambda rng, at, buf: ([(buf, 16, 0, 0)], 16, INDIRECT | WRITE),
        "huge_table": lambda rng, at, buf: ([(buf, 16, 0, 0)], 16 << 20, INDIRECT),
        "table_in_a_table": lambda rng, at, buf: ([(at, 16, INDIRECT, 0)], 16, INDIRECT),
        "next_outside_the_table": lambda rng, at, buf: ([(buf, 16, NEXT, rng.randrange(1, 0xFFFF))], 16, INDIRECT),
    }  # fmt: skip
    for name, shape in shapes.items():

        def make(
            rng: random.Random, rig: Rig, buf: int, shape: Callable[..., tuple[list[Row], int, int]] = shape
        ) -> Launch:
            return _table(buf + 4096, *shape(rng, buf + 4096, buf))

        yield Malformation(name, "VOP-48", errno.EINVAL, make, indirect=True)


def _table_across(rng: random.Random, rig: Rig, buf: int) -> Launch:
    return _chain((rig.bus.gddr.size - 16, 32, INDIRECT, 0))


MALFORMATIONS: tuple[Malformation, ...] = (
    Malformation("loop", "VOP-44", errno.ELOOP, _loop),
    Malformation("loop_of_empty_descriptors", "VOP-44", errno.ELOOP, lambda rng, rig, buf: _chain((0, 0, NEXT, 0))),
    Malformation("loop_in_a_table", "VOP-44", errno.ELOOP,
                 lambda rng, rig, buf: _table(buf + 4096, [(buf, 16, NEXT, 1), (buf, 16, NEXT, 0)], 32), indirect=True),
    Malformation("head_outside_the_ring", "VOP-45", errno.EINVAL, _head),
    Malformation("next_outside_the_ring", "VOP-45", errno.EINVAL, _next),
    *_segments(),
    Malformation("segment_of_4_gib", "VOP-46", errno.EFAULT, _large),
    Malformation("table_across_the_end", "VOP-46", errno.EFAULT, _table_across, indirect=True),
    *_tables(),
    Malformation("table_not_negotiated", "VOP-48", errno.EINVAL,
                 lambda rng, rig, buf: _table(buf + 4096, [(buf, 16, 0, 0)], 16), indirect=False),
    Malformation("readable_behind_writable", "VOP-48", errno.EINVAL,
                 lambda rng, rig, buf: _chain((buf, 16, NEXT | WRITE, 1), (buf, 16, 0, 0)), entries=2),
    Malformation("only_empty_descriptors", "VOP-48", None,
                 lambda rng, rig, buf: _chain((U64 - 1, 0, NEXT, 1), (0, 0, NEXT, 2), (0, 0, 0, 0)), entries=3),
    Malformation("no_room_for_an_answer", "VOP-61", None, lambda rng, rig, buf: _chain((buf, 16, 0, 0))),
    Malformation("available_index_jumps", "VOP-49", errno.EPROTO, _leap),
)  # fmt: skip
"""Everything wrong that a chain or an index can be, by a name that stays the same."""


def attacks(rig: Rig, seed: int) -> list[Attack]:
    """Every attack on ring 0 of a rig, in an order and with values that ``seed`` decides.

    Allocates BUFFERS bytes of the rig's GDDR.
    """
    rng = random.Random(seed)
    buf = rig.alloc(BUFFERS)
    found = [Attack(m.name, m.clause, m.error, m.make(rng, rig, buf)) for m in MALFORMATIONS if m.fits(rig)]
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
