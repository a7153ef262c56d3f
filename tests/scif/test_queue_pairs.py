"""Queue pairs that are used again: late enough, wiped, and not kept for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fabric import Fabric, eventually, fabric

from mic_emu.clock import ManualClock
from mic_emu.memory import PAGE
from mic_emu.scif.kernel import KernelEndpoint
from mic_emu.scif.qp import EP_RING, QueuePair
from mic_emu.scif.queue_pairs import RETIRE_S

SIZE = PAGE + EP_RING + PAGE


def run(body: Callable[[Fabric, ManualClock], Awaitable[None]]) -> None:
    async def main() -> None:
        clock = ManualClock()
        async with fabric(0, clock=clock) as fab:
            await asyncio.wait_for(body(fab, clock), 20)

    asyncio.run(main())


async def pair(fab: Fabric) -> tuple[KernelEndpoint, KernelEndpoint]:
    listener, ep = fab.host.open(), fab.host.open()
    port = listener.bind()
    listener.listen()
    conn, _ = await asyncio.gather(listener.accept(), ep.connect((0, port)))
    await listener.close()
    return ep, conn


def places(eps: tuple[KernelEndpoint, ...]) -> list[QueuePair]:
    assert all(ep.qp is not None for ep in eps)
    return [ep.qp for ep in eps if ep.qp is not None]


async def spoil(fab: Fabric) -> set[int]:
    """A connection that leaves bytes everywhere in its pages, and is closed; where they lie."""
    eps = await pair(fab)
    offsets = {qp.offset for qp in places(eps)}
    for at in offsets:
        fab.host.memory.write(at + PAGE, b"\xa5" * (SIZE - PAGE))
        fab.host.memory.write(at + PAGE // 2, b"\xa5" * (PAGE // 2))
    await asyncio.gather(*(ep.close() for ep in eps))
    return offsets


def test_scif_17_no_byte_of_an_earlier_connection_is_left_in_a_used_queue_pair() -> None:
    """Pages are used again, and all is zero in them but for what the new connection has put there."""

    async def body(fab: Fabric, clock: ManualClock) -> None:
        await pair(fab)  # from now on the node looks for what to free, every RETIRE_S
        await clock.advance(RETIRE_S * 0.2)
        old = await spoil(fab)
        await clock.advance(RETIRE_S * 1.2)
        assert old <= set(dict(fab.host.allocator.used_areas())), "freed pages are zero anyway"
        used = set()
        for _ in range(4):
            for qp in places(await pair(fab)):
                used.add(qp.offset)
                assert not any(fab.host.memory.read(qp.offset + PAGE, SIZE - PAGE))
                assert not any(fab.host.memory.read(qp.offset + PAGE // 2, PAGE // 2))
        assert used & old

    run(body)


def test_scif_17_a_queue_pair_is_not_used_again_before_its_time() -> None:
    """A thread may still be in a call on the closed descriptor: nobody else gets its pages meanwhile."""

    async def body(fab: Fabric, clock: ManualClock) -> None:
        old = await spoil(fab)
        await clock.advance(RETIRE_S * 0.9)
        for _ in range(4):
            assert not {qp.offset for qp in places(await pair(fab))} & old

    run(body)


def test_scif_17_queue_pairs_that_nobody_uses_again_are_freed() -> None:
    """Those that wait wiped for the next connection, too."""

    async def body(fab: Fabric, clock: ManualClock) -> None:
        eps = await pair(fab)
        fab.host.queue_pairs.free_retired()
        before = fab.host.used_bytes
        await spoil(fab)
        await clock.advance(RETIRE_S * 0.6)
        await spoil(fab)
        await clock.advance(RETIRE_S * 0.6)
        await spoil(fab)
        assert len(fab.host.queue_pairs)
        await clock.advance(3 * RETIRE_S)
        await eventually(lambda: not len(fab.host.queue_pairs), "that all are free")
        assert fab.host.used_bytes == before
        await asyncio.gather(*(ep.close() for ep in eps))

    run(body)
