"""The card's kernel log: what its threads say at the same time is all there."""

from __future__ import annotations

import threading
from typing import cast

from mic_emu import layout as L
from mic_emu.card.os.klog import KernelLog
from mic_emu.memory import View

AT = L.CONSTANTS["CARD_LOG"]


class Gddr:
    """Memory with a log in it. Whoever writes first lets the other one come in between, if he may."""

    def __init__(self) -> None:
        self.log = bytearray(L.CONSTANTS["CARD_LOG_SIZE"])
        self.inside = 0
        self.both = threading.Event()

    def store(self, at: int, size: int, value: int) -> None:
        self.log[at - AT : at - AT + size] = value.to_bytes(size, "little")

    def write(self, at: int, data: bytes) -> None:
        self.inside += 1
        if self.inside == 2:
            self.both.set()
        self.both.wait(0.2)
        self.log[at - AT : at - AT + len(data)] = data

    def text(self) -> str:
        length = int.from_bytes(self.log[:4], "little")
        return self.log[4 : 4 + length].decode()


def test_lines_of_two_threads_are_both_there() -> None:
    """A driver's loop ends with an error while the card OS says something."""
    gddr = Gddr()
    log = KernelLog(cast("View", gddr))
    other = threading.Thread(target=log.write, args=("of a driver's loop\n",))
    other.start()
    log.write("of the card OS\n")
    other.join(20)
    assert sorted(gddr.text().splitlines()) == ["of a driver's loop", "of the card OS"]
