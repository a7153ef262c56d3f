"""Node messages: opcodes and the 44-byte frame (SCIF 3.3, the column of mainline Linux)."""

from __future__ import annotations

import enum
import errno
import struct
from typing import NamedTuple

from mic_emu import layout

MSG_SIZE = layout.SCIF_MSG.size
_FRAME = struct.Struct("<HHHHIQQQQ")
assert _FRAME.size == MSG_SIZE
MASK64 = (1 << 64) - 1


class Op(enum.IntEnum):
    """Opcodes; 0 and anything above the maximum is logged and dropped."""

    INIT = 1
    EXIT = 2
    EXIT_ACK = 3
    NODE_ADD = 4
    NODE_ADD_ACK = 5
    NODE_ADD_NACK = 6
    NODE_REMOVE = 7
    NODE_REMOVE_ACK = 8
    CNCT_REQ = 9
    CNCT_GNT = 10
    CNCT_GNTACK = 11
    CNCT_GNTNACK = 12
    CNCT_REJ = 13
    DISCNCT = 14
    DISCNCT_ACK = 15
    CLIENT_SENT = 16
    CLIENT_RCVD = 17
    GET_NODE_INFO = 18
    REGISTER = 19
    REGISTER_ACK = 20
    REGISTER_NACK = 21
    UNREGISTER = 22
    UNREGISTER_ACK = 23
    UNREGISTER_NACK = 24
    ALLOC_REQ = 25
    ALLOC_GNT = 26
    ALLOC_REJ = 27
    FREE_VIRT = 28
    MUNMAP = 29
    MARK = 30
    MARK_ACK = 31
    MARK_NACK = 32
    WAIT = 33
    WAIT_ACK = 34
    WAIT_NACK = 35
    SIG_LOCAL = 36
    SIG_REMOTE = 37
    SIG_ACK = 38
    SIG_NACK = 39


class Msg(NamedTuple):
    """One node message; ``src`` and ``dst`` are (node, port), ``p0``..``p3`` unsigned 64 bit."""

    op: int
    src: tuple[int, int] = (0, 0)
    dst: tuple[int, int] = (0, 0)
    p0: int = 0
    p1: int = 0
    p2: int = 0
    p3: int = 0

    def pack(self) -> bytes:
        """The 44 bytes on the queue."""
        op, (sn, sp), (dn, dp), p0, p1, p2, p3 = self
        return _FRAME.pack(sn, sp, dn, dp, op, p0 & MASK64, p1 & MASK64, p2 & MASK64, p3 & MASK64)

    @classmethod
    def unpack(cls, data: bytes) -> Msg:
        """The message in 44 bytes; any bytes are a message."""
        sn, sp, dn, dp, op, p0, p1, p2, p3 = _FRAME.unpack(data)
        return cls(op, (sn, sp), (dn, dp), p0, p1, p2, p3)

    def refuse(self, op: int, error: Exception) -> Msg:
        """``answer`` to a request about a window; p3 says why (a field that the original leaves unused)."""
        return self.answer(op)._replace(p3=getattr(error, "errno", None) or errno.EINVAL)

    def answer(self, op: int, p0: int | None = None, p1: int | None = None, p2: int | None = None) -> Msg:
        """Back to the sender with another opcode; the payload is the same where nothing else is given."""
        return Msg(
            op,
            self.dst,
            self.src,
            self.p0 if p0 is None else p0,
            self.p1 if p1 is None else p1,
            self.p2 if p2 is None else p2,
            self.p3,
        )

    def __str__(self) -> str:
        name = Op(self.op).name if self.op in Op._value2member_map_ else f"op{self.op}"
        return (
            f"{name} {self.src[0]}:{self.src[1]}->{self.dst[0]}:{self.dst[1]}"
            f" {self.p0:#x} {self.p1:#x} {self.p2:#x} {self.p3:#x}"
        )
