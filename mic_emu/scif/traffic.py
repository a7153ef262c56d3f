"""How many bytes a node has exchanged with each of its peers.

Nothing is counted here: programs keep the count of their messages in the control page of their endpoint, where
it belongs to the positions of the rings, and kernel clients in their endpoint. This adds them up when
somebody looks, and keeps the sum of an endpoint that ends. A program can lie about its own bytes, never
about another's, and never makes a sum smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node

COUNTERS = ("sent", "received", "dma_written", "dma_read")
"""Of messages, and of copies by DMA channels, as the node's own programs see them."""
MASK = (1 << 63) - 1
MAX_PEERS = 1024


class Traffic:
    """Sums since the node came up, by peer."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._sums: dict[int, dict[str, int]] = {}
        self._seen: dict[int, tuple[int, int]] = {}  # by endpoint: what is in the sums

    def of(self, peer: int) -> dict[str, int]:
        """The sums with one peer."""
        return self._sums.setdefault(peer, dict.fromkeys(COUNTERS, 0))

    def look(self, ep: Endpoint) -> None:
        """Take over what an endpoint has counted since the last look."""
        now = ep.message_bytes()
        if now is None:
            return
        sums, before = self.of(ep.peer[0]), self._seen.get(ep.id, (0, 0))
        new = (max(now[0] & MASK, before[0]), max(now[1] & MASK, before[1]))
        self._seen[ep.id] = new
        sums["sent"] += new[0] - before[0]
        sums["received"] += new[1] - before[1]

    def end(self, ep: Endpoint) -> None:
        """The last look at an endpoint: its queue pair goes."""
        self.look(ep)
        self._seen.pop(ep.id, None)

    def copied(self, peer: int, nbytes: int, write: bool) -> None:
        """A DMA channel has carried out a copy for a program."""
        self.of(peer)["dma_written" if write else "dma_read"] += nbytes

    def sums(self) -> dict[int, dict[str, int]]:
        """Bytes by peer and counter."""
        for ep in self.node.endpoints.values():
            self.look(ep)
        return {peer: dict(row) for peer, row in self._sums.items()}


def checked(answer: Any) -> dict[int, dict[str, int]]:
    """The sums that a card tells of its node, or what of them makes sense."""
    found = {}
    for peer, row in list(answer.items())[:MAX_PEERS] if isinstance(answer, dict) else []:
        if (
            isinstance(peer, str)
            and peer.isascii()
            and peer.isdigit()
            and len(peer) < 6
            and isinstance(row, dict)
        ):
            values = {name: row.get(name) for name in COUNTERS}
            if all(type(v) is int and 0 <= v <= MASK for v in values.values()):
                found[int(peer)] = values
    return found  # type: ignore[return-value]
