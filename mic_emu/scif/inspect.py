"""Live tables of a node for people: endpoints with their owners, windows (SCIF 3.8)."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mic_emu._native import lib
from mic_emu.scif.control import REQUEST
from mic_emu.scif.errors import ScifError

if TYPE_CHECKING:
    from mic_emu.scif.endpoint import Endpoint
    from mic_emu.scif.node import Node
    from mic_emu.scif.ras import Window
    from mic_emu.scif.session import Session

_REPLY = struct.Struct("<iI8Q")
TIMEOUT_S = 5.0


def _window(w: Window) -> dict[str, Any]:
    prot = ("r" if w.prot & 1 else "-") + ("w" if w.prot & 2 else "-")
    state = "lingering" if w.lingering else "registered" if w.alive else "leaving"
    return {
        "offset": w.offset,
        "length": w.length,
        "prot": prot,
        "state": state,
        "mapped_pages": w.mapped_pages,
    }


def _copies(ep: Endpoint) -> dict[str, Any]:
    """What was handed over to DMA channels; ``channel`` None: nothing yet, or none reaches the peer."""
    c = ep.copies
    return {
        "channel": c.lane.channel.index if c.lane is not None else None,
        "issued": c.issued,
        "done": c.done,
        "failed": bool(c.failed),
    }


def _endpoint(ep: Endpoint, pid: int) -> dict[str, Any]:
    return {
        "pid": pid,
        "port": ep.port,
        "state": ep.state.name.lower(),
        "peer": list(ep.peer) if ep.remote_id else None,
        "waiting": len(ep.pending),
        "copies": _copies(ep),
        "windows": [_window(w) for w in ep.windows.own],
        "peer_windows": [_window(w) for w in ep.windows.remote],
    }


def tables(node: Node, sessions: Iterable[Session]) -> dict[str, Any]:
    """What the node knows; ``pid`` 0 is the node process itself (a kernel client)."""
    owners = {s.ep.id: s.pid for s in sessions}
    return {
        "node": node.id,
        "online": node.node_ids(),
        "max_id": node.maxid,
        "registered_bytes": node.pages.used_bytes,
        "memory_used_bytes": node.used_bytes,
        "endpoints": [_endpoint(ep, owners.get(ep.id, 0)) for ep in list(node.endpoints.values())],
    }


def ask_tables(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of the node behind socket ``path``. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(os.fspath(path))
        for op in (lib.MIC_SCIF_HELLO, lib.MIC_SCIF_TABLES):
            sock.send(REQUEST.pack(op, 0, 0, os.getpid(), 0, 0, 0, 0, 0))
            packet, fds, _, _ = socket.recv_fds(sock, 4096, 1)
            status = _REPLY.unpack_from(packet)[0]
            if status < 0:
                raise ScifError(-status, "the node does not answer")
        if not fds:
            raise ScifError(errno.EPROTO, "the node sent no tables")
        with os.fdopen(fds[0], "rb") as f:
            f.seek(0)
            result: dict[str, Any] = json.load(f)
        return result
