"""Messages between nodes as tools and traces know them (SCIF 3.3)."""

from __future__ import annotations

from mic_emu.scif.proto import Msg, Op

MAINLINE = """INIT EXIT EXIT_ACK NODE_ADD NODE_ADD_ACK NODE_ADD_NACK NODE_REMOVE NODE_REMOVE_ACK CNCT_REQ CNCT_GNT
CNCT_GNTACK CNCT_GNTNACK CNCT_REJ DISCNCT DISCNCT_ACK CLIENT_SENT CLIENT_RCVD GET_NODE_INFO REGISTER REGISTER_ACK
REGISTER_NACK UNREGISTER UNREGISTER_ACK UNREGISTER_NACK ALLOC_REQ ALLOC_GNT ALLOC_REJ FREE_VIRT MUNMAP MARK MARK_ACK
MARK_NACK WAIT WAIT_ACK WAIT_NACK SIG_LOCAL SIG_REMOTE SIG_ACK SIG_NACK"""


def test_scif_3_3_opcodes_are_those_of_mainline() -> None:
    """1 to 39, in the order of the table."""
    assert [op.name for op in sorted(Op)] == MAINLINE.split()
    assert [int(op) for op in sorted(Op)] == list(range(1, 40))


def test_scif_3_3_a_message_is_44_bytes_without_gaps() -> None:
    """Source and destination as node and port, the opcode, four words; little endian."""
    packed = Msg(
        Op.SIG_LOCAL, (0x0102, 0x0304), (0x0506, 0x0708), 9 << 56, 10 << 56, 11 << 56, 12 << 56
    ).pack()
    assert packed == bytes(
        [2, 1, 4, 3, 6, 5, 8, 7, 36, 0, 0, 0, *[0] * 7, 9, *[0] * 7, 10, *[0] * 7, 11, *[0] * 7, 12]
    )
    assert Msg.unpack(packed).pack() == packed
