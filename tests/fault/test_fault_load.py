"""Faults that come and go while everything is busy: nothing may hang, and no byte may be wrong."""

from __future__ import annotations

import errno
import random
import threading

import pytest
from nbdwire import READ, WRITE, NbdClient

from mic_emu.testing.faults import add_fault
from mic_emu.testing.machine import Machine, eventually

pytestmark = pytest.mark.system

BLOCK = 16 << 10
# What may be done to a healthy card without harm to its data (a torn write that claims success is not).
HARMLESS = (
    ("doorbell-duplicate", {"rate": 0.3}),
    ("doorbell-delay", {"delay": "1ms", "rate": 0.2}),
    ("disk-error", {"device": "vda", "rate": 0.2}),
    ("disk-error", {"op": "write", "errno": "EOPNOTSUPP", "rate": 0.1}),
    ("disk-delay", {"delay": "2ms", "jitter": "2ms", "rate": 0.3}),
    ("disk-torn", {"rate": 0.3}),
    ("packet-loss", {"rate": 0.3}),
    ("packet-delay", {"delay": "3ms", "jitter": "3ms", "rate": 0.5}),
    ("packet-reorder", {"rate": 0.3, "gap": 3}),
    ("packet-duplicate", {"rate": 0.3}),
    ("dma-delay", {"delay": "1ms", "rate": 0.5}),
    ("link", {"bandwidth": "50M", "latency": "100us"}),
    ("heartbeat-stop", {"rate": 0.1}),
)


class Writer(threading.Thread):
    """Writes blocks and reads them back over the card's NBD socket, again when the disk says EIO."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.nbd = NbdClient(path)
        self.nbd.go(b"vda")
        self.done = threading.Event()
        self.blocks = self.errors = 0
        self.wrong: list[int] = []

    def _until_it_works(self, kind: int, at: int, data: bytes = b"") -> bytes:
        while True:
            error, got = self.nbd.call(kind, at, BLOCK if kind == READ else 0, data)
            if not error:
                return got
            assert error in (errno.EIO, errno.EOPNOTSUPP, errno.EINVAL), error
            self.errors += 1

    def run(self) -> None:
        dice = random.Random(1)
        while not self.done.is_set():
            at, data = dice.randrange(512) * BLOCK, dice.randbytes(BLOCK)
            self._until_it_works(WRITE, at, data)
            if self._until_it_works(READ, at) != data:
                self.wrong.append(at)
            self.blocks += 1


@pytest.mark.timeout(600)
def test_faults_come_and_go_under_load(machine: Machine) -> None:
    """Every harmless kind, twice, in a random order, two at a time, over a busy disk and network."""
    card = machine.boot()["cards"][0]
    writer = Writer(f"{card['run_dir']}/vda.nbd")
    writer.start()
    load = None
    if card["net"] in ("ns", "tap"):
        flood = ("run", "host", "--", "ping", "-q", "-i", "0.005", card["addresses"]["card"])
        load = machine.popen(*flood, stdout=-3, stderr=-3)
    try:
        kinds = [*HARMLESS, *HARMLESS]
        random.Random(2).shuffle(kinds)
        last = None
        for seed, (kind, words) in enumerate(kinds):
            blocks = writer.blocks
            fresh = (
                add_fault(machine, kind, seed=seed, **words)
                if kind != "link"
                else add_fault(machine, kind, **words)
            )
            eventually(
                lambda b=blocks: writer.blocks > b or not writer.is_alive(), 30, f"a block under {kind}"
            )
            if last:
                last.remove()
            last = fresh
        machine.micemu("fault", "remove", "mic0", "--all")
        blocks = writer.blocks
        eventually(lambda: writer.blocks > blocks + 5 or not writer.is_alive(), 30, "blocks without faults")
    finally:
        writer.done.set()
        writer.join(30)
        if load:
            load.kill()
            load.wait()
    assert not writer.is_alive()
    assert writer.wrong == []
    assert writer.errors > 0
    assert machine.card()["state"] == "online"
    assert machine.shell("echo alive").strip() == "alive"
