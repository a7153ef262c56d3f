"""A fabric as a process of its own: node 0 and its cards, each with its socket for programs.

usage: fabric_server.py DIR CARDS. Prints one line when it is ready, then answers commands, one JSON
line each: ``state`` (what the nodes still hold), ``down N`` (card N vanishes), ``up N`` (it is back,
without its window bank), ``cut N`` (its windows' pages go, and no node has heard of it). Ends with
its standard input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fabric import Fabric, card_ports, eventually, fabric, host_ports

from mic_emu.clock import Clock
from mic_emu.memory import revoke_windows
from mic_emu.scif.service import ScifService, listen_at


def state(fab: Fabric, services: list[ScifService]) -> list[dict[str, Any]]:
    for node in fab.nodes:
        node.free_retired()
    return [
        {
            "node": n.id,
            "online": n.node_ids(),
            "endpoints": len(n.endpoints),
            "ports": len(n.ports),
            "sessions": len(s.sessions),
            "used": n.used_bytes,
        }
        for n, s in zip(fab.nodes, services, strict=True)
    ]


async def command(fab: Fabric, services: list[ScifService], words: list[str]) -> Any:
    if words[0] == "state":
        return state(fab, services)
    index = int(words[1]) - 1
    card = fab.cards[index]
    if words[0] == "down":
        card.card_link.down()
        card.host_link.down()
        card.page.card_addr = card.page.host_addr = 0
    elif words[0] == "cut":
        revoke_windows(card.bus.fds[0])
    elif words[0] == "up":
        card.host_link = fab.host.add_link(index + 1, host_ports(card.bus, card.page))
        card.card_link = card.node.add_link(0, card_ports(card.bus, card.page))
        card.host_link.start()
        card.card_link.start()
        await eventually(lambda: index + 1 in fab.host.node_ids(), "online again")
    return "done"


async def main(where: Path, cards: int) -> None:
    loop = asyncio.get_running_loop()
    program = float(os.environ.get("SCIF_TEST_API_TIME", "1"))
    async with fabric(cards, clock=Clock("fast", program=program)) as fab:
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
