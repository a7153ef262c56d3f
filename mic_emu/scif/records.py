"""Window records: room that a node grants in its memory, in which a peer describes a window (SCIF 3.4)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from mic_emu.memory import PAGE
from mic_emu.scif.errors import ScifError
from mic_emu.scif.proto import Msg, Op
from mic_emu.scif.ras import Segment, Window, check_pages

if TYPE_CHECKING:
    from mic_emu.scif.node import Node
    from mic_emu.scif.paths import Path
    from mic_emu.scif.windows import Windows

HEAD = struct.Struct("<8Q")  # magic, offset, length, prot, segments, 3 reserved
SEGMENT = struct.Struct("<2Q")
MAGIC = 0x5C1F57494E444F57
MAX_SEGMENTS = 1 << 16


def pack(window: Window, path: Path) -> bytes:
    """The record of an own window, for the peer at the other end of ``path``."""
    head = HEAD.pack(MAGIC, window.offset, window.length, window.prot, len(window.segments), 0, 0, 0)
    return head + b"".join(SEGMENT.pack(path.own_addr(off), n) for off, n in window.segments)


def unpack(data: bytes, path: Path | None) -> tuple[int, int, int, list[Segment]]:
    """Offset, length, protection and pages of a peer's window; every field is checked against its memory.

    Raises ScifError EINVAL; IndexError when a page is outside its memory.
    """
    magic, offset, length, prot, count, *_ = HEAD.unpack_from(data)
    if magic != MAGIC or path is None or HEAD.size + count * SEGMENT.size > len(data):
        raise ScifError(errno.EINVAL, "bad window record")
    check_pages(offset, length)
    segments = [SEGMENT.unpack_from(data, HEAD.size + i * SEGMENT.size) for i in range(count)]
    if sum(n for _, n in segments) != length or any(n <= 0 or a % PAGE or n % PAGE for a, n in segments):
        raise ScifError(errno.EINVAL, "bad window record")
    for addr, n in segments:
        path.window_place(addr, n)
    return offset, length, prot & 3, [(a, n) for a, n in segments]


class Records:
    """Records that peers were granted and have not filled in yet."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._granted: dict[int, tuple[int, Windows, int]] = {}  # offset in our memory, owner, bytes
        node.add_handler(Op.ALLOC_REQ, self._on_alloc)
        node.add_handler(Op.ALLOC_GNT, self._on_grant)
        node.add_handler(Op.ALLOC_REJ, lambda msg, link: node.questions.answer(msg.p2, msg))
        node.add_handler(Op.FREE_VIRT, lambda msg, link: self.drop(msg.p1, msg.src[0]))

    def _on_alloc(self, msg: Msg, link: object) -> None:
        path = self.node.path(msg.src[0])
        try:
            windows = self.node.windows.of(msg.p0, msg)
            nbytes = HEAD.size + msg.p1 * SEGMENT.size
            if not 0 < msg.p1 <= MAX_SEGMENTS or path is None:
                raise ScifError(errno.EINVAL, "bad record size")
            offset = self.node.allocator.alloc(nbytes)
        except OSError as e:
            if path is not None:
                path.send(msg.refuse(Op.ALLOC_REJ, e))
            return
        record = self.node.new_id()
        self._granted[record] = (offset, windows, nbytes)
        path.send(msg.answer(Op.ALLOC_GNT, p0=record, p1=path.own_addr(offset), p2=msg.p2))
        self.node.events.expect()  # the record is filled in at once

    def _on_grant(self, msg: Msg, link: object) -> None:
        if msg.p2 in self.node.questions:
            self.node.questions.answer(msg.p2, msg)
            return
        path = self.node.path(msg.src[0])
        if path is not None:  # who asked has gone meanwhile
            path.send(msg.answer(Op.FREE_VIRT, p0=0, p1=msg.p0))

    def drop(self, record: int, node_id: int) -> None:
        """Node ``node_id`` says that it is done with it; nothing when it is not there, or another's.

        Before that, or the loss of the node, the room is not ours again: it may just be filling it in,
        whatever has become of our endpoint.
        """
        known = self._granted.get(record)
        if known is not None and known[1].ep.peer[0] == node_id:
            del self._granted[record]
            self.node.allocator.free(known[0])

    def drop_node(self, node_id: int) -> None:
        """The node is lost: it will not fill in its records."""
        for record in [r for r, (_, w, _) in self._granted.items() if w.ep.peer[0] == node_id]:
            self.drop(record, node_id)

    def take(self, record: int, windows: Windows) -> bytes:
        """The bytes of a filled record, which is gone now. Raises KeyError, ScifError EINVAL (not theirs)."""
        offset, owner, nbytes = self._granted[record]
        data = self.node.memory.read(offset, nbytes)
        self.drop(record, owner.ep.peer[0])
        if owner is not windows:
            raise ScifError(errno.EINVAL, "somebody else's record")
        return data
