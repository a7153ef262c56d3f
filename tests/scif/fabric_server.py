"""A fabric as a process of its own: node 0 and its cards, each with its socket for programs.

usage: fabric_server.py DIR CARDS. Prints one line when it is ready, then answers commands, one JSON
line each: ``state`` (what the nodes still hold), ``private`` (KiB of memory that only this process has),
``exhaust N``, ``free N`` (take every free ephemeral port of node N, give them back); of card N: ``down N``
(it vanishes), ``up N [bank]`` (it is back, with an empty window bank or without one), ``freeze N`` (its node
hears no doorbell any more), ``cut N`` (its windows' pages go, and no node has heard of it); of its DMA
engine: ``stats N``, ``fault N KIND WORD=VALUE ...`` (as ``micemu fault``), ``heal N`` (take the faults out),
``pause N CHANNEL``, ``resume N CHANNEL``, ``reset N`` (the drivers stop, the engine is reset, they start).
Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fabric import Dma, Fabric, card_ports, eventually, fabric, host_ports

from mic_emu.clock import Clock
from mic_emu.faults import parse
from mic_emu.memory import WINDOW_BANK, revoke_windows
from mic_emu.scif.errors import ScifError
from mic_emu.scif.node import Node
from mic_emu.scif.service import ScifService, listen_at


def state(fab: Fabric, services: list[ScifService]) -> list[dict[str, Any]]:
    for node in fab.nodes:
        node.queue_pairs.free_retired()
    return [
        {
            "node": n.id,
            "online": n.node_ids(),
            "endpoints": len(n.endpoints),
            "ports": len(n.ports),
            "sessions": len(s.sessions),
            "controls": len(s._controls),
            "fresh": len(s._fresh),
            "tickets": len(s._memory._tickets),
            "windows": len(n.windows.own) + len(n.windows.remote),
            "records": len(n.records._granted),
            "questions": len(n.questions._open),
            "draining": len(n.draining),
            "queue_pairs": len(n.queue_pairs),
            "slots": len(n.notifier._owners),
            "runs": len(n.pages._runs),
            "holders": len(n.pages._holders),
            "used": n.used_bytes,
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
        for n, s in zip(fab.nodes, services, strict=True)
    ]


async def command(fab: Fabric, services: list[ScifService], words: list[str]) -> Any:
    if words[0] == "state":
        return state(fab, services)
    if words[0] == "private":
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    if words[0] in ("exhaust", "free"):
        return every_port(fab.nodes[int(words[1])], words[0] == "exhaust")
    index = int(words[1]) - 1
    card = fab.cards[index]
    if words[0] in ("stats", "fault", "heal", "pause", "resume", "reset"):
        assert card.dma is not None
        return engine_command(card.dma, words)
    if words[0] == "down":
        card.card_link.down()
        card.host_link.down()
        card.page.card_addr = card.page.host_addr = 0
        if card.dma is not None:  # a card that comes back was reset
            card.dma.stop()
            card.dma.engine.reset()
    elif words[0] == "freeze":
        card.fall_asleep()
    elif words[0] == "cut":
        revoke_windows(card.bus.fds[0])
    elif words[0] == "up":
        if words[2:] == ["bank"]:  # a real card would have another object now
            os.ftruncate(card.bus.fds[0], WINDOW_BANK + card.bus.gddr.size)
        card.host_link = fab.host.add_link(index + 1, host_ports(card.bus, card.page))
        card.card_link = card.node.add_link(0, card_ports(card.bus, card.page))
        card.host_link.start()
        card.card_link.start()
        if card.dma is not None:
            card.host_link.ports.quiesce = card.dma.quiesce
            card.dma.start()
        await eventually(lambda: index + 1 in fab.host.node_ids(), "online again")
    return "done"


EXHAUSTED: dict[int, list[int]] = {}


def every_port(node: Node, take: bool) -> int:
    """Take what ephemeral ports a node has, or give them back; returns their number."""
    ports = EXHAUSTED.setdefault(node.id, [])
    if not take:
        count = len(ports)
        while ports:
            node.ports.drop(ports.pop())
        return count
    with contextlib.suppress(ScifError):
        while True:
            ports.append(node.ports.take(0))
    return len(ports)


def engine_command(dma: Dma, words: list[str]) -> Any:
    """Look at, disturb and reset the engine of a card."""
    if words[0] == "stats":
        return [dataclasses.asdict(s) for s in dma.engine.stats()]
    if words[0] == "fault":
        dma.faults.install(parse({"kind": words[2], **dict(w.split("=") for w in words[3:])}))
    elif words[0] == "heal":
        for number in list(dma.faults.faults):
            dma.faults.remove(number)
    elif words[0] == "reset":
        dma.stop()
        dma.engine.reset()
        dma.start()
    else:
        getattr(dma.channel(int(words[2])), words[0])()
    return "done"


async def main(where: Path, cards: int) -> None:
    loop = asyncio.get_running_loop()
    program = float(os.environ.get("SCIF_TEST_API_TIME", "1"))
    memory = int(os.environ.get("SCIF_TEST_MIB", "64")) << 20
    async with fabric(cards, clock=Clock("fast", program=program), dma=True, memory=memory) as fab:
        services = []
        for node in fab.nodes:
            ordinary = os.environ.get("SCIF_TEST_ORDINARY") == "1"
            check = {"privileged": lambda pid, uid: False} if ordinary else {}
            services.append(ScifService(node, listen_at(where / f"node{node.id}.sock"), **check))  # type: ignore[arg-type]
            services[-1].start()
        print("ready", flush=True)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            print(json.dumps(await command(fab, services, line.decode().split())), flush=True)
        for service in services:
            await service.close()


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("SCIF_TEST_LOG", "WARNING"))
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
