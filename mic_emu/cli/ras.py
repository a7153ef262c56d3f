"""What ``info``, ``check`` and ``smc`` ask a card: systoolsd and RAS over SCIF, through the host process."""

from __future__ import annotations

from mic_emu.cli import client
from mic_emu.cosm import tools_proto as P
from mic_emu.errors import MicemuError


def systools(card: str, kind: int, value: int = 0) -> bytes | None:
    """Payload of a systoolsd request; None when the card refuses it. Raises MicemuError: no answer."""
    request = P.SYSTOOLS_HEADER.pack(kind, 0, 0, 0, value.to_bytes(4, "little") + bytes(12))
    got = _ask(card, P.SYSTOOLS_PORT, request, P.SYSTOOLS_HEADER.size, 2)
    if len(got) < P.SYSTOOLS_HEADER.size:
        raise MicemuError(f"{card}: systoolsd closed the connection")
    return None if P.SYSTOOLS_HEADER.unpack_from(got)[2] else got[P.SYSTOOLS_HEADER.size :]


def set_systools(card: str, kind: int, value: int) -> None:
    """A set request. Raises MicemuError, also when the card refuses it."""
    if systools(card, kind, value) is None:
        raise MicemuError(f"{card}: systoolsd refuses request {kind:#04x}")


def ras(card: str, op: int) -> bytes | None:
    """Body of a RAS request; None when the card refuses it. Raises MicemuError: no answer."""
    got = _ask(card, P.RAS_PORT, P.RAS_HEADER.pack(op, 0, 0, 1, 0), P.RAS_HEADER.size, 2)
    if len(got) < P.RAS_HEADER.size or not P.RAS_HEADER.unpack_from(got)[0] & P.RAS_RESPONSE:
        raise MicemuError(f"{card}: the RAS service does not answer")
    return None if P.RAS_HEADER.unpack_from(got)[0] & P.RAS_ERROR else got[P.RAS_HEADER.size :]


def _ask(card: str, port: int, request: bytes, head: int, length_at: int) -> bytes:
    answer = client.ask("scif_ask", card=card, port=port, data=request.hex(), head=head, length_at=length_at)
    return bytes.fromhex(answer["data"])
