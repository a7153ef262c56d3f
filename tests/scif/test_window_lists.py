"""What waits for the end of copies (SCIF 2.11): woken by the copier, by its death, or given up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fabric import Fabric, eventually, fabric
from scif_server import Server, settled

from mic_emu._native import lib
from mic_emu.clock import Clock
from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import KernelEndpoint

COPIER = """
import sys, threading
from mic_emu import scif
ep = scif.Endpoint()
ep.connect((1, int(sys.argv[1])))
size = 16 << 20
window = ep.register(scif.alloc(size))
ep.send(b"r")
ep.recv(1)
begun = threading.Event()
threading.Thread(target=lambda: begun.wait() and print("ready", flush=True), daemon=True).start()
while True:  # the other thread speaks while this one copies
    ep.readfrom(window.offset, size, 1 << 62)
    begun.set()
"""


class Copies:
    """A program's side of an endpoint's control page."""

    def __init__(self, ep: KernelEndpoint) -> None:
        assert ep.qp is not None
        self.ep, self.ctl = ep, ep.qp.control

    def begin(self) -> int:
        gen = int(self.ctl.gen) % lib.MIC_SCIF_GENS
        self.ctl.busy[gen] += 1
        return gen

    def end(self, gen: int) -> None:
        """As libscif does: out, and if the node waits, tell it."""
        self.ctl.busy[gen] -= 1
        if self.ctl.drain:
            self.ctl.drain = 0
            self.ep.node.notifier.page.left = 1
            lib.mic_scif_notify_rx(self.ep.node.notifier.page, lib.MIC_SCIF_SLOTS - 1)


def with_copies(body: Callable[[KernelEndpoint, Copies], object], clock: Clock | None = None) -> None:
    async def main() -> None:
        async with fabric(0, clock=clock or Clock("fast", program=1000)) as fab:
            ep = await connected(fab)
            await asyncio.wait_for(body(ep, Copies(ep)), 20)  # type: ignore[arg-type]

    asyncio.run(main())


async def connected(fab: Fabric) -> KernelEndpoint:
    listener, ep = fab.host.open(), fab.host.open()
    port = listener.bind()
    listener.listen()
    await asyncio.gather(listener.accept(), ep.connect((0, port)))
    return ep


def test_scif_87_114_a_change_is_over_when_the_copies_before_it_have_ended() -> None:
    """The last copier wakes the node; copies that began later do not count."""

    async def body(ep: KernelEndpoint, copies: Copies) -> None:
        over: list[str] = []
        ep.windows.lists.changed().then(lambda: over.append("idle"))
        assert over == ["idle"]
        first = copies.begin()
        ep.windows.lists.changed().then(lambda: over.append("one"))
        copies.begin()
        assert over == ["idle"]
        copies.end(first)
        await eventually(lambda: over == ["idle", "one"], "the wake-up")

    with_copies(body)


def test_scif_114_the_owners_pages_stay_until_the_peers_copies_have_ended() -> None:
    """Unregistered, and unmapped by the owner: while a copy goes on neither the call is over nor the pages are free."""

    async def body(ep: KernelEndpoint, copies: Copies) -> None:
        node, ended = ep.node, list[ScifError | None]()
        owner, own_pid = node.endpoints[ep.remote_id], os.getpid()
        run = node.pages.allocate(own_pid, PAGE)
        held = node.pages.hold(own_pid, [(run, PAGE)])
        owner.windows.announce(owner.windows.reserve(0, PAGE, 3, True), held, ended.append)
        await eventually(lambda: ended == [None], "the registration")
        (window,) = ep.windows.remote
        copy = copies.begin()
        owner.windows.unregister(0, PAGE, ended.append)
        node.pages.drop(own_pid, run)
        await eventually(lambda: not window.alive, "the peer's node hears of it")
        for _ in range(20):  # each message between the two takes one
            await asyncio.sleep(0)
        assert ended == [None]
        assert run in dict(node.window_allocator.used_areas())
        copies.end(copy)
        await eventually(lambda: ended == [None, None], "the end of the unregistration")
        assert run not in dict(node.window_allocator.used_areas())

    with_copies(body)


def test_scif_87_114_changes_overlap() -> None:
    """Each change waits for every copy that began before it, also those of earlier changes."""

    async def body(ep: KernelEndpoint, copies: Copies) -> None:
        over: list[int] = []
        old = copies.begin()
        for i in range(lib.MIC_SCIF_GENS + 1):  # until the class of the old copy is in use again
            ep.windows.lists.changed().then(lambda i=i: over.append(i))  # type: ignore[misc]
        young = copies.begin()
        await asyncio.sleep(0)
        assert over == []
        copies.end(old)
        await eventually(lambda: len(over) == lib.MIC_SCIF_GENS + 1, "the wake-up")
        copies.end(young)

    with_copies(body)


def test_scif_87_a_copy_that_never_ends_is_given_up_once() -> None:
    """A hostile program holds up one change for the limit, the next one not at all."""

    async def body(ep: KernelEndpoint, copies: Copies) -> None:
        over: list[int] = []
        stuck = copies.begin()
        ep.windows.lists.changed().then(lambda: over.append(1))
        await eventually(lambda: over == [1], "the limit")
        ep.windows.lists.changed().then(lambda: over.append(2))
        assert over == [1, 2]
        copies.end(stuck)
        ep.windows.lists.changed().then(lambda: over.append(3))
        assert over == [1, 2, 3]

    with_copies(body, Clock("fast", program=0.01))


def test_scif_87_a_connection_that_ends_takes_its_copies_along() -> None:
    """Nobody waits for copies in pages that are given back."""

    async def body(ep: KernelEndpoint, copies: Copies) -> None:
        over: list[int] = []
        copies.begin()
        ep.windows.lists.changed().then(lambda: over.append(1))
        await ep.close()
        assert over == [1]

    with_copies(body)


def test_scif_17_87_a_program_killed_while_it_copies_leaves_nothing(tmp_path: Path) -> None:
    """kill -9 in the middle of a copy into its own window: released at once, no limit passes."""
    server = Server(tmp_path, 1, SCIF_TEST_API_TIME="1000")
    script = "from mic_emu import scif\nl = scif.Endpoint()\nprint(l.bind(), flush=True)\nl.listen()\n"
    script += "ep, _ = l.accept()\nw = ep.register(scif.alloc(16 << 20))\nep.recv(1)\nep.send(b'r')\n"
    script += "ep.recv(1)"

    def start(code: str, node: int, *args: str) -> subprocess.Popen[str]:
        env = {**os.environ, "MICEMU_SCIF_SOCKET": str(tmp_path / f"node{node}.sock")}
        return subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip

    try:
        owner = start(script, 1)
        assert owner.stdout is not None
        copier = start(COPIER, 0, owner.stdout.readline().strip())
        assert copier.stdout is not None
        assert copier.stdout.readline() == "ready\n"
        os.kill(copier.pid, signal.SIGKILL)
        copier.wait(20)
        owner.wait(20)  # its recv ends with the connection
        assert settled(server) == server.idle
    finally:
        assert server.stop() == 0
