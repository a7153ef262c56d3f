"""How messages and memory of an online node are reached: ourselves, a neighbour, a card behind the host."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from mic_emu.memory import View, in_bank
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg

if TYPE_CHECKING:
    from mic_emu.scif.link import Link
    from mic_emu.scif.node import Node


class Path(Protocol):
    """How messages and memory of one online node are reached. ``stuck``: the last ones were dropped, nobody took them."""

    @property
    def stuck(self) -> bool: ...
    def send(self, msg: Msg) -> None: ...
    def own_addr(self, offset: int) -> int: ...
    def peer_view(self, addr: int, length: int) -> View: ...
    def peer_place(self, addr: int, length: int) -> tuple[int, int]: ...
    def window_place(self, addr: int, length: int) -> tuple[int, int]: ...
    def dup_bank(self) -> int: ...


class SelfPath:
    """Loopback: the node is its own peer; messages go through the loop, never through the caller."""

    stuck = False

    def __init__(self, node: Node) -> None:
        self.node = node

    def send(self, msg: Msg) -> None:
        """Deliver after the current callback, in order."""
        asyncio.get_running_loop().call_soon(self._deliver, msg)

    def _deliver(self, msg: Msg) -> None:
        try:
            self.node.handle(msg, None)
        except (ScifError, KeyError, ValueError) as e:
            self.node.log_dropped(msg, "itself", e)

    def own_addr(self, offset: int) -> int:
        """Our offsets are the addresses."""
        return offset

    def peer_view(self, addr: int, length: int) -> View:
        """Our own memory."""
        return self.node.memory.sub(addr, length)

    def peer_place(self, addr: int, length: int) -> tuple[int, int]:
        """Our own memory, by descriptor."""
        self.node.memory.sub(addr, length)
        return self.node.memory_fd, addr

    def window_place(self, addr: int, length: int) -> tuple[int, int]:
        """A window of ours; only we have announced it."""
        return self.node.memory_fd, addr

    def dup_bank(self) -> int:
        """We do not lose ourselves."""
        return -1


class RelayPath:
    """Another card: messages through the host, memory through its descriptor (offset = address)."""

    def __init__(self, link: Link, memory: View, fd: int) -> None:
        self.link, self.memory, self.fd = link, memory, fd

    @property
    def stuck(self) -> bool:
        """Of the way to the host; whether the other card takes what the host forwards, only the host sees."""
        return self.link.stuck

    def send(self, msg: Msg) -> None:
        """Hand it to the host, which forwards it."""
        self.link.send(msg)

    def own_addr(self, offset: int) -> int:
        """Our offsets are the addresses."""
        return offset

    def peer_view(self, addr: int, length: int) -> View:
        """The other card's memory."""
        return self.memory.sub(addr, length)

    def peer_place(self, addr: int, length: int) -> tuple[int, int]:
        """The other card's memory, by descriptor."""
        self.memory.sub(addr, length)
        return self.fd, addr

    def window_place(self, addr: int, length: int) -> tuple[int, int]:
        """Pages of one of its windows."""
        return self.fd, in_bank(addr, length, self.memory.size)

    def dup_bank(self) -> int:
        """The host revokes it."""
        return -1
