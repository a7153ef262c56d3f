"""A node that expects an answer finds it before the doorbell rings, but not one that a fault filter holds back."""

from __future__ import annotations

import asyncio

from fabric import eventually, fabric

from mic_emu.scif.proto import Msg, Op

ANSWER = Msg(Op.NODE_REMOVE_ACK, (1, 0), (0, 0))  # nothing follows from it


def test_scif_3_3_an_expected_answer_needs_no_doorbell() -> None:
    """What nobody expects waits for the doorbell."""

    async def main() -> None:
        async with fabric(1) as fab:
            card, link = fab.cards[0], fab.cards[0].host_link
            card.card_link.ports.ring = lambda: None
            before = link.received
            card.card_link.send(ANSWER)
            for _ in range(3):
                await asyncio.sleep(0)
            assert link.received == before
            fab.host.linger.expect()
            await eventually(lambda: link.received == before + 1, "the answer")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_scif_3_3_a_doorbell_that_a_filter_holds_back_is_missed() -> None:
    """The look would hide the fault; when the doorbell rings at last, the message is there."""

    async def main() -> None:
        async with fabric(1) as fab:
            card, link = fab.cards[0], fab.cards[0].host_link
            card.card_link.ports.ring = lambda: None
            link.ports.disturbed = lambda: True
            before = link.received
            card.card_link.send(ANSWER)
            fab.host.linger.expect()
            for _ in range(3):
                await asyncio.sleep(0)
            assert link.received == before
            card.bus.ring_host(0)
            await eventually(lambda: link.received == before + 1, "the answer")

    asyncio.run(asyncio.wait_for(main(), 20))


def test_scif_3_3_a_lost_link_is_looked_at_no_more() -> None:
    """Neither when it goes nor when the node does."""

    async def main() -> None:
        async with fabric(2) as fab:
            fab.cards[0].host_link.down()
            fab.host.linger.expect()
            link = fab.cards[1].host_link
            before = link.received
            fab.cards[1].card_link.ports.ring = lambda: None
            fab.cards[1].card_link.send(Msg(Op.NODE_REMOVE_ACK, (2, 0), (0, 0)))
            await eventually(lambda: link.received == before + 1, "the other's answer")
            fab.host.linger.expect()

    asyncio.run(asyncio.wait_for(main(), 20))
